"""How near `plan` is to a run: `python -m pipeline.plan.beside_run CONFIG.yaml [key.path=value ...]`

Records the routing of `bench.batches` batches, plans from that record as `plan` does, and runs the same batches on the model
itself, under every budget of `bench.budgets`: a round of the one, a round of the other, `bench.rounds` times each. The run is
the bench's `sida` in one process, so that a machine without Ray can be asked; tables are true and known beforehand on both
sides. Writes beside_run.json after every budget, so that a sitting which is cut short has not been for nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bench.in_process import InProcess
from pipeline.bench.workload import Combination, Workload, record_batches
from pipeline.config import Config, load_config
from pipeline.errors import USER_ERRORS
from pipeline.machine import hardware
from pipeline.plan.command import pace_of
from pipeline.plan.expected import Routed, expect
from pipeline.plan.footprint import footprint
from pipeline.plan.link import measure
from pipeline.plan.recorded import Recorded
from pipeline.plan.trial import WARM_UP, Trial, scratch
from pipeline.prepare import Prepared, prepare
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from predictor import traces
from predictor.actor import timed
from predictor.baselines import Oracle
from store.actor import ArenaInfo, ExpertStore

ORACLE = "oracle"


def compare(config: Config) -> dict[str, Any]:
    """
    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    began = time.perf_counter()
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"config": config.to_dict(), "rows": []}
    first = prepare(config)
    report |= {"hardware": hardware(first.device), "versions": versions()}
    store = ExpertStore(first.arena, first.model.source, first.model.placement)
    try:
        arena = store.open()
        _say(began, f"arena: {arena.nbytes} bytes in {arena.seconds:.1f} s")
        for size in config.bench.batch_sizes or [config.batch.size]:
            for row in _of_size(replace(config, batch=replace(config.batch, size=size)), arena, began):
                report["rows"].append(row)
                write_whole(output / "beside_run.json", json.dumps(report, indent=1) + "\n")
    finally:
        store.close(config.store.keep)
    for row in report["rows"]:
        print(
            f"batch {row['batch']:>3}  {row['budget']:>5}  planned {row['planned']:>9.2f}/s  run {row['run']:>9.2f}/s  "
            f"ratio {row['planned'] / row['run']:.3f}  rounds {row['ratios']}"
        )
    print(f"wrote {output / 'beside_run.json'}")
    return report


def _of_size(config: Config, arena: ArenaInfo, began: float) -> Iterator[dict[str, Any]]:
    prepared = prepare(config)
    prepared = replace(prepared, batches=prepared.batches[: config.bench.batches])
    known = footprint(config)
    link = measure(known.directory, known.layout.slot_bytes, known.device)
    workload, recorded = _recorded(prepared, arena)
    _say(began, f"batches of {config.batch.size}: {len(recorded.batches)} recorded; link {(link or 0) / 1e9:.1f} GB/s")
    samples = recorded.routed.samples / len(recorded.batches)
    measured: dict[str, tuple[int, list[float], list[float]]] = {}
    with scratch(known) as path:
        assert path is not None, "there is room for the model, and none for a few blocks"
        for budget in config.bench.budgets:
            given = Combination("sida", budget, ORACLE)
            slots = given.slots(workload)
            spec = replace(workload.executor_spec(given), policy=config.store.policy)
            with (
                closing(Trial(known, prepared.task, recorded, path, slots, config.store.policy, config.routing)) as trial,
                _running(InProcess(workload, given, spec)) as run,
            ):
                measured[budget] = slots, *_in_turn(trial, run, workload, config.bench.rounds)
            _say(began, f"batches of {config.batch.size}, {budget}: tried {measured[budget][1]}, run {measured[budget][2]}")
    points = [(slots, statistics.median(tried)) for slots, tried, _ in measured.values()]
    pace = pace_of(config.store.policy, recorded, points, known, link)
    for budget, (slots, tried, ran) in measured.items():
        expected = expect(recorded.routed, budget, slots, config.store.policy, pace)
        assert expected.samples_per_second is not None
        yield {
            "batch": config.batch.size,
            "budget": budget,
            "slots": slots,
            "tried": round(samples / statistics.median(tried), 3),
            "planned": round(expected.samples_per_second, 3),
            "run": round(samples / statistics.median(ran), 3),
            "ratios": [round(theirs / own, 3) for own, theirs in zip(tried, ran, strict=True)],
            "tried_ms": [round(seconds * 1e3, 3) for seconds in tried],
            "run_ms": [round(seconds * 1e3, 3) for seconds in ran],
            "moves_planned_per_batch": round(expected.moves / len(recorded.batches), 2),
        }


def _in_turn(trial: Trial, run: InProcess, workload: Workload, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per batch of each, round by round."""
    tried, ran = [], []
    warm_up = WARM_UP[torch.device(workload.prepared.device).type]
    for number in range(-warm_up, rounds):
        of_trial = trial.round()
        of_run = run.run(workload.batches).seconds / len(workload.batches)
        if number >= 0:
            tried.append(of_trial)
            ran.append(of_run)
    return tried, ran


def _recorded(prepared: Prepared, arena: ArenaInfo) -> tuple[Workload, Recorded]:
    shape = prepared.model.shape
    parts = record_batches(prepared)
    oracle = Oracle(traces.join(parts), shape, shape.top_k)
    tables = [timed(oracle, batch.tokens) for batch in prepared.batches]
    uses = [[np.unique(layer.top[:, : shape.top_k]).tolist() for layer in part.layers] for part in parts]
    samples = sum(len(batch.rows) for batch in prepared.batches)
    lookahead = prepared.config.predictor.lookahead
    routed = Routed(samples, shape.experts, uses, [table.table.uses for table in tables], lookahead)
    seconds = sum(table.end - table.start for table in tables) / 1e9
    recorded = Recorded(prepared.batches, parts, routed, "the true tables", seconds)
    return Workload(prepared, arena, Path(), {ORACLE: tables}, {}, [], []), recorded


@contextmanager
def _running(system: InProcess) -> Iterator[InProcess]:
    try:
        yield system
    finally:
        system.close()


def _say(began: float, text: str) -> None:
    print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, as runner.py's."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.plan.beside_run", description="How near plan is to a run.")
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="model and data; bench.batch_sizes, budgets, batches, rounds"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the config")
    options = parser.parse_args(arguments)
    try:
        compare(load_config(options.config, options.overrides))
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(main))
