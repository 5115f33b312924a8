"""One Executor against several of one machine: the same batches through both, in turn; links and host memory beside it.

    python -m pipeline.bench.executors CONFIG.yaml [key.path=value ...] [-- key.path=value ...]

takes `executors`, `bench.budgets`, `bench.batches` and `bench.rounds` from the config. Each `--` begins a workload: what differs in
it from the config, its budgets too. A round is `bench.batches` batches, the data over again where it has fewer; it must be long,
since at its end the Executors wait for the one that ends last. Tables are the true ones, made before, so that nobody waits
for a predictor. What several GPUs can give that share a machine is measured first: what their links carry at once, and alone.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pipeline.actors import Actors, gpus_here, result, start_executors
from pipeline.batch_result import BatchResult
from pipeline.bench.links import links
from pipeline.bench.whole import numbers
from pipeline.cluster import cluster
from pipeline.config import load_config
from pipeline.data import Batch
from pipeline.driver import run_batches
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.machine import hardware
from pipeline.prepare import Prepared, prepare
from pipeline.reports.metrics import batch_metrics, versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from predictor import traces
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle
from store.actor import ExpertStore
from store.slots import parse_budget

WARM_UPS = {"cpu": 1, "cuda": 2}
"""So often each Executor has every batch before the rounds: on a GPU a shape is recorded when it comes for the second time."""
COMPUTING, MOVING = 1.95, 0.95
"""What is aimed at: throughput over one Executor's where every expert has a slot; elsewhere, over the links' own ratio."""


def arena_memory(path: Path, pids: list[int]) -> int:
    """Bytes of RAM that the arena takes in these processes together: a page that several map counts once."""
    kilobytes = 0.0
    for pid in pids:
        inside = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if "-" in line.split(" ", 1)[0] and not line.split(" ", 1)[0].endswith(":"):
                inside = line.endswith(str(path))
            elif inside and line.startswith("Pss:"):
                kilobytes += float(line.split()[1])
    return int(kilobytes * 1024)


class Sitting:
    """Executors of one budget, and rounds through the first of them and through all."""

    def __init__(self, prepared: Prepared, budget: str, count: int, say: Any):
        layout = prepared.layout
        self.slots = parse_budget(budget, layout.expert_bytes, layout.slot_bytes, layout.nbytes)
        spec = replace(prepared.executor_spec(), slots=self.slots)
        self._executors: list[Any] = []
        self.arena_bytes: dict[int, int] = {}
        for many in (1, count):
            here = len(self._executors)
            self._executors += start_executors(spec, many - here, here)
            pids = result([executor.ready.remote() for executor in self._executors])
            result([executor.execute.remote(prepared.batches[0], None) for executor in self._executors[here:]])  # read some of it
            self.arena_bytes[many] = arena_memory(prepared.arena, [os.getpid(), *pids])
            say(f"budget {budget}: {self.slots} slots; {many} of {count} Executors are ready")
        self._next = len(prepared.batches)

    def tables(self, prepared: Prepared) -> list[Prediction]:
        """The true ones."""
        shape = prepared.model.shape
        recorded = [result(self._executors[0].trace.remote(batch, shape.top_k)) for batch in prepared.batches]
        oracle = Oracle(traces.join(recorded), shape, shape.top_k)
        return [timed(oracle, batch.tokens) for batch in prepared.batches]

    def warm_up(self, prepared: Prepared, tables: list[Prediction]) -> None:
        """Every Executor, all at once, by itself."""
        times = WARM_UPS[torch.device(prepared.device).type]

        def through(executor: Any, work: list[tuple[Batch, Prediction]]) -> None:
            for _ in run_batches(Actors(None, [executor]), work, "exact", self.slots, prepared.config.predictor.lookahead):
                pass

        works = [list(self._numbered(prepared, tables, times * len(tables))) for _ in self._executors]
        with ThreadPoolExecutor(len(works)) as threads:
            list(threads.map(through, self._executors, works))

    def round(self, prepared: Prepared, tables: list[Prediction], count: int) -> tuple[float, float, list[BatchResult]]:
        """Seconds, those that this thread computed, and the answers in the order of the batches."""
        config = prepared.config
        work = list(self._numbered(prepared, tables, config.bench.batches or len(tables)))
        actors = Actors(None, self._executors[:count])
        start, own = time.perf_counter(), time.thread_time()
        done = list(run_batches(actors, work, "exact", self.slots, config.predictor.lookahead))
        seconds, own = time.perf_counter() - start, time.thread_time() - own
        return seconds, own, sorted(done, key=lambda one: one.batch)

    def _numbered(self, prepared: Prepared, tables: list[Prediction], count: int) -> Iterator[tuple[Batch, Prediction]]:
        """So many batches, the same ones over again, each under a number that no other has had."""
        for batch, table in islice(cycle(zip(prepared.batches, tables, strict=True)), count):
            yield replace(batch, index=self._next), table
            self._next += 1

    def close(self) -> None:
        result([executor.close.remote() for executor in self._executors])
        for executor in self._executors:
            ray.kill(executor)


def measure(sitting: Sitting, prepared: Prepared, count: int, aim: float | None) -> dict[str, Any]:
    """One workload: rounds through one Executor and through all, in turn."""
    config, tables = prepared.config, sitting.tables(prepared)
    sitting.warm_up(prepared, tables)
    times: dict[int, list[float]] = {1: [], count: []}
    driver: dict[int, list[float]] = {1: [], count: []}
    stats: dict[int, list[Any]] = {1: [], count: []}
    answers: dict[int, list[np.ndarray]] = {}
    for number in range(config.bench.rounds):
        for many in (1, count) if number % 2 else (count, 1):
            seconds, own, done = sitting.round(prepared, tables, many)
            answers[many] = [numbers(one.results) for one in done]
            times[many].append(seconds)
            driver[many].append(own)
            stats[many] += [one.stats for one in done]
    batches, rows = len(answers[1]), sum(map(len, answers[1]))
    summed = {many: batch_metrics(stats[many], rows, statistics.median(times[many])) for many in times}
    largest = max(float(np.abs(a).max()) for a in answers[1])
    apart = max(float(np.abs(a - b).max()) for a, b in zip(answers[1], answers[count], strict=True))
    ratios = [one / many for one, many in zip(times[1], times[count], strict=True)]
    used = summed[1]["experts_used_per_layer"]

    def ms_per_batch(seconds: dict[int, list[float]]) -> dict[str, float]:
        return {str(n): round(1e3 * statistics.median(each) / batches, 3) for n, each in seconds.items()}

    return {
        "workload": config.data.path,
        "batch": config.batch.size,
        "batches": batches,
        "tokens": sum(one.tokens for one in stats[1]) // config.bench.rounds,
        "experts_used_per_layer": round(sum(used) / len(used), 1),
        "ms_per_batch": ms_per_batch(times),
        "driver_ms_per_batch": ms_per_batch(driver),
        "throughput_ratio": {"median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 3) for ratio in ratios]},
        "aim": aim,
        "moves": {str(n): summed[n]["moves"] // config.bench.rounds for n in times},
        "hit_rate": {str(n): summed[n]["hit_rate"] for n in times},
        "batches_of_each": [one["batches"] for one in summed[count]["executors"]],
        "graphs": {str(n): summed[n]["graphs"] for n in times},
        "largest_difference_of_answers": apart / max(1.0, largest),
    }


def described(row: dict[str, Any]) -> str:
    """A line for people: the ratio beside its aim."""
    ratio, aim, ms = row["throughput_ratio"]["median"], row["aim"], list(row["ms_per_batch"].values())
    judged = "" if aim is None else f" (aim {aim:.3f}: {'met' if ratio >= aim else 'missed'})"
    return (
        f"{row['budget']} {row['workload']} batches of {row['batch']}: {ms[0]:.2f} -> {ms[1]:.2f} ms, {ratio:.3f} x{judged}; "
        f"the driver {row['driver_ms_per_batch']} ms"
    )


def main(arguments: list[str]) -> int:
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", flush=True)

    groups: list[list[str]] = [[]]
    for argument in arguments[1:]:
        groups.append([]) if argument == "--" else groups[-1].append(argument)
    common, workloads = groups[0], groups[1:] or [[]]
    configs = [load_config(Path(arguments[0]), [*common, *own]) for own in workloads]
    config, count = configs[0], configs[0].executors
    if count < 2:
        raise ConfigError(f"executors: {count}; this sets one against several: write executors=2")
    first = prepare(config)
    report: dict[str, Any] = {
        "hardware": hardware(first.device),
        "versions": versions(),
        "executors": count,
        "expert_bytes": first.layout.expert_bytes,
        "arena": {},
        "links": None,
        "rows": [],
    }
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        write_whole(output / "executors.json", json.dumps(report, indent=1) + "\n")

    store = ExpertStore(first.arena, first.model.source, first.model.placement)
    try:
        info = store.open()
        report["arena"] = {"bytes": info.nbytes, "seconds": round(info.seconds, 2), "in_memory": {}}
        say(f"{report['hardware']}; arena of {info.nbytes / 1e9:.2f} GB in {info.seconds:.1f} s")
        with cluster(config.cluster.address):
            say("Ray is up")
            if first.device != "cpu":
                if gpus_here() < count:  # it would wait for them
                    raise ConfigError(f"executors: {count} take {count} GPUs, and this Ray has {gpus_here()} to give here")
                report["links"] = links(first.arena, first.layout.slot_bytes, count)
                say(f"links: {report['links']}")
            write()
            wanted = [one.bench.budgets or [one.store.budget] for one in configs]
            for budget in dict.fromkeys(budget for own in wanted for budget in own):
                sitting = Sitting(first, budget, count, say)
                report["arena"]["in_memory"][budget] = {str(n): nbytes for n, nbytes in sitting.arena_bytes.items()}
                every = sitting.slots >= sum(layer.experts for layer in first.layout.layers)
                aim = None if report["links"] is None else COMPUTING if every else round(MOVING * report["links"]["ratio"], 3)
                for one in (one for one, own in zip(configs, wanted, strict=True) if budget in own):
                    prepared = prepare(one)
                    prepared = replace(prepared, batches=prepared.batches[: one.bench.batches])
                    row = {"budget": budget, "slots": sitting.slots} | measure(sitting, prepared, count, aim)
                    report["rows"].append(row)
                    write()
                    say(described(row))
                sitting.close()
                memory = sitting.arena_bytes
                say(f"budget {budget}: the arena in memory: {memory}, {memory[count] / memory[1]:.4f} times one's")
                write()
    finally:
        store.close(config.store.keep)
    print(f"wrote {output / 'executors.json'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(stoppable(lambda: main(sys.argv[1:])))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
