"""`bench`: systems side by side on one workload, in turn, in one sitting; bench.json has what came out.

What can be compared here: the same Executor called through Ray's pipeline (`ray`) and called directly (`in_process`), with recorded
tables and one compute thread on both sides. Their ratio is what the three actors cost.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.cluster import cluster, cores
from pipeline.config import Config
from pipeline.data import Batch
from pipeline.driver import Actors, Window, run_batches
from pipeline.executor import BatchResult, Executor
from pipeline.metrics import versions
from pipeline.prepare import Prepared, prepare
from pipeline.progress import bar
from pipeline.train import record
from predictor import traces
from predictor.actor import Prediction, Predictor
from predictor.registry import PredictorSpec
from store.actor import ExpertStore

ROUNDS = 9


def bench(config: Config) -> dict[str, Any]:
    """Runs the workload `ROUNDS` times on each system, alternating, after one round that does not count.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    prepared = prepare(config)
    output = Path(config.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    store = ExpertStore(prepared.arena, prepared.model.directory, prepared.model.placement)
    with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
        arena = store.open(shown.update)
    try:
        trace = output / "trace.safetensors"
        traces.save(record(prepared), trace, prepared.model.shape, arena.identity)
        oracle = PredictorSpec("oracle", trace, config.predictor.top_k, prepared.model.shape, arena.identity)
        spec = replace(prepared.executor_spec(), threads=1)
        with cluster(config.cluster.address):
            executor = Executor(spec)
            actors = Actors.start(spec, oracle, arena, threads=1)
            actors.ready()
            predictor = Predictor(oracle, lambda: torch.empty(0))
            tables = [predictor.predict(batch.tokens) for batch in prepared.batches]
            systems: dict[str, Callable[[list[Batch]], list[BatchResult]]] = {
                "in_process": lambda batches: _run_in_process(executor, batches, tables, prepared),
                "ray": lambda batches: list(
                    run_batches(actors, batches, config.routing, prepared.slots, config.predictor.lookahead)
                ),
            }
            samples = _measure(systems, prepared)
            actors.finish()
            actors.stop()
            executor.close()
    finally:
        store.close(config.store.keep)
    report = _report(prepared, samples)
    (output / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    _say(report, output / "bench.json")
    return report


def _run_in_process(executor: Executor, batches: list[Batch], tables: list[Prediction], prepared: Prepared) -> list[BatchResult]:
    """The driver's loop without actors: plan as far ahead, execute, go on."""
    window, planned, results = Window(prepared.slots, prepared.config.predictor.lookahead), 0, []
    routing = prepared.config.routing
    for number, batch in enumerate(batches):
        while planned < min(len(batches), number + 1 + window.lookahead):
            executor.plan(batches[planned].index, tables[planned], routing)
            planned += 1
        results.append(executor.execute(batch, tables[number], routing))
        window.saw(results[-1].stats.predicted_uses)
    return results


def _measure(
    systems: dict[str, Callable[[list[Batch]], list[BatchResult]]], prepared: Prepared
) -> dict[str, list[tuple[float, list[BatchResult]]]]:
    """Per system and round: seconds for all batches, and their results."""
    samples: dict[str, list[tuple[float, list[BatchResult]]]] = {name: [] for name in systems}
    for number in tqdm(range(ROUNDS + 1), desc="rounds", leave=False, disable=None):
        batches = [replace(batch, index=batch.index + number * len(prepared.batches)) for batch in prepared.batches]
        for name in sorted(systems, reverse=number % 2 == 1):  # who goes first alternates
            start = time.perf_counter()
            results = systems[name](batches)
            if number:
                samples[name].append((time.perf_counter() - start, results))
    return samples


def _report(prepared: Prepared, samples: dict[str, list[tuple[float, list[BatchResult]]]]) -> dict[str, Any]:
    config, rows = prepared.config, []
    reference = samples["in_process"][0][1]
    for name, rounds in samples.items():
        stats = [result.stats for _, results in rounds for result in results]
        batch_ms = [(s.end - s.start) / 1e6 for s in stats]
        seconds = statistics.median(seconds for seconds, _ in rounds)
        hits, misses = sum(sum(s.hits) for s in stats), sum(sum(s.misses) for s in stats)
        rows.append(
            {
                "model": config.model.path,
                "workload": config.data.path,
                "batch": config.batch.size,
                "tokens": sum(result.stats.tokens for result in rounds[0][1]),
                "budget": config.store.budget,
                "system": name,
                "ms": {
                    "median": round(statistics.median(batch_ms), 3),
                    "p10": round(float(np.percentile(batch_ms, 10)), 3),
                    "p90": round(float(np.percentile(batch_ms, 90)), 3),
                },
                "samples_per_second": round(len(prepared.rows) / seconds, 3),
                "round_seconds": [round(seconds, 4) for seconds, _ in rounds],
                "hit_rate": round(hits / max(hits + misses, 1), 4),
                "predictor": "oracle",
                "experts_used_per_layer": round((hits + misses) / len(stats) / prepared.model.shape.layers, 2),
                "max_error": _difference(reference, rounds[-1][1]),
            }
        )
    ratios = [direct[0] / ray[0] for direct, ray in zip(samples["in_process"], samples["ray"], strict=True)]
    return {
        "hardware": f"{platform.machine()}, {cores()} cores, {_processor()}",
        "versions": versions(),
        "threads": 1,
        "rows": rows,
        "ray_over_in_process": {"median": round(statistics.median(ratios), 4), "rounds": [round(r, 4) for r in ratios]},
    }


def _difference(reference: list[BatchResult], results: list[BatchResult]) -> float:
    """The largest difference in any number of any row's result."""

    def numbers(rows: list[dict[str, Any]]) -> np.ndarray:
        return np.array([value for row in rows for value in row.get("scores", [row.get("logprob")])], dtype=np.float64)

    return max(float(np.abs(numbers(a.results) - numbers(b.results)).max()) for a, b in zip(reference, results, strict=True))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _say(report: dict[str, Any], path: Path) -> None:
    for row in report["rows"]:
        print(f"{row['system']:<11} {row['samples_per_second']:>9.1f} rows/s  {row['ms']['median']:.1f} ms per batch")
    ratio = report["ray_over_in_process"]
    print(f"Ray's pipeline has {ratio['median']:.1%} of the throughput of direct calls (rounds: {ratio['rounds']})")
    print(f"wrote {path}")
