"""The driver: connects the actors, keeps them busy and bounded, and survives their deaths.

The algorithm of SiDA-MoE (section 3.1) as one loop: predict batch i + lookahead, send it to an Executor, whose experts are then
brought, have batch i run, yield its results. A call carries all that it needs, so that Ray may repeat it on a restarted actor;
results are keyed by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice, zip_longest
from typing import Literal

import ray

from pipeline.actors import ActorLost, Actors, result
from pipeline.batch_result import BatchResult
from pipeline.data import Batch
from pipeline.floor import Floor, Listen
from pipeline.losses import Told
from pipeline.regroup import Grouping, Regrouping, chunks, rebuilt, regroup, row_tables, windows
from predictor.actor import Prediction
from predictor.tokens import TokenBatch


def run_batches(
    actors: Actors,
    batches: Iterable[tuple[Batch, Prediction | None]],
    routing: str,
    slots: int,
    lookahead: int | Literal["auto"],
    listen: Listen | None = None,
    lost: Told = lambda loss: None,
) -> Iterator[BatchResult]:
    """Runs batches and yields their results as they come: those of one Executor in the order given.

    At most `lookahead` batches are ahead of the one that an Executor runs, which bounds every queue.

    Args:
        batches: those without a prediction are predicted on their way.
        listen: told, again and again, what the batch that is executed has generated so far (Executor.spoken);
            for one Executor.
        lost: told of every actor that died on the way.
    """
    waiting, floor = iter(batches), Floor(actors, routing, slots, lookahead, lost)
    while True:
        for batch, prediction in islice(waiting, floor.room):
            floor.predict(batch, prediction)
        floor.dispatch()
        if floor.is_empty:
            return
        yield from floor.done(listen)


def overlapping(
    actors: Actors,
    batches: list[Batch],
    settings: Regrouping,
    done: Collection[int],
    groupings: dict[int, Grouping],
    decided: Callable[[int, Grouping], None],
) -> Iterator[tuple[Batch, Prediction]]:
    """The batches of `batch.order: overlap` that are not done yet; the tables of a window are made while the one before it runs.

    Args:
        batches: in the order of the input.
        groupings: decided before, by the window's first row.
        decided: told of any other, before its first batch.
    """
    left = [window for window in windows(batches, settings.batch) if any(batch.index not in done for batch in window)]
    asked = [_ask(actors, window) for window in left[:1]]
    for window, following in zip_longest(left, left[1:]):
        parts, refs = asked.pop()
        asked += [_ask(actors, following)] if following else []
        predictions = [_answer(actors, part, ref) for part, ref in zip(parts, refs, strict=True)]
        tables = row_tables(parts, [prediction.table for prediction in predictions], settings.shape)
        first = int(window[0].rows[0])
        if first not in groupings:
            groupings[first] = regroup(window, tables, settings)
            decided(first, groupings[first])
        start, end = predictions[0].start, predictions[0].start + sum(p.end - p.start for p in predictions)
        for at, (batch, table) in enumerate(rebuilt(window, groupings[first], tables)):
            if batch.index not in done:
                share = (end - start) // len(window)  # of the time that the window's tables took
                yield batch, Prediction(table, start + at * share, start + (at + 1) * share, predictions[0].pid)


def _ask(actors: Actors, window: list[Batch]) -> tuple[list[TokenBatch], list[ray.ObjectRef]]:
    parts = chunks(window)
    return parts, [actors.predict(part) for part in parts]


def _answer(actors: Actors, part: TokenBatch, ref: ray.ObjectRef) -> Prediction:
    """A table; where the Executor that was to make it has gone, another makes it.

    Raises:
        ActorLost: all have gone, or the Predictor has, which has no other.
    """
    others = len(actors.executors) if actors.predictor is None else 0  # the one that has gone may still be among them
    for _ in range(others):
        try:
            prediction: Prediction = result(ref)
        except ActorLost:
            ref = actors.predict(part)
        else:
            return prediction
    return result(ref)
