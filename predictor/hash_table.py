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
        experts: per MoE layer int16 (tokens, top_k), most probable first.
        probability: per MoE layer float32 (tokens, top_k): how likely the router is to choose that expert for that token.
        scaling: per MoE layer float32 (tokens, top_k); hash routing computes sum_k scaling_k * expert_k(token).
    """

    experts: tuple[np.ndarray, ...]
    probability: tuple[np.ndarray, ...]
    scaling: tuple[np.ndarray, ...]

    @cached_property
    def uses(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Per MoE layer (expert, probability that any token needs it), likeliest first."""
        return tuple(_uses(experts, p) for experts, p in zip(self.experts, self.probability, strict=True))

    def uses_under(self, routing: str) -> tuple[tuple[tuple[int, float], ...], ...]:
        """`uses`; under "hash" routing, where the table is the routing, every expert that it names is certain."""
        if routing == "exact":
            return self.uses
        return tuple(tuple((expert, 1.0) for expert, _ in layer) for layer in self.uses)

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
    """One table of several rows or batches, in the order given: what `split` took apart."""
    return HashTable(
        *(
            tuple(np.concatenate(layers) for layers in zip(*(getattr(table, name) for table in tables), strict=True))
            for name in ("experts", "probability", "scaling")
        )
    )


def _uses(experts: np.ndarray, probability: np.ndarray) -> tuple[tuple[int, float], ...]:
    """1 - the probability that no token needs the expert, tokens taken as independent."""
    nobody = np.bincount(experts.ravel(), np.log1p(-np.minimum(probability.ravel(), 1 - 1e-6)))  # (highest expert + 1,)
    named = np.unique(experts)
    somebody = -np.expm1(nobody[named])
    order = np.argsort(-somebody, kind="stable")
    return tuple((int(named[i]), float(somebody[i])) for i in order)


def from_probabilities(probabilities: list[np.ndarray], scale: list[np.ndarray], top_k: int) -> HashTable:
    """The table of the `top_k` most probable experts, which share a token's scaling factor by their probability.

    Args:
        probabilities: per MoE layer float32 (tokens, experts); rows need not add to 1.
        scale: per MoE layer float32 (tokens,): the predicted sum of the router's weights for the token.
    """
    experts, kept, scaling = [], [], []
    for p, alpha in zip(probabilities, scale, strict=True):
        k = min(top_k, p.shape[1])
        best = np.argpartition(-p, k - 1, axis=1)[:, :k] if k < p.shape[1] else np.tile(np.arange(k), (len(p), 1))
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(p, best, 1), axis=1, kind="stable"), 1)
        probability = np.take_along_axis(p, best, 1)
        share = probability / np.maximum(probability.sum(axis=1, keepdims=True), 1e-9)
        experts.append(best.astype(np.int16))
        kept.append(probability.astype(np.float32))
        scaling.append((alpha[:, None] * share).astype(np.float32))
    return HashTable(tuple(experts), tuple(kept), tuple(scaling))
