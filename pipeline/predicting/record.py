"""What was measured of one row of a sheet, as JSON: shares 0..1, times in ms, hardware and versions. Knows nothing of tables."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from pipeline.config import Config
from pipeline.predicting.measured import Measured, Memory, Predicted
from pipeline.reports.metrics import versions

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Where texts are parted by their tokens."""


def record(config: Config, found: Measured) -> dict[str, Any]:
    """
    Args:
        config: the row's, without a predictor.
    """
    return {
        "hardware": found.hardware,
        "versions": versions(),
        "model": config.model.path,
        "data": config.data.path,
        "limit": config.data.limit,
        "batch": config.batch.size,
        "whole": found.whole,
        "exact": found.exact,
        "difference": found.difference,
        "predictors": {name: _predictor(predicted) for name, predicted in found.predicted.items()},
    }


def _predictor(predicted: Predicted) -> dict[str, Any]:
    return {
        "stand_in_bytes": predicted.stand_in_bytes,
        "ms_per_batch": predicted.ms,
        "tokens": predicted.accuracy.tokens,
        "hits": predicted.accuracy.rates(),
        "mean_top1": predicted.accuracy.mean_top1,
        "mean_top3": predicted.accuracy.mean_top3,
        "fidelity": predicted.fidelity,
        "memory": {span: asdict(saved) for span, saved in by_length(predicted.memory).items()},
    }


@dataclass(frozen=True)
class Saved:
    """Of texts of about one length.

    Attributes:
        idle: of all experts' bytes, the mean share that a text does not use.
        known: the mean share that its table does not name.
    """

    texts: int
    idle: float
    known: float


def by_length(memory: list[Memory]) -> dict[str, Saved]:
    """By a span of tokens, in order."""
    groups: dict[int, list[Memory]] = {}
    for one in memory:
        groups.setdefault(bisect_left(LENGTHS, one.tokens), []).append(one)
    return {_span(group): _saved(ones) for group, ones in sorted(groups.items())}


def _span(group: int) -> str:
    return f"{LENGTHS[group - 1] + 1 if group else 1} to {LENGTHS[group]}" if group < len(LENGTHS) else f"over {LENGTHS[-1]}"


def _saved(ones: list[Memory]) -> Saved:
    return Saved(len(ones), 1 - mean(one.used for one in ones), 1 - mean(one.named for one in ones))
