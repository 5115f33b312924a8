"""The token table: for every token id, the experts it was routed to in a trace. The "predefined" hash function of the literature.

Blind to context, and made in seconds: what a learned hash function has to beat.
"""

from __future__ import annotations

import numpy as np

from predictor.hash_table import HashTable, Width, from_probabilities
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import Trace

KEPT = 8
"""Experts kept per token id and MoE layer; a dense table of Switch-base-256 would take 400 MB."""
PRIOR = 1.0
"""Observations that the layer's overall distribution counts for: what an unseen token id gets."""


class TokenTable:
    """Experts, their shares and the scaling factor by token id.

    Attributes:
        experts: per MoE layer int16 (vocab_size, KEPT).
        shares: per MoE layer float16 (vocab_size, KEPT).
        scale: per MoE layer float16 (vocab_size,).
    """

    def __init__(
        self,
        shape: RoutingShape,
        experts: list[np.ndarray],
        shares: list[np.ndarray],
        scale: list[np.ndarray],
        width: Width,
    ):
        self.shape, self.experts, self.shares, self.scale, self.width = shape, experts, shares, scale, width

    @classmethod
    def fit(cls, trace: Trace, shape: RoutingShape, width: Width) -> TokenTable:
        """Counts a trace."""
        experts, shares, scales = [], [], []
        for layer, stream, n in zip(trace.layers, shape.streams, shape.experts, strict=True):
            ids = trace.tokens.flat(stream)
            chosen = layer.top[:, : shape.top_k].astype(np.int64)
            overall = np.bincount(chosen.ravel(), minlength=n) / chosen.size
            weight = layer.weight.astype(np.float64)
            seen = np.bincount(ids, minlength=shape.vocab_size)
            scale = np.bincount(ids, weight, shape.vocab_size) + PRIOR * weight.mean()
            scales.append((scale / (seen + PRIOR)).astype(np.float16))
            kept = min(KEPT, n)
            fallback = np.argsort(-overall, kind="stable")[:kept]
            layer_experts = np.tile(fallback, (shape.vocab_size, 1))
            layer_shares = np.tile(overall[fallback], (shape.vocab_size, 1))
            pairs, counts = np.unique(np.repeat(ids, chosen.shape[1]) * n + chosen.ravel(), return_counts=True)
            starts = np.flatnonzero(np.diff(pairs // n, prepend=-1))
            for start, end in zip(starts, np.append(starts[1:], len(pairs)), strict=True):
                token = pairs[start] // n
                p = PRIOR * overall
                p[pairs[start:end] % n] += counts[start:end]
                best = np.argsort(-p, kind="stable")[:kept]
                layer_experts[token], layer_shares[token] = best, p[best] / p.sum()
            experts.append(layer_experts.astype(np.int16))
            shares.append(layer_shares.astype(np.float16))
        return cls(shape, experts, shares, scales, width)

    def predict(self, tokens: TokenBatch) -> HashTable:
        experts, probability, scaling = [], [], []
        for layer, stream in enumerate(self.shape.streams):
            ids = tokens.flat(stream)
            shares, scale = self.shares[layer][ids].astype(np.float32), self.scale[layer][ids].astype(np.float32)
            local = from_probabilities([shares], [scale], self.width)
            place = local.experts[0].astype(np.int64)  # in the token's row of experts
            experts.append(np.where(place < 0, place, np.take_along_axis(self.experts[layer][ids], place, 1)).astype(np.int16))
            probability.append(local.probability[0])
            scaling.append(local.scaling[0])
        return HashTable(tuple(experts), tuple(probability), tuple(scaling))
