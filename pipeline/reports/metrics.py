"""metrics.json: what a run did, from the journal's entries; so a resumed run's figures cover all of it."""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from pipeline.batch_result import BatchStats
from predictor.accuracy import Accuracy

PACKAGES = ("torch", "triton", "ray", "transformers", "accelerate", "numpy", "safetensors")


def stats_of(entries: Iterable[dict[str, Any]]) -> list[BatchStats]:
    """The statistics in journal entries, in the order of execution."""
    stats = []
    for entry in entries:
        data = dict(entry["stats"])
        data["accuracy"] = Accuracy(**data["accuracy"])
        stats.append(BatchStats(**data))
    return stats


def batch_metrics(stats: list[BatchStats], samples: int, seconds: float) -> dict[str, Any]:
    """Throughput, latency, movement and prediction over all batches.

    Args:
        seconds: wall time of the batches, all sittings of a resumed run together.
    """
    latencies = [(s.end - s.start) / 1e6 for s in stats]
    hits, misses = _sum([s.hits for s in stats]), _sum([s.misses for s in stats])
    numbers = sorted({s.executor for s in stats})
    return {
        "samples": samples,
        "tokens": sum(s.tokens for s in stats),
        "seconds": round(seconds, 3),
        "samples_per_second": round(samples / max(seconds, 1e-9), 3),
        "latency_ms": _percentiles(latencies),
        **_movement(stats),
        "hit_rate_per_layer": [_share(h, h + m) for h, m in zip(hits, misses, strict=True)],
        "experts_used_per_layer": [round((h + m) / len(stats), 2) for h, m in zip(hits, misses, strict=True)],
        "prediction": prediction_metrics(stats),
        "graphs": dict(_graphs(stats).most_common()) or None,
        "executor_restarts": _restarts(stats),
        "executors": [_executor_metrics(number, [s for s in stats if s.executor == number]) for number in numbers],
    } | generation_metrics(stats)


def _movement(stats: list[BatchStats]) -> dict[str, Any]:
    """What crossed the link, what was found there, and what waited."""
    hits, misses = sum(sum(s.hits) for s in stats), sum(sum(s.misses) for s in stats)
    return {
        "copied_bytes": {
            "prefetch": sum(s.prefetch_bytes for s in stats),
            "demand": sum(s.demand_bytes for s in stats),
            "read_in_place": sum(s.read_in_place_bytes for s in stats),
        },
        "moves": sum(s.moves for s in stats),
        "uses": hits + misses,
        "hit_rate": _share(hits, hits + misses),
        "stall_ms": round(sum(s.stall_ms for s in stats), 3),
    }


def _executor_metrics(number: int, stats: list[BatchStats]) -> dict[str, Any]:
    """One Executor's share of a run."""
    return {
        "executor": number,
        "batches": len(stats),
        "tokens": sum(s.tokens for s in stats),
        "busy_ms": round(sum(s.end - s.start for s in stats) / 1e6, 3),
        **_movement(stats),
        "resident_peak_bytes": max(s.resident_peak_bytes for s in stats),
        "restarts": _restarts(stats),
    }


def resident_peak(stats: list[BatchStats]) -> int:
    """Bytes: the most that each Executor has had in slots, summed."""
    numbers = {s.executor for s in stats}
    return sum(max(s.resident_peak_bytes for s in stats if s.executor == number) for number in numbers)


def executors_counted(stats: list[BatchStats], executors: int) -> int:
    """How many have a budget each: as many as the config asks for, or as have answered, here and elsewhere, now and before."""
    return max(executors, len({s.executor for s in stats}))


def miss_path(stats: list[BatchStats]) -> dict[str, Any]:
    """How experts were reached that were in no slot; "staged" and why, if any batch of any sitting had to."""
    for s in stats:
        path, _, because = s.miss_path.partition(": ")
        if because:
            return {"miss_path": path, "staged_because": because}
    return {"miss_path": "in_place", "staged_because": None}


def _graphs(stats: list[BatchStats]) -> Counter[str]:
    """How batches ran on a GPU, or, of those with several, their forwards."""
    ways: Counter[str] = Counter()
    for s in stats:
        if s.how is not None:
            ways.update(s.how if isinstance(s.how, dict) else [s.how])
    return ways


def generation_metrics(stats: list[BatchStats]) -> dict[str, Any]:
    """Of a task that generates: how long the first token took, and each after it; nothing of another task."""
    first = [s.first_token_ms for s in stats if s.first_token_ms is not None]
    if not first:
        return {}
    after = [ms for s in stats for ms in s.token_ms]
    seconds = (sum(first) + sum(after)) / 1e3
    return {
        "new_tokens": sum(s.new_tokens for s in stats),
        "new_tokens_per_second": round(sum(s.new_tokens for s in stats) / max(seconds, 1e-9), 3),
        "ms_to_first_token": _percentiles(first),
        "ms_per_token": _percentiles(after) if after else None,
    }


def prediction_metrics(stats: list[BatchStats]) -> dict[str, Any]:
    """How often the tables were right, where routers were asked, and what they cost."""
    accuracy = Accuracy()
    for s in stats:
        accuracy.add(s.accuracy)
    predicting = [(s.predict_span[1] - s.predict_span[0]) / 1e6 for s in stats if s.predict_span]
    return {
        "top1": round(accuracy.mean_top1, 4) if accuracy.tokens else None,
        "top3": round(accuracy.mean_top3, 4) if accuracy.tokens else None,
        "per_layer": {k: [round(r, 4) for r in rates] for k, rates in accuracy.rates().items()},
        "ms_per_batch": round(sum(predicting) / max(len(predicting), 1), 3),
    }


def fidelity(
    exact: list[dict[str, Any]],
    hashed: list[dict[str, Any]],
    exact_quality: dict[str, float],
    hash_quality: dict[str, float],
) -> dict[str, Any]:
    """How near hash routing comes to exact routing: equal labels, and quality beside quality (SiDA-MoE, table 4).

    Args:
        exact, hashed: the results of every row, by index.
    """
    report: dict[str, Any] = {"quality_exact": exact_quality, "quality_hash": hash_quality}
    if "label" in exact[0]:
        same = sum(a["label"] == b["label"] for a, b in zip(exact, hashed, strict=True))
        report["same_label"] = same / len(exact)
    if "logprob" in exact[0]:
        apart = [abs(a["logprob"] - b["logprob"]) / a["tokens"] for a, b in zip(exact, hashed, strict=True)]
        report["mean_logprob_difference_per_token"] = sum(apart) / len(apart)
    report["ratio"] = {k: hash_quality[k] / exact_quality[k] for k in exact_quality if exact_quality[k]}
    return report


def versions() -> dict[str, str]:
    """Of Python and of those packages that are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _restarts(stats: list[BatchStats]) -> int:
    """How often a process took over from another as one Executor, the sittings of a resumed run included."""
    return len({(s.executor, s.pid) for s in stats}) - len({s.executor for s in stats})


def _sum(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _percentiles(ms: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(ms, q)), 3) for q in (50, 95, 99)}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
