"""`bench`: systems side by side on one workload, in turn, in one sitting; bench.json has what came out.

For every batch size the workload is recorded once: what its routers decide, and what transformers answers in float32. Then every
system answers the same batches, round after round, all systems in one round before the next begins. A time counts only beside the
error of the same answers.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.batch_result import BatchStats
from pipeline.bench.decoding import bench_decoding
from pipeline.bench.limit import link_bytes_per_second
from pipeline.bench.output import BenchDir
from pipeline.bench.report import draw, markdown
from pipeline.bench.rows import Measured, Yardsticks, line, ray_over_in_process, rows_of
from pipeline.bench.systems import SYSTEMS, Bench, check_systems
from pipeline.bench.workload import Combination, Workload, mapped, record_workload
from pipeline.config import Config
from pipeline.errors import StandInsError
from pipeline.garbage import spared
from pipeline.machine import hardware
from pipeline.prepare import Prepared, check_predictor, choose_device, prepare
from pipeline.progress import bar
from pipeline.reports.metrics import versions
from pipeline.reports.said import mb, said_of, say
from pipeline.reports.timeline import timeline
from store.actor import ArenaInfo, ExpertStore
from store.slots import parse_budget, parse_bytes

WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}
"""Not counted: slots are filled; on a GPU kernels are compiled, and every shape's graphs recorded when it is seen again."""
FEW_BYTES = 10**12
"""For a budget's place among others, whatever the model's size."""
TIMELINE_BATCHES = 64
"""No more in a timeline than can be looked at."""


def bench(config: Config) -> dict[str, Any]:
    """Runs `bench.rounds` rounds of every system, after some that do not count, for every batch size and budget.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    if config.task == "generate":
        return bench_decoding(config)
    device = choose_device(config.device)
    check_systems(config, device)
    if device == "cpu" and {"transformers", "cpu"} <= {*config.bench.systems}:
        print("cpu is left out: on this device it is what transformers is")
        config = replace(config, bench=replace(config.bench, systems=[name for name in config.bench.systems if name != "cpu"]))
    first = _first(config)
    for budget in config.bench.budgets:
        parse_budget(budget, first.layout.expert_bytes, first.layout.slot_bytes, first.layout.nbytes, "bench.budgets")
    if config.predictor.path is not None:
        check_predictor(first)
    threads = torch.get_num_threads()
    with BenchDir(config) as output:
        store = ExpertStore(first.arena, first.model.source, first.model.placement)
        try:
            with bar("placing experts", first.layout.nbytes, unit="B") as shown:
                arena = store.open(shown.update)
            say(f"{mb(arena.nbytes)} of weights placed in {arena.seconds:.1f} s")
            report = _bench(first.config, first, arena, output)
        finally:
            store.close(config.store.keep)
            torch.set_num_threads(threads)
        if report["ray_over_in_process"] is not None:
            ratio = report["ray_over_in_process"]
            print(f"Ray's pipeline has {ratio['median']:.1%} of the throughput of direct calls (rounds: {ratio['rounds']})")
        for path in [output.path / "bench.json", output.path / "bench.md", *draw(report, output.path)]:
            print(f"wrote {path}")
    return report


def _bench(config: Config, first: Prepared, arena: ArenaInfo, output: BenchDir) -> dict[str, Any]:
    report: dict[str, Any] = {
        "hardware": hardware(first.device),
        "versions": versions(),
        "link_gb_per_s": None,
        "arena": {"bytes": arena.nbytes, "warm_start": arena.warm_start, "seconds": round(arena.seconds, 3)},
        "expert_bytes": first.layout.expert_bytes,
        "backbone_bytes": first.layout.backbone_bytes,
        "ray_over_in_process": None,
        "rows": [],
    }
    if first.stand_ins is not None:
        say(f"the rehearsal's stand-ins: {said_of(first.stand_ins)}")
    link = _link(first) if first.device != "cpu" else None
    report["link_gb_per_s"] = round(link / 1e9, 2) if link else None
    for size in config.bench.batch_sizes or [config.batch.size]:
        prepared = prepare(replace(config, batch=replace(config.batch, size=size)))
        prepared = replace(prepared, batches=prepared.batches[: config.bench.batches])
        say(f"batches of {size}: recording the routing of {len(prepared.batches)}, and what transformers answers")
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            workload = record_workload(prepared, arena, Path(directory))
            say(f"batches of {size}: recorded in {time.perf_counter() - start:.1f} s")
            for row in _measure(workload, link, output):
                report["rows"].append(row)
                report["ray_over_in_process"] = ray_over_in_process(report["rows"])
                say(line(row))
                output.write_report(report)
                output.write("bench.md", markdown(report))
    return report


def _first(config: Config) -> Prepared:
    """Prepared; a rehearsal's stand-ins are those of the smallest budget that has room for them, and the same in all rows."""
    if config.predictor.kind != "rehearsal" or not config.bench.budgets:
        return prepare(config)
    sizes = {budget: parse_bytes(budget, FEW_BYTES, FEW_BYTES, "bench.budgets") for budget in config.bench.budgets}
    for budget in sorted(filter(sizes.get, sizes), key=lambda budget: sizes[budget]):
        with contextlib.suppress(StandInsError):
            return prepare(replace(config, store=replace(config.store, budget=budget)))
    return prepare(config)


def _fits(workload: Workload, given: Combination) -> bool:
    """Whether there is room beside the stand-ins; if not, that is said."""
    try:
        given.slots(workload)
    except StandInsError as error:
        say(f"{given.system} ({given.predictor}) at {given.budget} is left out: {error}")
        return False
    return True


def _link(prepared: Prepared) -> float:
    with mapped(prepared) as arena:
        return link_bytes_per_second(arena.memory, prepared.layout.slot_bytes, torch.device(prepared.device))


def _measure(workload: Workload, link: float | None, output: BenchDir) -> Iterator[dict[str, Any]]:
    """Rows of one batch size. Those that know no budget take their turns with the first budget's."""
    config = workload.prepared.config
    yardsticks = Yardsticks(link)
    for number, budget in enumerate(config.bench.budgets or [config.store.budget]):
        combinations = [
            combination
            for name in config.bench.systems
            for combination in SYSTEMS[name].combinations(workload, name, budget)
            if number == 0 or SYSTEMS[name].has_budget
        ]
        combinations = [one for one in combinations if _fits(workload, one)]
        if not combinations:  # none of them knows a budget, or none fits this one
            continue
        measured = _take_turns(workload, budget, combinations)
        for one in measured:
            if one.combination.system == "sida":
                one.timeline = _timeline_name(workload, one.combination)
                output.write(one.timeline, timeline(_in_one_lane(one.passes[-1].stats[:TIMELINE_BATCHES])))
        yardsticks = yardsticks.learned(workload, measured)
        yield from rows_of(workload, measured, yardsticks)


def _take_turns(workload: Workload, budget: str, combinations: list[Combination]) -> list[Measured]:
    """Sets all up, runs them in turn, takes all down. Says so: all this can take minutes, and its rows come at the end."""
    what, start = f"batches of {workload.batch_size}, {budget}", time.perf_counter()
    say(f"{what}: setting up {', '.join(dict.fromkeys(one.system for one in combinations))}")
    rounds = workload.prepared.config.bench.rounds
    warm_up = WARM_UP_ROUNDS[torch.device(workload.prepared.device).type]
    measured = []
    with _benches(workload, combinations) as benches:
        say(f"{what}: set up in {time.perf_counter() - start:.1f} s; rounds to warm up: {warm_up}, to measure: {rounds}")
        measured = [Measured(combination) for combination in combinations]
        turns = [(number, which) for number in range(-warm_up, rounds) for which in _order(len(benches), number)]
        with spared():
            for number, which in tqdm(turns, desc=f"batches of {workload.batch_size}", leave=False, disable=None):
                done = benches[which].run(workload.batches)
                if number >= 0:
                    measured[which].passes.append(done)
        for one, each in zip(measured, benches, strict=True):
            one.device_memory_peak_bytes = each.device_memory_peak_bytes
    say(f"{what}: done in {time.perf_counter() - start:.1f} s")
    return measured


def _order(count: int, number: int) -> list[int]:
    """Who goes first changes from round to round."""
    return [(i + number) % count for i in range(count)]


@contextmanager
def _benches(workload: Workload, combinations: list[Combination]) -> Iterator[list[Bench]]:
    benches: list[Bench] = []
    try:
        for combination in combinations:
            benches.append(Bench(combination, workload))
        yield benches
    finally:
        for each in reversed(benches):
            each.close()


def _timeline_name(workload: Workload, given: Combination) -> str:
    parts = (given.system, workload.batch_size, given.budget, given.predictor)
    return "-".join(["timeline", *(re.sub(r"[^\w.]+", "-", str(part)).strip("-") for part in parts)]) + ".json"


def _in_one_lane(stats: list[BatchStats]) -> list[BatchStats]:
    """The tables were made before the rounds and handed over several at once; here each is made as late as one predictor could."""
    moved, latest = [], 2**63
    for s in reversed(stats):
        span = s.predict_span
        if span is not None:
            end = min(span[1], latest)
            latest = end - (span[1] - span[0])
            span = [latest, end]
        moved.append(replace(s, predict_span=span))
    return moved[::-1]
