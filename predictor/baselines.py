"""Predictors that learn nothing: the truth, from a recorded trace, and chance. The bounds between which the others lie."""

from __future__ import annotations

import numpy as np

from predictor.errors import PredictorError
from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import Trace


class Oracle:
    """Answers with the routing that a trace recorded for the very same token ids."""

    def __init__(self, trace: Trace, shape: RoutingShape, top_k: int):
        self._trace, self._shape, self._top_k = trace, shape, top_k
        self._row_of = {_name(trace.tokens, row): row for row in range(trace.tokens.size)}
        self._ends = [np.cumsum(lengths) for lengths in trace.tokens.lengths]

    def predict(self, tokens: TokenBatch) -> HashTable:
        """
        Raises:
            PredictorError: a row that the trace does not hold.
        """
        rows = []
        for row in range(tokens.size):
            if _name(tokens, row) not in self._row_of:
                start = tokens.streams[0][row][:8].tolist()
                raise PredictorError(f"the trace does not hold the input that begins with token ids {start}")
            rows.append(self._row_of[_name(tokens, row)])
        experts, probability, scaling = [], [], []
        for layer, stream in zip(self._trace.layers, self._shape.streams, strict=True):
            lengths, ends = self._trace.tokens.lengths[stream], self._ends[stream]
            pick = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in rows])
            chosen = layer.top[pick, : self._top_k]
            share = layer.probabilities[pick, : self._top_k].astype(np.float32)
            share[:, self._shape.top_k :] = 0  # what the router did not choose, nobody needs
            probability.append((share > 0).astype(np.float32))
            share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
            experts.append(chosen)
            scaling.append(layer.weight[pick].astype(np.float32)[:, None] * share)
        return HashTable(tuple(experts), tuple(probability), tuple(scaling))


def _name(tokens: TokenBatch, row: int) -> bytes:
    return b"|".join(rows[row].astype(np.int64).tobytes() for rows in tokens.streams)


class Worsened:
    """Another predictor's tables with wrong experts put in by chance, as sure as before. The same for the same batch."""

    def __init__(self, inner: Oracle, shape: RoutingShape, recall: float, seed: int):
        """
        Args:
            recall: the share of predictions that is left as it is.
        """
        self._inner, self._shape, self._recall, self._seed = inner, shape, recall, seed

    def predict(self, tokens: TokenBatch) -> HashTable:
        table = self._inner.predict(tokens)
        rng = np.random.default_rng([self._seed, *(int(tokens.flat(s).sum()) for s in range(len(tokens.streams)))])
        experts = []
        for n, named in zip(self._shape.experts, table.experts, strict=True):
            others = (named + rng.integers(1, n, named.shape)) % n
            experts.append(np.where(rng.random(named.shape) < self._recall, named, others).astype(np.int16))
        return HashTable(tuple(experts), table.probability, table.scaling)


class Random:
    """Experts by chance, sure of every one: as wrong as a prediction can be. The same for the same batch."""

    def __init__(self, shape: RoutingShape, top_k: int, seed: int):
        self._shape, self._top_k, self._seed = shape, top_k, seed

    def predict(self, tokens: TokenBatch) -> HashTable:
        rng = np.random.default_rng([self._seed, *(int(tokens.flat(s).sum()) for s in range(len(tokens.streams)))])
        experts, probability, scaling = [], [], []
        for n, stream in zip(self._shape.experts, self._shape.streams, strict=True):
            count = int(tokens.lengths[stream].sum())
            order = rng.random((count, n)).argsort(axis=1)[:, : self._top_k]
            experts.append(order.astype(np.int16))
            probability.append(np.ones(order.shape, dtype=np.float32))
            scaling.append(np.full(order.shape, 1 / order.shape[1], dtype=np.float32))
        return HashTable(tuple(experts), tuple(probability), tuple(scaling))
