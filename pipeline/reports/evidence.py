"""What a run leaves beside its answers, from the journal of its batches: what is in metrics.json, timeline.json and report.html."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.prepare import Prepared
from pipeline.reports.metrics import (
    batch_metrics,
    executors_counted,
    fidelity,
    miss_path,
    prediction_metrics,
    resident_peak,
    stats_of,
    versions,
)
from pipeline.reports.page import report
from pipeline.reports.timeline import timeline
from store.actor import ArenaInfo


def run_metrics(prepared: Prepared, entries: list[dict[str, Any]], arena: ArenaInfo) -> dict[str, Any]:
    """What metrics.json says of a run's batches.

    Args:
        entries: the journal's, of all batches; under hash routing those of the second pass as well.
    """
    config, rows = prepared.config, prepared.rows
    first = [entry for entry in entries if entry["batch"] < len(prepared.batches)]
    second = [entry for entry in entries if entry["batch"] >= len(prepared.batches)]
    results = _by_index(first)
    stats = stats_of(first)
    quality = prepared.task.quality(rows, results)
    metrics = batch_metrics(stats, len(rows), sum(entry["seconds"] for entry in first))
    if second:  # the routers were asked in the second pass only
        exact = _by_index(second)
        metrics["fidelity"] = fidelity(exact, results, prepared.task.quality(rows, exact), quality)
        metrics["prediction"] = prediction_metrics(stats_of(second))
    made = prepared.stand_ins
    metrics["prediction"]["kind"] = config.predictor.kind
    metrics["prediction"]["stand_ins"] = asdict(made) if made is not None else None
    return (
        metrics
        | miss_path(stats)
        | {
            "driver_ms_per_batch": round(sum(entry["driver_ms"] for entry in first) / len(first), 3),
            "truncated": prepared.truncated,
            "quality": quality,
            "routing": config.routing,
            "device": prepared.device,
            "expert_bytes": {
                "total": prepared.layout.expert_bytes,
                "budget": prepared.budget_bytes * executors_counted(stats, config.executors),
                "resident_peak": resident_peak(stats),
                "stand_ins": prepared.stand_in_bytes,
            },
            "device_memory_peak_bytes": max(s.device_memory_peak_bytes or 0 for s in stats) or None,
            "arena": {
                "name": arena.path.name,
                "bytes": arena.nbytes,
                "warm_start": arena.warm_start,
                "seconds": round(arena.seconds, 4),
            },
            "versions": versions(),
            "config": config.to_dict(),
        }
    )


def pictures(prepared: Prepared, entries: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, str]:
    """The timeline and the report, by the names of their files."""
    stats = stats_of(entry for entry in entries if entry["batch"] < len(prepared.batches))
    second = stats_of(entry for entry in entries if entry["batch"] >= len(prepared.batches))
    slots = prepared.slots * executors_counted(stats, prepared.config.executors)
    return {
        "timeline.json": timeline(stats),
        "report.html": report(metrics, stats, second or stats, prepared.model.shape, slots),
    }


def _by_index(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((row for entry in entries for row in entry["results"]), key=lambda row: row["index"])
