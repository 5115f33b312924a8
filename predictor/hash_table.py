"""HashTable: for every MoE layer and token, the experts it will need and their scaling factors (SiDA-MoE, section 3.1).

Made by a predictor several batches ahead. Under exact routing it is a hint; under hash routing it is the routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class HashTable:
    """One batch's table. Tokens are the real tokens of the layer's stream, row after row; padding has no entry.

    Attributes:
        experts: per MoE layer int16 (tokens, top_k), most probable first.
        scaling: per MoE layer float32 (tokens, top_k); hash routing computes sum_k scaling_k * expert_k(token).
    """

    experts: tuple[np.ndarray, ...]
    scaling: tuple[np.ndarray, ...]

    @cached_property
    def uses(self) -> tuple[tuple[int, ...], ...]:
        """Per MoE layer the experts that any token may need, those wanted by most tokens first."""
        return tuple(by_demand(experts) for experts in self.experts)

    @property
    def expert_uses(self) -> int:
        """Distinct (MoE layer, expert) pairs: what this batch asks of the store."""
        return sum(len(experts) for experts in self.uses)


def by_demand(experts: np.ndarray) -> tuple[int, ...]:
    """Distinct experts in an int array of any shape, the most frequent first; -1 (no expert) left out."""
    counts = np.bincount(experts[experts >= 0])
    used = np.flatnonzero(counts)
    return tuple(int(e) for e in used[np.argsort(-counts[used], kind="stable")])


def from_probabilities(probabilities: list[np.ndarray], scale: list[np.ndarray], top_k: int) -> HashTable:
    """The table of the `top_k` most probable experts, which share a token's scaling factor by their probability.

    Args:
        probabilities: per MoE layer float32 (tokens, experts); rows need not add to 1.
        scale: per MoE layer float32 (tokens,): the predicted sum of the router's weights for the token.
    """
    experts, scaling = [], []
    for p, alpha in zip(probabilities, scale, strict=True):
        k = min(top_k, p.shape[1])
        best = np.argpartition(-p, k - 1, axis=1)[:, :k] if k < p.shape[1] else np.tile(np.arange(k), (len(p), 1))
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(p, best, 1), axis=1, kind="stable"), 1)
        share = np.take_along_axis(p, best, 1)
        share = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
        experts.append(best.astype(np.int16))
        scaling.append((alpha[:, None] * share).astype(np.float32))
    return HashTable(tuple(experts), tuple(scaling))
