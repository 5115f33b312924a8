"""How often a table is right: top-1 and top-3 by MoE layer, over real tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from predictor.hash_table import HashTable


@dataclass
class Accuracy:
    """Counts that add up over batches. A token is right if the router's first choice is among the first 1 or 3 of its table."""

    top1: list[int] = field(default_factory=list)
    top3: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, other: Accuracy) -> None:
        for mine, theirs in ((self.top1, other.top1), (self.top3, other.top3), (self.tokens, other.tokens)):
            mine.extend([0] * (len(theirs) - len(mine)))
            for layer, count in enumerate(theirs):
                mine[layer] += count

    def rates(self) -> dict[str, list[float]]:
        """Shares per MoE layer, 0..1."""

        def rate(right: list[int]) -> list[float]:
            return [r / max(n, 1) for r, n in zip(right, self.tokens, strict=True)]

        return {"top1": rate(self.top1), "top3": rate(self.top3)}

    @property
    def mean_top1(self) -> float:
        """Over all tokens of all MoE layers."""
        return sum(self.top1) / max(sum(self.tokens), 1)

    @property
    def mean_top3(self) -> float:
        return sum(self.top3) / max(sum(self.tokens), 1)


def compare(table: HashTable, truth: list[np.ndarray]) -> Accuracy:
    """
    Args:
        truth: per MoE layer the router's first choice, int (tokens,).
    """
    accuracy = Accuracy()
    for _, layers in groupby(zip(table.experts, truth, strict=True), key=lambda layer: layer[0].shape):  # of one stream
        experts, true = (np.stack(parts) for parts in zip(*layers, strict=True))  # (layers, tokens, top_k), (layers, tokens)
        right = experts == true[:, :, None]
        accuracy.top1 += right[:, :, 0].sum(axis=1).tolist()
        accuracy.top3 += right[:, :, :3].any(axis=2).sum(axis=1).tolist()
        accuracy.tokens += [true.shape[1]] * len(true)
    return accuracy
