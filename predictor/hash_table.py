"""HashTable: for every MoE layer and token, the experts it will need and their scaling factors (SiDA-MoE, section 3.1).

Made by a predictor several batches ahead. Under exact routing it is a hint; under hash routing it is the routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from predictor.tokens import TokenBatch


@dataclass(frozen=True)
class HashTable:
    """One batch's table. Tokens are the real tokens of the layer's stream, row after row; padding has no entry.

    Attributes:
        experts: per MoE layer int16 (tokens, width), most probable first; -1 where a token has fewer than others.
        probability: per MoE layer float32 (tokens, width): how likely the router is to choose that expert for that token.
        scaling: per MoE layer float32 (tokens, width); hash routing computes sum_k scaling_k * expert_k(token).
    """

    experts: tuple[np.ndarray, ...]
    probability: tuple[np.ndarray, ...]
    scaling: tuple[np.ndarray, ...]

    @cached_property
    def uses(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Per MoE layer (expert, probability that any token needs it), likeliest first."""
        return tuple(_uses(experts, p) for experts, p in zip(self.experts, self.probability, strict=True))

    def uses_under(self, routing: str) -> tuple[tuple[tuple[int, float], ...], ...]:
        """`uses`; under "hash" routing, where the table is the routing, every expert that it gives a scaling factor is certain."""
        return self.uses if routing == "exact" else self._certain_uses

    @cached_property
    def _certain_uses(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        named = (np.flatnonzero(np.bincount(layer[layer >= 0])) for layer in self.deciding.experts)  # not np.unique: it sorts
        return tuple(tuple((expert, 1.0) for expert in layer.tolist()) for layer in named)

    @cached_property
    def deciding(self) -> HashTable:
        """The table as routing: experts that add nothing to a token are left out."""
        experts = (np.where(scaling > 0, named, -1) for named, scaling in zip(self.experts, self.scaling, strict=True))
        return HashTable(tuple(layer.astype(np.int16) for layer in experts), self.probability, self.scaling)

    def expected_uses(self, routing: str) -> float:
        """Distinct (MoE layer, expert) pairs that the batch is expected to ask of the store."""
        return sum(p for layer in self.uses_under(routing) for _, p in layer)


def split(table: HashTable, tokens: TokenBatch, streams: Sequence[int]) -> list[HashTable]:
    """The table of each row of a batch.

    Args:
        tokens: the batch that the table is of.
        streams: for each MoE layer the stream whose tokens it routes.
    """
    ends = [np.cumsum(lengths)[:-1] for lengths in tokens.lengths]
    fields = [
        [np.split(part, ends[stream]) for part, stream in zip(parts, streams, strict=True)]  # [MoE layer][row]
        for parts in (table.experts, table.probability, table.scaling)
    ]
    return [HashTable(*(tuple(layer[row] for layer in field) for field in fields)) for row in range(tokens.size)]


def join(tables: Sequence[HashTable]) -> HashTable:
    """One table of several rows or batches, in the order given: what `split` took apart. They may be of different widths."""
    fields = (("experts", -1), ("probability", 0), ("scaling", 0))
    layers = ([_stacked(parts, none) for parts in zip(*(getattr(t, name) for t in tables), strict=True)] for name, none in fields)
    return HashTable(*map(tuple, layers))


def _stacked(parts: Sequence[np.ndarray], none: int) -> np.ndarray:
    """One array of several, (tokens, width) each; what is missing in the narrower is `none`."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=none) for part in parts])


def _uses(experts: np.ndarray, probability: np.ndarray) -> tuple[tuple[int, float], ...]:
    """1 - the probability that no token needs the expert, tokens taken as independent."""
    real = experts >= 0
    nobody = np.bincount(experts[real], np.log1p(-np.minimum(probability[real], 1 - 1e-6)))  # (highest expert + 1,)
    named = np.unique(experts[real])
    somebody = -np.expm1(nobody[named])
    order = np.argsort(-somebody, kind="stable")
    return tuple((int(named[i]), float(somebody[i])) for i in order)


@dataclass(frozen=True)
class Width:
    """How many experts a table names.

    Attributes:
        top_k: so many for every token and MoE layer; with `mass` at most so many.
        mass: instead, per token and layer, as many as come to this share of all probability.
        most: with `mass`, different experts per MoE layer: no more than these fit the budget.
    """

    top_k: int
    mass: float | None = None
    most: int | None = None


def likeliest(probability: np.ndarray, width: Width, first: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The experts to name for each token, most probable first.

    Args:
        probability: float32 (tokens, experts); what a row adds to is all its mass.
        first: int (tokens, k): to be named before all others, and always.

    Returns:
        Experts, int16 (tokens, at most top_k), -1 for none, and their probability, float32.
    """
    order = probability
    if first is not None:
        order = probability.copy()
        np.put_along_axis(order, first, np.take_along_axis(order, first, 1) + 2, 1)
    k = min(width.top_k, order.shape[1])
    best = np.argpartition(-order, k - 1, axis=1)[:, :k] if k < order.shape[1] else np.tile(np.arange(k), (len(order), 1))
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(order, best, 1), axis=1, kind="stable"), 1)
    found = np.take_along_axis(probability, best, 1).astype(np.float32)
    if width.mass is None:
        return best.astype(np.int16), found
    always = 1 if first is None else first.shape[1]
    before = np.cumsum(found, axis=1) - found  # the mass of those named earlier
    named = before < width.mass * probability.sum(axis=1, keepdims=True)
    named[:, :always] = True
    if width.most is not None:
        named = _within(best, found, named, always, width.most)
    front = np.argsort(~named, axis=1, kind="stable")[:, : int(named.sum(axis=1).max(initial=1))]
    best, found = np.where(named, best, -1), np.where(named, found, 0)
    return np.take_along_axis(best, front, 1).astype(np.int16), np.take_along_axis(found, front, 1)


def _within(best: np.ndarray, probability: np.ndarray, named: np.ndarray, always: int, most: int) -> np.ndarray:
    """`named` without the experts that are unlikeliest to be needed by any token, so that at most `most` different ones are left.

    What stands in the first `always` places stays, be it more than that.
    """
    uses = _uses(np.where(named, best, -1), probability)
    kept = np.zeros(int(best.max()) + 1, dtype=bool)
    kept[[expert for expert, _ in uses[:most]]] = True
    named = named & kept[best]
    named[:, :always] = True
    return named


def from_probabilities(probabilities: list[np.ndarray], scale: list[np.ndarray], width: Width) -> HashTable:
    """The table of the most probable experts, which share a token's scaling factor by their probability.

    Args:
        probabilities: per MoE layer float32 (tokens, experts); rows need not add to 1.
        scale: per MoE layer float32 (tokens,): the predicted sum of the router's weights for the token.
    """
    experts, kept, scaling = [], [], []
    for p, alpha in zip(probabilities, scale, strict=True):
        best, probability = likeliest(p, width)
        share = probability / np.maximum(probability.sum(axis=1, keepdims=True), 1e-9)
        experts.append(best)
        kept.append(probability)
        scaling.append((alpha[:, None] * share).astype(np.float32))
    return HashTable(tuple(experts), tuple(kept), tuple(scaling))
