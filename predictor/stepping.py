"""Prediction while a model writes: which experts each row's newest token will need, before its forward begins.

A table says something of a batch whose tokens are all known. While a model writes, one token per row is new at every step, and what
is known besides is what the rows' earlier tokens were routed to. `Foresight` joins both: what a predictor says of the token
(`LSTMSteps` carries the hash function's state from token to token; `TokenSteps` looks the token up), and how often the row's
earlier tokens went to each expert, recent ones counting more. Every row is one text of its own.

Knows nothing of models or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding as look_up

from predictor.calibration import inclusion
from predictor.hash_function import LSTMPredictor, pack, sparsemax
from predictor.registry import HashPredictor
from predictor.token_table import TokenTable
from predictor.tokens import ENCODER, RoutingShape, TokenBatch

HALF_LIFE = 48
"""Tokens after which a routing decision counts half for its row. docs/prediction.md has what others find."""
TRUST = 0.5
"""Of the predictor's word about a token beside its row's past."""

Uses = list[list[tuple[int, float]]]
"""Per MoE layer (expert, probability that any row needs it), likeliest first."""


class TokenSource(Protocol):
    """Says of each row's newest token how likely it is to need each expert."""

    def begin(self, prompt: TokenBatch) -> None:
        """A new batch; its rows are those of every `step` that follows."""

    def step(self, tokens: np.ndarray, layers: int) -> list[np.ndarray]:
        """
        Args:
            tokens: int64 (rows,); what is said of rows that are done does not matter.

        Returns:
            Per MoE layer, of the first `layers`, float32 (rows, experts): probabilities, a row's adding to about `top_k`.
        """


class TokenSteps:
    """A token table, asked for one token at a time (TokenSource)."""

    def __init__(self, table: TokenTable):
        self._table, self._shape = table, table.shape

    def begin(self, prompt: TokenBatch) -> None:
        pass

    def step(self, tokens: np.ndarray, layers: int) -> list[np.ndarray]:
        said = []
        for layer, experts in enumerate(self._shape.experts[:layers]):
            likely = np.zeros((len(tokens), experts), dtype=np.float32)
            shares = self._table.shares[layer][tokens].astype(np.float32) * self._shape.top_k
            np.put_along_axis(likely, self._table.experts[layer][tokens].astype(np.int64), np.minimum(shares, 1), 1)
            said.append(likely)
        return said


class LSTMSteps:
    """The hash function, one step per token: LSTM state carried, and what it may attend to kept (TokenSource).

    What it says of a text's last token is what it says when it reads the whole text at once.
    """

    def __init__(self, predictor: LSTMPredictor):
        self._predictor, self._shape = predictor, predictor.shape
        self._network = predictor.network

    @torch.inference_mode()
    def begin(self, prompt: TokenBatch) -> None:
        ids, _, _ = pack(prompt)
        lengths = np.sum([np.asarray(stream) for stream in prompt.lengths], axis=0)
        compressed = self._network.compress(self._embed(ids))
        packed = nn.utils.rnn.pack_padded_sequence(compressed, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False)
        states, self._state = self._network.lstm(packed)
        self._past, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)  # (rows, tokens, hidden)
        self._visible = torch.arange(self._past.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]

    @torch.inference_mode()
    def step(self, tokens: np.ndarray, layers: int) -> list[np.ndarray]:
        network = self._network
        compressed = network.compress(self._embed(torch.from_numpy(np.maximum(tokens, 0))[:, None]))
        state, self._state = network.lstm(compressed, self._state)
        self._past = torch.cat([self._past, state], dim=1)
        self._visible = torch.cat([self._visible, torch.ones(len(tokens), 1, dtype=torch.bool)], dim=1)
        scores = (state @ self._past.transpose(1, 2)).masked_fill(~self._visible[:, None, :], float("-inf"))
        mixed = (sparsemax(scores) @ self._past + network.residual(compressed))[:, 0]
        return [
            inclusion(head(mixed).numpy(), temperature, self._shape.top_k)
            for head, temperature in zip(network.heads[:layers], self._predictor.temperatures[:layers], strict=True)
        ]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return look_up(ids, self._predictor.embedding).float()


class Foresight:
    """Says before every forward but the first which experts it will need. For decoders: what they read and write is one stream.

    Attributes:
        layers: it says so of the first so many MoE layers, and learns of no others.
    """

    def __init__(self, shape: RoutingShape, source: TokenSource | None):
        """
        Args:
            source: None: the rows' past alone.
        """
        self._shape, self._source = shape, source
        self.layers = shape.layers
        self._keep = 0.5 ** (1 / HALF_LIFE)
        self._counts: list[np.ndarray] = []
        self._weight: np.ndarray = np.zeros(0)

    def begin(self, prompt: TokenBatch, chosen: Sequence[np.ndarray]) -> None:
        """After the prompt's forward.

        Args:
            chosen: per MoE layer int (tokens, top_k), what the routers chose for the rows' real tokens, row after row.
        """
        if self._source is not None:
            self._source.begin(prompt)
        lengths = prompt.lengths[ENCODER]
        self._counts = []
        ages = np.concatenate([np.arange(n - 1, -1, -1) for n in lengths])
        weights = self._keep**ages
        rows = np.repeat(np.arange(len(lengths)), lengths)
        self._weight = np.bincount(rows, weights, len(lengths))
        for experts, layer in zip(self._shape.experts[: self.layers], chosen, strict=False):
            pairs = (rows[:, None] * experts + layer.astype(np.int64)).ravel()
            spread = np.repeat(weights, layer.shape[1])
            self._counts.append(np.bincount(pairs, spread, len(lengths) * experts).reshape(len(lengths), experts))

    def learn(self, chosen: Sequence[np.ndarray], awake: np.ndarray) -> None:
        """After a step.

        Args:
            chosen: per MoE layer int (rows that went on, top_k).
            awake: bool (rows,): which they were.
        """
        rows = np.flatnonzero(awake)
        self._weight[rows] = self._weight[rows] * self._keep + 1
        for counts, layer in zip(self._counts, chosen, strict=False):
            counts[rows] *= self._keep
            counts[rows[:, None], layer.astype(np.int64)] += 1

    def likely(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Per MoE layer float (rows, experts): how likely each row's newest token is to need each expert."""
        past = [counts / np.maximum(self._weight, 1e-9)[:, None] for counts in self._counts]
        if self._source is None:
            return past
        said = self._source.step(tokens, self.layers)
        return [TRUST * a + (1 - TRUST) * b for a, b in zip(said, past, strict=False)]

    def uses(self, tokens: np.ndarray, awake: np.ndarray) -> Uses:
        """What the rows that go on will need together."""
        return [together(likely[awake]) for likely in self.likely(tokens)]


def together(likely: np.ndarray) -> list[tuple[int, float]]:
    """Each expert that any row may need, and how likely one does: 1 - the probability that none does, rows independent.

    Args:
        likely: float (rows, experts).
    """
    any_row = -np.expm1(np.log1p(-np.minimum(likely, 1 - 1e-6)).sum(axis=0))
    order = np.argsort(-any_row, kind="stable")
    return [(int(expert), float(any_row[expert])) for expert in order if any_row[expert] > 0]


def source_of(predictor: HashPredictor | None) -> TokenSource | None:
    """A predictor that can go on from token to token; None: it cannot, it sees whole texts only."""
    if isinstance(predictor, LSTMPredictor):
        return LSTMSteps(predictor)
    return TokenSteps(predictor) if isinstance(predictor, TokenTable) else None
