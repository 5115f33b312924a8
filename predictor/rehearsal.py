"""Rehearsal: the model's own backbone and routers, run ahead of the batch with a stand-in for every expert.

A router that reads context cannot be guessed from embeddings; but what it reads is made by the backbone, a few per cent of the
model, and by experts of which a rough idea is enough (docs/prediction.md). The model is handed in:
nothing here knows how one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from predictor.calibration import Calibration, inclusion
from predictor.hash_table import HashTable, Width, likeliest
from predictor.tokens import RoutingShape, TokenBatch

UNJUDGED = 0.25
"""The temperature until `train` has found one: a rehearsed router errs far less than its own probabilities say."""


@dataclass(frozen=True)
class Rehearsed:
    """What the router of one MoE layer said in a rehearsal, of real tokens.

    Attributes:
        logits: float32 (tokens, experts).
        chosen: int64 (tokens, top_k), before any capacity, best first.
        weights: float32 (tokens, top_k): what the experts' outputs are multiplied with.
    """

    logits: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray


Rehearse = Callable[[TokenBatch], list[Rehearsed]]
"""A rehearsal of one batch, MoE layer by MoE layer."""


class Rehearsal:
    """Makes tables of what routers say in a rehearsal; under hash routing tokens get the experts and weights that they gave."""

    def __init__(self, rehearse: Rehearse, calibration: Calibration | None, shape: RoutingShape, width: Width):
        self._rehearse, self._shape, self._width = rehearse, shape, width
        self._temperatures = calibration.temperatures if calibration is not None else (UNJUDGED,) * shape.layers

    def logits(self, tokens: TokenBatch) -> list[np.ndarray]:
        """Per MoE layer float32 (tokens, experts)."""
        return [said.logits for said in self._rehearse(tokens)]

    def predict(self, tokens: TokenBatch) -> HashTable:
        experts, probability, scaling = [], [], []
        for said, temperature in zip(self._rehearse(tokens), self._temperatures, strict=True):
            sure = inclusion(said.logits, temperature, self._shape.top_k)
            first = said.chosen[:, : self._width.top_k]
            named, p = likeliest(sure, self._width, first)
            weights = np.zeros(named.shape, dtype=np.float32)
            for place in range(said.chosen.shape[1]):  # by expert: `likeliest` may order what was chosen anew
                mine = named == said.chosen[:, place, None]
                weights += mine * said.weights[:, place, None]
            experts.append(named)
            probability.append(p)
            scaling.append(weights)
        return HashTable(tuple(experts), tuple(probability), tuple(scaling))
