"""A row of the bench of writing: what one system took for one set of texts, before anything is known of limits."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from pipeline.bench.decoding_systems import DECODING, Stand, Written
from pipeline.bench.decoding_workload import Texts


def decoding_row(
    name: str, stand: Stand, at: int, texts: Texts, written: Written, reference: list[np.ndarray] | None
) -> dict[str, Any]:
    """
    Args:
        at: which of the bench's texts these are.
        reference: what transformers says of them, if it can be asked.
    """
    config = stand.prepared.config
    moved = written.moved
    errors = None
    if written.outputs is not None and reference is not None:
        pairs = zip(written.outputs, reference, strict=True)
        errors = np.concatenate([np.abs(ours - theirs).ravel() for ours, theirs in pairs])
    uses = sum(moved.hits) + sum(moved.misses) if moved is not None else 0
    median = statistics.median(written.token_ms)
    return {
        "model": config.model.path or config.model.config,
        "workload": config.data.path,
        "texts": at,
        "batch": texts.size,
        "prompt_tokens": texts.prompt,
        "steps": len(written.token_ms),
        "budget": stand.budget if DECODING[name].has_budget else None,
        "system": name,
        "predictor": config.predictor.kind if name == "sida" else None,
        "ms_per_token": {
            "median": round(median, 3),
            "mean": round(statistics.fmean(written.token_ms), 3),
            "p10": round(float(np.percentile(written.token_ms, 10)), 3),
            "p90": round(float(np.percentile(written.token_ms, 90)), 3),
        },
        "ms_to_first_token": round(statistics.median(written.first_ms), 3),
        "tokens_per_second": round(texts.size / statistics.fmean(written.token_ms) * 1e3, 2),
        "experts_per_token": round(texts.experts_per_token, 1),
        "slots": stand.slots if DECODING[name].has_budget else None,
        "expert_bytes_resident_peak": moved.resident_peak_bytes if moved is not None else None,
        "copied_bytes": moved
        and {"prefetch": moved.prefetch_bytes, "demand": moved.demand_bytes, "read_in_place": moved.read_in_place_bytes},
        "moves": moved and sum(experts for _, _, experts in moved.copy_spans) + sum(moved.misses),
        "hit_rate": round(sum(moved.hits) / max(uses, 1), 4) if moved is not None else None,
        "stall_ms": round(moved.stall_ns / 1e6, 3) if moved is not None else None,
        "copying_ms": moved and round(sum(end - start for start, end, _ in moved.copy_spans) / 1e6, 3),
        "graphs": written.ways or None,
        "median_error": float(np.median(errors)) if errors is not None else None,
        "max_error": float(errors.max()) if errors is not None else None,
    }
