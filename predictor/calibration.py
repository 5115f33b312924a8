"""Calibration: how sure a predictor may be, learned on rows that it was not trained on.

A predictor's scores order experts; what the copy engine and a chosen mass of probability need are probabilities that come true. One
temperature per MoE layer, the one of least surprise on held-out rows (Guo et al., 2017), and beside it how often the predictor was
right there: a run whose predictor does worse has drifted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

COLDEST, HOTTEST = 0.02, 20.0
"""Temperatures looked at. A layer whose predictions were never wrong would want 0, which is surer than any sample can be."""
TRIED = 60
HALVINGS = 40


@dataclass(frozen=True)
class Calibration:
    """What was found on held-out rows.

    Attributes:
        temperatures: per MoE layer; scores are divided by it.
        top1, top3: per MoE layer, share of tokens whose true first expert was among the first 1 or 3.
    """

    temperatures: tuple[float, ...]
    top1: tuple[float, ...]
    top3: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, list[float]]) -> Calibration:
        return cls(*(tuple(data[name]) for name in ("temperatures", "top1", "top3")))


def inclusion(scores: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """How likely each expert is to be among the `top_k` that a router chooses; a token's add to `top_k`.

    For one, the softmax. For more, sigmoids about a level that each token has for itself: what softmax becomes when several win.

    Args:
        scores: float (tokens, experts): logits, or logarithms of probabilities.

    Returns:
        float32 (tokens, experts).
    """
    cold = (scores - scores.max(axis=1, keepdims=True)).astype(np.float32) / np.float32(temperature)
    if top_k == 1:
        odds = np.exp(cold)
        return odds / odds.sum(axis=1, keepdims=True)
    if top_k >= scores.shape[1]:
        return np.ones_like(cold)
    low, high = cold.min(axis=1, keepdims=True) - 50, cold.max(axis=1, keepdims=True) + 50
    for _ in range(HALVINGS):
        level = (low + high) / 2
        too_many = _sigmoid(cold - level).sum(axis=1, keepdims=True) > top_k
        low, high = np.where(too_many, level, low), np.where(too_many, high, level)
    return _sigmoid(cold - (low + high) / 2)


def fit_temperature(scores: np.ndarray, chosen: np.ndarray) -> float:
    """The temperature of least surprise.

    Args:
        scores: float (tokens, experts).
        chosen: int (tokens, top_k), what the router chose.
    """
    top_k = chosen.shape[1]

    def surprise(temperature: float) -> float:
        p = np.clip(inclusion(scores, temperature, top_k), 1e-6, 1 - 1e-6)
        right = np.take_along_axis(p, chosen.astype(np.int64), axis=1)
        if top_k == 1:
            return float(-np.log(right).mean())
        return float(-(np.log(right) - np.log1p(-right)).sum(axis=1).mean() - np.log1p(-p).sum(axis=1).mean())

    tried = np.geomspace(COLDEST, HOTTEST, TRIED)
    return float(tried[np.argmin([surprise(t) for t in tried])])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32)
