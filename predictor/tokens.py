"""What a predictor sees of a batch: token ids, without padding, and which MoE layers read which of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

ENCODER, DECODER = 0, 1
"""Streams of tokens. An encoder-decoder has both; any other model has one, which is ENCODER here whatever its kind."""


@dataclass(frozen=True)
class TokenBatch:
    """The real tokens of a batch: streams[stream][row] holds token ids, int64 (tokens of that row,)."""

    streams: tuple[tuple[np.ndarray, ...], ...]

    def __reduce__(self) -> tuple:
        """Two arrays a stream instead of one a row: a batch crosses from process to process several times."""
        return _unpack, tuple((self.flat(s), self.lengths[s]) for s in range(len(self.streams)))

    @property
    def size(self) -> int:
        return len(self.streams[0])

    @cached_property
    def lengths(self) -> tuple[np.ndarray, ...]:
        """Tokens per row, for each stream: int64 (rows,)."""
        return tuple(np.array([len(ids) for ids in rows], dtype=np.int64) for rows in self.streams)

    def flat(self, stream: int) -> np.ndarray:
        """All token ids of a stream, row after row: the order of tokens in hash tables and traces. int64 (tokens,)."""
        return np.concatenate(self.streams[stream])


def _unpack(*streams: tuple[np.ndarray, np.ndarray]) -> TokenBatch:
    """From (all ids, tokens per row) of each stream."""
    return TokenBatch(tuple(tuple(np.split(ids, np.cumsum(lengths)[:-1])) for ids, lengths in streams))


@dataclass(frozen=True)
class RoutingShape:
    """What a predictor must know of a model's routing; equal for equal configurations.

    Attributes:
        experts: experts of each MoE layer, in the order of the forward.
        streams: for each MoE layer, the stream whose tokens it routes.
        top_k: experts that the router gives each token.
        vocab_size: token ids are below it.
    """

    experts: tuple[int, ...]
    streams: tuple[int, ...]
    top_k: int
    vocab_size: int

    @property
    def layers(self) -> int:
        return len(self.experts)
