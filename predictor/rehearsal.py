"""Rehearsal: the model's own backbone and routers, run ahead of the batch with a stand-in for every expert.

A router that reads context cannot be guessed from embeddings; but what it reads is made by the backbone, a few per cent of the
model, and by experts of which a rough idea is enough (docs/prediction.md). The model is handed in:
nothing here knows how one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


Named = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of the real tokens of a MoE layer the likeliest experts, int16 (tokens, top_k), their probability and weights, float32."""
Name = Callable[[TokenBatch, tuple[float, ...], int], list[Named]]
"""A rehearsal that names so many experts by itself, given each layer's temperature."""


@runtime_checkable
class OnDevice(Protocol):
    """A rehearsal that may name experts by itself."""

    def namer(self) -> Name | None: ...


class Rehearsal:
    """Makes tables of what routers say in a rehearsal; under hash routing tokens get the experts and weights that they gave."""

    def __init__(
        self, rehearse: Rehearse, calibration: Calibration | None, shape: RoutingShape, width: Width, name: Name | None = None
    ):
        """
        Args:
            name: does the same, faster, for routers that choose one expert and tables of a fixed width.
        """
        self._name = name if width.mass is None and shape.top_k == 1 else None
        self._rehearse, self._shape, self._width = rehearse, shape, width
        self._temperatures = calibration.temperatures if calibration is not None else (UNJUDGED,) * shape.layers

    def logits(self, tokens: TokenBatch) -> list[np.ndarray]:
        """Per MoE layer float32 (tokens, experts)."""
        return [said.logits for said in self._rehearse(tokens)]

    def predict_all(self, batches: list[TokenBatch]) -> list[HashTable]:
        """The table of each, from one rehearsal of them all."""
        streams = range(len(batches[0].streams))
        rows = tuple(tuple(row for batch in batches for row in batch.streams[stream]) for stream in streams)
        table = self.predict(TokenBatch(rows))
        ends = [np.cumsum([batch.lengths[stream].sum() for batch in batches])[:-1] for stream in streams]
        layers = [ends[stream] for stream in self._shape.streams]
        fields = [
            [np.split(part, end) for part, end in zip(parts, layers, strict=True)]  # [MoE layer][batch]
            for parts in (table.experts, table.probability, table.scaling)
        ]
        tables = [HashTable(*(tuple(layer[batch] for layer in field) for field in fields)) for batch in range(len(batches))]
        for one in tables:
            one.uses  # noqa: B018 (worked out here, as for one: the Executor has better things to do)
        return tables

    def predict(self, tokens: TokenBatch) -> HashTable:
        if self._name is not None:
            return HashTable(*map(tuple, zip(*self._name(tokens, self._temperatures, self._width.top_k), strict=True)))
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
