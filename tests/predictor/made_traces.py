"""Token batches and traces made by rule, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from predictor.rehearsal import Rehearse
from predictor.stand_ins import StandIns
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import LayerTrace, Trace

Rule = Callable[[np.ndarray], np.ndarray]
"""One row's token ids -> the expert of each."""


def ragged(rng: np.random.Generator, rows: int, vocab: int, streams: int = 1, shortest: int = 1, longest: int = 9) -> TokenBatch:
    """Rows of unequal length; ids from 1, so that 0 is padding's alone."""
    return TokenBatch(
        tuple(
            tuple(rng.integers(1, vocab, rng.integers(shortest, longest + 1)).astype(np.int64) for _ in range(rows))
            for _ in range(streams)
        )
    )


def trace_by_rule(tokens: TokenBatch, shape: RoutingShape, rules: list[Rule], weights: list[np.ndarray]) -> Trace:
    """The trace of a router that follows a rule per MoE layer and is sure of it: 0.9 for its choice, the rest shared out.

    Args:
        weights: per MoE layer the scaling factor by token id.
    """
    layers = []
    for experts, stream, rule, weight in zip(shape.experts, shape.streams, rules, weights, strict=True):
        chosen = np.concatenate([rule(row) for row in tokens.streams[stream]])
        others = (chosen[:, None] + np.arange(experts)) % experts  # the choice first, then every other expert
        shares = np.full(others.shape, 0.1 / (experts - 1))
        shares[:, 0] = 0.9
        size = weight[tokens.flat(stream)]
        layers.append(LayerTrace(others.astype(np.int16), shares.astype(np.float16), size.astype(np.float16)))
    return Trace(tokens, tuple(layers))


def random_trace(rng: np.random.Generator, tokens: TokenBatch, shape: RoutingShape, top_t: int | None = None) -> Trace:
    """Experts, probabilities and weights by chance."""
    layers = []
    for experts, stream in zip(shape.experts, shape.streams, strict=True):
        p = rng.dirichlet(np.full(experts, 0.5), int(tokens.lengths[stream].sum()))
        top = np.argsort(-p, axis=1)[:, : top_t or experts]
        share = np.take_along_axis(p, top, 1)
        layers.append(LayerTrace(top.astype(np.int16), share.astype(np.float16), share[:, : shape.top_k].sum(1).astype(np.float16)))
    return Trace(tokens, tuple(layers))


def same_trace(a: Trace, b: Trace) -> bool:
    """Equal to the bit, dtypes included."""
    tokens = all(
        len(rows) == len(others) and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(rows, others, strict=True))
        for rows, others in zip(a.tokens.streams, b.tokens.streams, strict=True)
    )
    return tokens and all(
        np.array_equal(getattr(x, name), getattr(y, name)) and getattr(x, name).dtype == getattr(y, name).dtype
        for x, y in zip(a.layers, b.layers, strict=True)
        for name in ("top", "probabilities", "weight")
    )


class OnlyEmbedding:
    """A model that has input embeddings and nothing else (`predictor.registry.Model`)."""

    def __init__(self, embedding: torch.Tensor | None = None):
        self._embedding = embedding

    def embedding(self) -> torch.Tensor:
        assert self._embedding is not None, "nobody should ask"
        return self._embedding

    def rehearser(self, stand_ins: StandIns, device: str) -> Rehearse:
        raise AssertionError("nobody should ask")
