"""`run`: answers every row of a data set with the model, its experts under a budget, and leaves the evidence beside the answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from pipeline.actors import Actors, open_store, start_store, with_predictor
from pipeline.cluster import cluster
from pipeline.config import Config
from pipeline.data import Batch
from pipeline.driver import overlapping, run_batches
from pipeline.losses import Loss, Told, loss_metrics
from pipeline.machines import ANSWER_S, Machine, Machines, Wanted
from pipeline.parallel.actors import SharedExperts
from pipeline.parallel.sharing import check_sharing
from pipeline.predicting.watch import Watch
from pipeline.prepare import Prepared, check_predictor, made_stand_ins, prepare
from pipeline.progress import bar
from pipeline.regroup import Grouping, Regrouping
from pipeline.reports.evidence import pictures, run_metrics
from pipeline.reports.live import Live
from pipeline.reports.metrics import (
    stats_of,
)
from pipeline.reports.output import PREDICTIONS, InOrder, OutputDir, check_writable
from pipeline.reports.said import mb, say, say_plan, say_results
from pipeline.tasks.generate import Generate
from pipeline.tasks.speaker import Speaker
from predictor.actor import Prediction
from store.actor import ArenaInfo, ExpertStore
from store.arena import remove_unfinished

PATIENCE_S = 5.0
"""How long the arena's removal waits for the Executor's process to end."""


def run(config: Config) -> dict[str, Any]:
    """Runs a config, resuming what a killed run left in its output directory; returns what metrics.json holds.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    prepared = prepare(config)
    check_predictor(prepared)  # before the directory is made: what is refused leaves nothing behind
    check_sharing(prepared)
    if config.trace.save is not None:
        check_writable(Path(config.trace.save), "trace.save")
    output = OutputDir(config)
    try:
        journal = output.unfinished(prepared.identity)
        entries = [entry for entry in journal if "batch" in entry]
        groupings = {entry["window"]: entry["rows"] for entry in journal if "window" in entry}
        losses = [Loss(**entry["loss"]) for entry in journal if "loss" in entry]
        say_plan(prepared, entries)
        with _removed_without_ray(prepared) as begun, cluster(config.cluster.address, several=config.cluster.nodes != 1):
            begun.set()
            store = start_store(prepared.arena, prepared.model.source, prepared.model.placement)
            actors = machines = group = None
            try:
                arena = _open(store, prepared)
                predictor = prepared.predictor_spec(arena.identity, made_stand_ins(prepared))
                here = prepared.predictor_device == "executor"
                spec = prepared.executor_spec()
                shared = config.parallel.placement is not None
                count = 0 if shared else config.executors
                actors = Actors.start(spec, predictor, arena, threads=1, here=here, executors=count)
                wanted = Wanted(
                    with_predictor(spec, predictor, here),
                    arena.path,
                    prepared.model.source,
                    prepared.model.placement,
                    config.executors,
                )
                actors.ready()
                if not entries:
                    output.start_anew(prepared.identity)

                live = Live()

                def lost(loss: Loss) -> None:
                    losses.append(loss)
                    live.lost(loss.what)
                    output.add({"loss": loss.to_dict()})

                if entries:
                    lost(Loss("driver", "this command"))
                machines = Machines(actors, Machine.own(store, arena), wanted, config.cluster.nodes, tqdm.write, lost)
                watch = Watch(prepared, output.path, predictor)
                if shared:
                    group = SharedExperts(prepared, actors, arena.identity, lost)
                entries = _execute(actors, group, prepared, output, entries, groupings, watch, live, lost)
                if group is not None:
                    group.close()
                actors.finish()
            finally:
                _stop(store, actors, group, machines, config.store.keep)
        watch.finish(entries)
        metrics = run_metrics(prepared, entries, arena)
        metrics["prediction"]["drift"] = watch.drifted
        metrics |= {"lost": loss_metrics(losses), "machines": machines.used}
        metrics["parallel"] = group.metrics(stats_of(entries)) if group is not None else None
        for name, text in pictures(prepared, entries, metrics).items():
            output.write(name, text)
        output.finish(metrics)
    finally:
        output.abandon()
    say_results(metrics, output.path)
    return metrics


@contextlib.contextmanager
def _removed_without_ray(prepared: Prepared) -> Iterator[threading.Event]:
    """Whoever ends this process may end Ray's at once, as `timeout` and systemd do, and then no store has removed its arena.

    Yields what is to be set before there is a store: one that was kept by another run is not for this one to remove.
    """
    begun = threading.Event()
    try:
        yield begun
    except BaseException:
        if begun.is_set():
            model = prepared.model
            with contextlib.suppress(OSError):  # what has happened says more than what cannot be removed
                remove_unfinished(prepared.arena, PATIENCE_S)
                ExpertStore(prepared.arena, model.source, model.placement).close(prepared.config.store.keep, PATIENCE_S)
        raise


def _stop(store: Any, actors: Actors | None, group: SharedExperts | None, machines: Machines | None, keep: bool) -> None:
    """Ends the actors and gives the arenas up. Never raises: it may run because Ray itself has gone."""

    def close() -> None:
        if machines is not None:
            machines.close(keep, PATIENCE_S)
            return
        ray.get(store.close.remote(keep, PATIENCE_S), timeout=PATIENCE_S + ANSWER_S)
        ray.kill(store)

    for end in (group.stop if group is not None else None, actors.stop if actors is not None else None, close):
        if end is not None:
            with contextlib.suppress(RayError):  # of each: the others have something to end, too
                end()


def _open(store: Any, prepared: Prepared) -> ArenaInfo:
    with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:

        def progress(nbytes: int) -> None:
            shown.update(nbytes - shown.n)

        arena = open_store(store, progress)
    how = "attached a warm arena" if arena.warm_start else "built the arena"
    say(f"{how}: {arena.path} ({mb(arena.nbytes)}) in {arena.seconds:.3f} s")
    return arena


def _execute(
    actors: Actors,
    group: SharedExperts | None,
    prepared: Prepared,
    output: OutputDir,
    entries: list[dict[str, Any]],
    groupings: dict[int, Grouping],
    watch: Watch,
    live: Live,
    lost: Told,
) -> list[dict[str, Any]]:
    """Runs the batches that the journal does not have yet; returns the journal's entries of all.

    Under hash routing a second pass asks the model's own routers, to say how far the answers are from exact.
    """
    config, batches = prepared.config, prepared.batches
    passes = [(config.routing, batches)]
    if config.routing == "hash":
        passes.append(("exact", [Batch(b.index + len(batches), b.rows, b.tokens, b.targets) for b in batches]))
    done = {entry["batch"] for entry in entries}

    def decided(window: int, rows: Grouping) -> None:
        output.add({"window": window, "rows": rows})

    predictions = InOrder(output.path / PREDICTIONS)
    for entry in entries:
        if entry["batch"] < len(batches):
            predictions.add(entry["results"])
    for number, (routing, todo) in enumerate(passes):
        left = [batch for batch in todo if batch.index not in done]
        work: Iterable[tuple[Batch, Prediction | None]] = ((batch, None) for batch in left)
        if config.batch.order == "overlap":
            work = overlapping(actors, todo, Regrouping(config.batch, prepared.model.shape, routing), done, groupings, decided)
        label = f"{routing} routing" if number == 0 else "exact routing, to compare"
        with bar(label, len(prepared.rows)) as shown:
            shown.update(len(prepared.rows) - sum(len(batch.rows) for batch in left))
            last, spent = time.perf_counter(), time.thread_time()
            speaker = Speaker(prepared.task) if number == 0 and isinstance(prepared.task, Generate) else None
            listen = speaker.listen if speaker is not None and config.executors == 1 else None  # of two at once nobody could read
            if group is not None:
                results = group.run(work, routing)
            else:
                results = run_batches(actors, work, routing, prepared.slots, config.predictor.lookahead, listen, lost)
            for item in results:
                if speaker is not None:
                    speaker.finish(item.results)
                now, own = time.perf_counter(), time.thread_time()
                entry = item.to_dict() | {"seconds": now - last, "driver_ms": 1e3 * (own - spent)}
                last, spent = now, own
                watch.saw(item)
                live.saw(item.stats, len(item.results))
                output.add(entry)
                entries.append(entry)
                shown.update(len(item.results))
                if number == 0:
                    predictions.add(item.results)
    predictions.close()
    return entries
