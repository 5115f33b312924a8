"""From what was measured to the rows of bench.json: medians, errors, memory, and how far from the limit.

Every row has every key; what a system does not have, or what is not known here, is null. docs/benchmarks.md says what each means.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.bench.limit import fewest_moves
from pipeline.bench.placed import avg_max_load
from pipeline.bench.whole import Pass
from pipeline.bench.workload import Combination, Workload
from pipeline.reports.metrics import resident_peak


@dataclass
class Measured:
    """The counted rounds of one system."""

    combination: Combination
    passes: list[Pass] = field(default_factory=list)
    device_memory_peak_bytes: int | None = None
    timeline: str | None = None
    """The name of its last round's file."""

    @property
    def ms_per_batch(self) -> list[float]:
        """Of each round, wall time over all batches."""
        return [done.seconds * 1e3 / len(done.outputs) for done in self.passes]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms_per_batch)


@dataclass(frozen=True)
class Yardsticks:
    """What the rows of one batch size are compared with, as far as it is known.

    Attributes:
        link: bytes per second; None where nothing crosses one.
        resident_ms: per batch, with every expert on the device.
        transformers_ms, transformers_error: per batch; the median over the batches.
    """

    link: float | None
    resident_ms: float | None = None
    transformers_ms: float | None = None
    transformers_error: float | None = None

    def learned(self, workload: Workload, measured: list[Measured]) -> Yardsticks:
        """With what has just been measured; systems without a budget run once per batch size."""
        known = self
        for one in measured:
            if one.combination.system == "resident":
                known = replace(known, resident_ms=one.median_ms)
            if one.combination.system == "transformers":
                error = float(np.median(_errors(workload, one)))
                known = replace(known, transformers_ms=one.median_ms, transformers_error=error)
        return known


def rows_of(workload: Workload, measured: list[Measured], yardsticks: Yardsticks) -> list[dict[str, Any]]:
    """One row for each."""
    known = {one.combination.predictor: one.median_ms for one in measured if one.combination.system == "sida"}

    def from_memory(one: Measured) -> float | None:
        """Milliseconds per batch with the same predictor's tables, made beforehand."""
        return known.get(one.combination.predictor) if one.combination.system == "predicting" else None

    return [_row(workload, one, yardsticks, from_memory(one)) for one in measured]


def _row(workload: Workload, measured: Measured, yardsticks: Yardsticks, beside: float | None) -> dict[str, Any]:
    config, given = workload.prepared.config, measured.combination
    batches = len(workload.batches)
    samples = sum(len(batch.rows) for batch in workload.batches)
    batch_ms = [ms for done in measured.passes for ms in done.batch_ms]
    errors = _errors(workload, measured)
    median = float(np.median(errors))
    return {
        "model": config.model.path or config.model.config,
        "workload": config.data.path,
        "batch": workload.batch_size,
        "batches": batches,
        "tokens": sum(int(lengths.sum()) for batch in workload.batches for lengths in batch.tokens.lengths),
        "budget": given.budget,
        "system": given.system,
        "devices": given.devices,
        "placement": given.placement,
        "avg_max_load": avg_max_load(workload, given),
        "ms": {
            "median": round(measured.median_ms, 3),
            "p10": round(float(np.percentile(batch_ms, 10)), 3),
            "p90": round(float(np.percentile(batch_ms, 90)), 3),
        },
        "round_ms": [round(ms, 3) for ms in measured.ms_per_batch],
        "samples_per_second": round(samples / batches / measured.median_ms * 1e3, 2),
        "speedup": _ratio(yardsticks.transformers_ms, measured.median_ms),
        **_limit(workload, measured, yardsticks),
        **_movement(workload, measured, yardsticks.link),
        "device_memory_peak_bytes": measured.device_memory_peak_bytes,
        **_prediction(workload, measured),
        "prediction_cost": _ratio(measured.median_ms - beside, beside) if beside else None,
        "experts_used_per_layer": round(workload.experts_used_per_layer, 2),
        "median_error": median,
        "max_error": float(errors.max()),
        "error_over_transformers": _ratio(median, yardsticks.transformers_error),
        "timeline": measured.timeline,
    }


def _limit(workload: Workload, measured: Measured, yardsticks: Yardsticks) -> dict[str, Any]:
    """The larger of two times: what the link needs for the fewest moves, and what a model without moves takes. Of one device."""
    given, batches = measured.combination, len(workload.batches)
    limits: dict[str, Any] = dict.fromkeys(("fewest_moves", "limit_link_ms", "limit_compute_ms", "limit_ms", "ratio_to_limit"))
    if (given.budget is None and not measured.passes[0].stats) or given.devices > 1:
        return limits
    moves = limits["fewest_moves"] = fewest_moves(workload.uses, given.slots(workload))
    compute = yardsticks.resident_ms
    if yardsticks.link is None or compute is None:
        return limits
    link = moves * workload.prepared.layout.slot_bytes / yardsticks.link * 1e3 / batches
    limit = max(link, compute)
    return limits | {
        "limit_link_ms": round(link, 3),
        "limit_compute_ms": round(compute, 3),
        "limit_ms": round(limit, 3),
        "ratio_to_limit": _ratio(measured.median_ms, limit),
    }


def _movement(workload: Workload, measured: Measured, link: float | None) -> dict[str, Any]:
    """What moved, per round."""
    stats = [s for done in measured.passes for s in done.stats]
    if not stats:
        return dict.fromkeys(("expert_bytes_resident_peak", "copied_bytes", "moves", "hit_rate", "stall_ms", "link_efficiency"))
    rounds = len(measured.passes)
    hits, misses = sum(sum(s.hits) for s in stats), sum(sum(s.misses) for s in stats)
    copied = {
        "prefetch": sum(s.prefetch_bytes for s in stats) // rounds,
        "demand": sum(s.demand_bytes for s in stats) // rounds,
        "read_in_place": sum(s.read_in_place_bytes for s in stats) // rounds,
    }
    bytes_per_second = sum(copied.values()) / (measured.median_ms * len(workload.batches) / 1e3)
    return {
        "expert_bytes_resident_peak": resident_peak(stats),
        "copied_bytes": copied,
        "moves": sum(s.moves for s in stats) // rounds,
        "hit_rate": round(hits / max(hits + misses, 1), 4),
        "stall_ms": round(sum(s.stall_ms for s in stats) / len(stats), 3),
        "link_efficiency": _ratio(bytes_per_second, link),
    }


def _prediction(workload: Workload, measured: Measured) -> dict[str, Any]:
    name = measured.combination.predictor
    if name is None:
        return {"predictor": None, "recall": None, "predict_ms": None}
    spans = [(table.start, table.end) for table in workload.tables[name]]
    if measured.combination.system == "predicting":  # those made while it served
        spans = [(s.predict_span[0], s.predict_span[1]) for done in measured.passes for s in done.stats if s.predict_span]
    ms = sum(end - start for start, end in spans) / len(spans) / 1e6
    return {"predictor": name, "recall": round(workload.recall[name], 4), "predict_ms": round(ms, 3)}


def _errors(workload: Workload, measured: Measured) -> np.ndarray:
    """Per round and batch, the largest difference from the float32 reference, relative to the largest number in it (or to 1)."""
    pairs = [pair for done in measured.passes for pair in zip(done.outputs, workload.reference, strict=True)]
    return np.array([np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs])


def _ratio(of: float | None, to: float | None) -> float | None:
    """As it is written; there is none of nothing, and none to nothing or 0."""
    return round(of / to, 3) if of is not None and to else None


def ray_over_in_process(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Ray's throughput as a share of that of direct calls: the median over rounds, each with its neighbour in time.

    Returns:
        `median` and `rounds` over all of them, `per_budget` the median of each batch size and budget; None: not both were measured.
    """
    direct = {(row["batch"], row["budget"]): row["round_ms"] for row in rows if row["system"] == "in_process"}
    every: list[float] = []
    per_budget = []
    for row in rows:
        beside = direct.get((row["batch"], row["budget"]))
        if row["system"] != "ray" or beside is None:
            continue
        ratios = [theirs / own for theirs, own in zip(beside, row["round_ms"], strict=True)]
        every += ratios
        per_budget.append({"batch": row["batch"], "budget": row["budget"], "median": round(statistics.median(ratios), 4)})
    if not every:
        return None
    return {"median": round(statistics.median(every), 4), "rounds": [round(r, 4) for r in every], "per_budget": per_budget}


def line(row: dict[str, Any]) -> str:
    """One row for a person."""
    name = row["system"] + (f" x {row['devices']}" if row["devices"] > 1 else "")
    name += f", {row['placement']}" if row["placement"] else ""
    name += f" ({row['predictor']})" if row["predictor"] else ""
    ms, rate = row["ms"]["median"], row["samples_per_second"]
    text = f"batch {row['batch']:>3}  {row['budget'] or '-':>5}  {name:<34} {ms:>9.2f} ms {rate:>9.1f}/s"
    text += f"  error {row['median_error']:.1e}"
    if row["speedup"] is not None:
        text += f"  {row['speedup']:.2f} x transformers"
    if row["ratio_to_limit"] is not None:
        text += f"  {row['ratio_to_limit']:.2f} x the limit"
    if row["prediction_cost"] is not None:
        text += f"  predicting costs {row['prediction_cost']:.1%}, {row['predict_ms']:.2f} ms a batch"
    if row["hit_rate"] is not None:
        text += f"  hits {row['hit_rate']:.0%}"
    return text
