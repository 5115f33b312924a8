"""The predictor that predicts nothing: for want of a better one, and to see what the others are worth."""

from __future__ import annotations

import numpy as np

from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape, TokenBatch


class Nobody:
    """Tables without experts: nothing is copied ahead, everything is read where it is."""

    def __init__(self, shape: RoutingShape):
        self._shape = shape

    def predict(self, tokens: TokenBatch) -> HashTable:
        counts = [int(tokens.lengths[stream].sum()) for stream in self._shape.streams]
        shares = tuple(np.zeros((count, 0), dtype=np.float32) for count in counts)
        return HashTable(tuple(np.zeros((count, 0), dtype=np.int16) for count in counts), shares, shares)
