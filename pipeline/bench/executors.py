"""One Executor against several of one machine: the same batches through both, in turn; links and host memory beside it.

    python -m pipeline.bench.executors CONFIG.yaml [key.path=value ...] [-- key.path=value ...]

takes `executors`, `bench.budgets`, `bench.batches` and `bench.rounds` from the config. Each `--` begins a workload: what differs in
it from the config. Tables are the true ones, made before, so that nobody waits for a predictor. What several GPUs can give that
share a machine is measured first: what their links carry at once, and alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pipeline.actors import Actors, result, start_executors
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
from predictor import traces
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle
from store.actor import ExpertStore
from store.slots import parse_budget

WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}


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
        self._executors = start_executors(spec, 1)
        self._pids = result([self._executors[0].ready.remote()])
        self._warm(prepared, 1)
        self.arena_bytes = {1: arena_memory(prepared.arena, self._pids)}
        say(f"budget {budget}: {self.slots} slots; one Executor is ready")
        self._executors += start_executors(spec, count - 1, 1)
        self._pids = result([executor.ready.remote() for executor in self._executors])
        self._warm(prepared, count)
        self.arena_bytes[count] = arena_memory(prepared.arena, self._pids)
        say(f"budget {budget}: {count} Executors are ready")
        self._next = len(prepared.batches)

    def _warm(self, prepared: Prepared, count: int) -> None:
        """Every Executor has read some of the arena."""
        batch = prepared.batches[0]
        result([executor.execute.remote(batch, None) for executor in self._executors[:count]])

    def tables(self, prepared: Prepared) -> list[Prediction]:
        """The true ones."""
        shape = prepared.model.shape
        recorded = [result(self._executors[0].trace.remote(batch, shape.top_k)) for batch in prepared.batches]
        oracle = Oracle(traces.join(recorded), shape, shape.top_k)
        return [timed(oracle, batch.tokens) for batch in prepared.batches]

    def round(self, prepared: Prepared, tables: list[Prediction], count: int) -> tuple[float, list[BatchResult]]:
        """Seconds, and the answers in the order of the batches."""
        batches: list[Batch] = [replace(b, index=self._next + i) for i, b in enumerate(prepared.batches)]
        self._next += len(batches)
        actors, lookahead = Actors(None, self._executors[:count]), prepared.config.predictor.lookahead
        start = time.perf_counter()
        done = list(run_batches(actors, zip(batches, tables, strict=True), "exact", self.slots, lookahead))
        seconds = time.perf_counter() - start
        return seconds, sorted(done, key=lambda one: one.batch)

    def close(self) -> None:
        result([executor.close.remote() for executor in self._executors])
        for executor in self._executors:
            ray.kill(executor)


def measure(sitting: Sitting, prepared: Prepared, count: int) -> dict[str, Any]:
    """One workload: rounds through one Executor and through all, in turn."""
    config, tables = prepared.config, sitting.tables(prepared)
    times: dict[int, list[float]] = {1: [], count: []}
    stats: dict[int, list[Any]] = {1: [], count: []}
    answers: dict[int, list[np.ndarray]] = {}
    for number in range(-WARM_UP_ROUNDS[torch.device(prepared.device).type], config.bench.rounds):
        for many in (1, count) if number % 2 else (count, 1):
            seconds, done = sitting.round(prepared, tables, many)
            answers[many] = [numbers(one.results) for one in done]
            if number >= 0:
                times[many].append(seconds)
                stats[many] += [one.stats for one in done]
    rows = sum(len(batch.rows) for batch in prepared.batches)
    summed = {many: batch_metrics(stats[many], rows, statistics.median(times[many])) for many in times}
    largest = max(float(np.abs(a).max()) for a in answers[1])
    apart = max(float(np.abs(a - b).max()) for a, b in zip(answers[1], answers[count], strict=True))
    ratios = [one / many for one, many in zip(times[1], times[count], strict=True)]
    used = summed[1]["experts_used_per_layer"]
    return {
        "workload": config.data.path,
        "batch": config.batch.size,
        "batches": len(prepared.batches),
        "experts_used_per_layer": round(sum(used) / len(used), 1),
        "ms_per_batch": {str(n): round(1e3 * statistics.median(t) / len(prepared.batches), 3) for n, t in times.items()},
        "throughput_ratio": {"median": round(statistics.median(ratios), 3), "rounds": [round(ratio, 3) for ratio in ratios]},
        "moves": {str(n): summed[n]["moves"] // config.bench.rounds for n in times},
        "hit_rate": {str(n): summed[n]["hit_rate"] for n in times},
        "batches_of_each": [one["batches"] for one in summed[count]["executors"]],
        "graphs": summed[count]["graphs"],
        "largest_difference_of_answers": apart / max(1.0, largest),
    }


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
                report["links"] = links(first.arena, first.layout.slot_bytes, count)
                say(f"links: {report['links']}")
            write()
            for budget in config.bench.budgets or [config.store.budget]:
                sitting = Sitting(first, budget, count, say)
                report["arena"]["in_memory"][budget] = {str(n): nbytes for n, nbytes in sitting.arena_bytes.items()}
                for one in configs:
                    prepared = prepare(one)
                    prepared = replace(prepared, batches=prepared.batches[: one.bench.batches])
                    row = {"budget": budget, "slots": sitting.slots} | measure(sitting, prepared, count)
                    report["rows"].append(row)
                    write()
                    say(json.dumps(row))
                sitting.close()
                memory = sitting.arena_bytes
                say(f"budget {budget}: the arena in memory: {memory}, {memory[count] / memory[1]:.4f} times that of one")
                write()
    finally:
        store.close(config.store.keep)
    print(f"wrote {output / 'executors.json'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
