"""The driver: connects the three actors, keeps them busy and bounded, and survives their deaths.

The algorithm of SiDA-MoE (section 3.1) as one loop: predict batch i + lookahead, let the store bring its experts, run batch i,
yield its results. A call carries all that it needs, so that Ray may repeat it on a restarted actor; results are keyed by batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.batch_result import BatchResult
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.executor import Executor
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.regroup import Grouping, Regrouping, chunks, rebuilt, regroup, row_tables, windows
from pipeline.window import MAX_LOOKAHEAD, Window
from predictor.actor import Prediction, Predictor
from predictor.registry import STEPPING, PredictorSpec
from predictor.tokens import TokenBatch
from store.actor import ArenaInfo, ExpertStore
from store.load import Placement
from store.weights import Source

CALL_RETRIES = 5
"""A batch during which the Executor dies more often than this is taken for the cause."""

LISTEN_S = 0.1
"""How often the Executor is asked what it has generated."""


def start_actor(cls: type, *arguments: Any, **options: Any) -> Any:
    """An actor of `cls`, on this node as the arena is, restarted when it dies, its unanswered calls repeated."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    durable = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=CALL_RETRIES, scheduling_strategy=here, **options)
    return durable(cls).remote(*arguments)


def start_store(path: Path, source: Source, placement: Placement) -> Any:
    """The ExpertStore actor of this machine; two calls at once, so that a build can be asked how far it is."""
    return start_actor(ExpertStore, path, source, placement, max_concurrency=2)


@dataclass(frozen=True)
class Actors:
    """The Predictor and the Executor of a run.

    Attributes:
        predictor: None: the Executor has the predictor in its own process.
    """

    predictor: Any
    executor: Any

    @classmethod
    def start(cls, spec: ExecutorSpec, predictor: PredictorSpec, arena: ArenaInfo, threads: int, here: bool = False) -> Actors:
        """Starts both; `ready` waits for them.

        Args:
            here: the predictor runs in the Executor's process, on its device.

        Raises:
            ConfigError: a GPU is wanted, and Ray has none.
        """
        gpus = {} if spec.device == "cpu" else {"num_gpus": 1}  # Ray shows an actor only those that it asked for
        own = {} if predictor.device == "cpu" else {"num_gpus": 1}
        if gpus and not ray.cluster_resources().get("GPU"):
            raise ConfigError("device: this Ray has no GPU to give; write `device: cpu`, or start it with `ray start --num-gpus 1`")
        calls = MAX_LOOKAHEAD + 2  # all that may wait, and a question
        if spec.task.forwards > 1 and predictor.kind in STEPPING:
            spec = replace(spec, stepping=replace(predictor, device="cpu"))
        if here:
            return cls(None, start_actor(Executor, replace(spec, predictor=predictor), max_concurrency=calls, **gpus))
        return cls(
            start_actor(Predictor, predictor, ArenaModel(spec.model, arena.path), threads, **own),
            start_actor(Executor, spec, max_concurrency=calls, **gpus),
        )

    def ready(self) -> None:
        """Waits until both can work.

        Raises:
            PredictorError: the predictor's file cannot be used.
        """
        result([actor.ready.remote() for actor in self._both])

    def finish(self) -> None:
        """All is done: the Executor gives up the arena."""
        result(self.executor.close.remote())

    def stop(self) -> None:
        """Ends both, whatever they are doing; their locks on the arena go with their processes, shortly after."""
        for actor in self._both:
            ray.kill(actor)

    @property
    def _both(self) -> list[Any]:
        return [actor for actor in (self.executor, self.predictor) if actor is not None]

    def predict(self, tokens: TokenBatch) -> ray.ObjectRef:
        """A table of rows that are no batch yet."""
        return (self.predictor or self.executor).predict.remote(tokens)

    def submit(self, batch: Batch, prediction: Prediction | None, routing: str) -> ray.ObjectRef:
        """Sends a batch on its way: predicted, if it is not yet, planned, executed."""
        if prediction is None and self.predictor is not None:
            prediction = self.predictor.predict.remote(batch.tokens)
        return self.executor.execute.remote(batch, prediction, routing)


def run_batches(
    actors: Actors,
    batches: Iterable[tuple[Batch, Prediction | None]],
    routing: str,
    slots: int,
    lookahead: int | Literal["auto"],
    listen: Callable[[Batch, list[list[int]]], None] | None = None,
) -> Iterator[BatchResult]:
    """Runs batches in the order given and yields their results in that order.

    At most `lookahead` batches are ahead of the one that is executed, which bounds every queue.

    Args:
        batches: those without a prediction are predicted on their way.
        listen: told, again and again, what the batch that is executed has generated so far (Executor.spoken).
    """
    waiting, under_way = iter(batches), deque[tuple[Batch, ray.ObjectRef]]()
    window = Window(slots, lookahead)
    while True:
        for batch, prediction in islice(waiting, max(0, window.lookahead + 1 - len(under_way))):
            under_way.append((batch, actors.submit(batch, prediction, routing)))
        if not under_way:
            return
        batch, answer = under_way.popleft()
        while listen is not None and not ray.wait([answer], timeout=LISTEN_S)[0]:
            listen(batch, result(actors.executor.spoken.remote(batch.index)))
        done: BatchResult = result(answer)
        window.saw(done.stats.predicted_uses)
        yield done


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
        predictions: list[Prediction] = result(refs)
        tables = row_tables(parts, [prediction.table for prediction in predictions], settings.shape)
        first = int(window[0].rows[0])
        if first not in groupings:
            groupings[first] = regroup(window, tables, settings)
            decided(first, groupings[first])
        start, end = predictions[0].start, predictions[0].start + sum(p.end - p.start for p in predictions)
        for at, (batch, table) in enumerate(rebuilt(window, groupings[first], tables)):
            if batch.index not in done:
                share = (end - start) // len(window)  # of the time that the window's tables took
                yield batch, Prediction(table, start + at * share, start + (at + 1) * share)


def _ask(actors: Actors, window: list[Batch]) -> tuple[list[TokenBatch], list[ray.ObjectRef]]:
    parts = chunks(window)
    return parts, [actors.predict(part) for part in parts]


def open_store(store: Any, progress: Callable[[int], None]) -> ArenaInfo:
    """Waits for the arena, telling how many bytes are placed."""
    info = store.open.remote()
    while not ray.wait([info], timeout=0.5)[0]:
        progress(result(store.placed_bytes.remote()))
    return result(info)


def result(refs: Any) -> Any:
    """ray.get, with errors as they were raised rather than as Ray wraps them."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, USER_ERRORS):
            raise cause from None
        raise
    except RayActorError as error:
        name = getattr(error, "actor_class_name", None) or "an actor"
        raise RuntimeError(f"{name} died {CALL_RETRIES + 1} times during one call; the last time: {error}") from None
