"""HashFunction: from token embeddings to experts, for all MoE layers at once (SiDA-MoE, section 3.2).

Compress -> 2-layer LSTM -> self-attention with sparsemax (few positions matter to a token) -> plus a residual from the compressed
embedding -> one head per MoE layer. It sees nothing of the model but its input embeddings, so it can run long before it.

What is added to the paper's: a second output per MoE layer for the scaling factor, which the paper reads off the expert's
softmax although that is trained for order rather than for size; and the decoder's tokens, which follow the encoder's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding as look_up

from predictor.calibration import Calibration, inclusion
from predictor.hash_table import HashTable, Width, from_probabilities
from predictor.tokens import ENCODER, RoutingShape, TokenBatch

PADDING = -1
PATIENCE = {False: 1, True: 12}
"""Newton's steps from one question whether they have arrived to the next. A GPU is asked seldom: it stands
still meanwhile, and steps too many change nothing."""


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """Euclidean projection of the last dimension onto the simplex (Martins and Astudillo, 2016); mostly zeros.

    Entries of -inf get exactly 0. Each row needs one finite entry.
    """
    return _Sparsemax.apply(scores)


class _Sparsemax(torch.autograd.Function):
    """Without the sort of the textbook, which with its gradient took half of a training step on rows of 600 tokens."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        """Newton's steps for the threshold over which sum(max(score - threshold, 0)) is 1.

        They come from below and never pass it, so that entries only drop out; once none does, the threshold is exact.
        """
        shifted = scores - scores.amax(dim=-1, keepdim=True)
        above = torch.empty_like(shifted)
        threshold = torch.full_like(shifted[..., :1], -1.0)  # the largest entry alone is over it by 1
        support = torch.zeros_like(threshold)
        for step in range(scores.shape[-1] + 1):  # seldom more than ten
            torch.sub(shifted, threshold, out=above).clamp_(min=0)
            excess = (above.sum(dim=-1, keepdim=True) - 1).clamp_(min=0)  # below 0 by rounding only
            before, support = support, above.sign_().sum(dim=-1, keepdim=True)
            threshold += excess / support
            if (step + 1) % PATIENCE[scores.is_cuda] == 0 and torch.equal(before, support):
                break
        projected = shifted.sub_(threshold).clamp_(min=0)
        ctx.save_for_backward(projected)
        return projected

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Within a row's support, less its mean there."""
        (projected,) = ctx.saved_tensors
        support = projected.sign()
        mean = (gradient * support).sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True)
        return (gradient - mean).mul_(support)


class HashFunction(nn.Module):
    """The network; about 1 % of the experts' bytes on Switch-base.

    Args:
        embedding_dim: width of the model's input embeddings.
        hidden: width of everything inside.
    """

    def __init__(self, shape: RoutingShape, embedding_dim: int, hidden: int):
        super().__init__()
        self.compress = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.ReLU())
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.residual = nn.Linear(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, experts) for experts in shape.experts)
        self.scales = nn.Linear(hidden, shape.layers)

    def forward(self, embedded: torch.Tensor, visible: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Args:
            embedded: (rows, tokens, embedding_dim); padding last.
            visible: bool (rows, tokens, tokens): whether position i may attend to position j.

        Returns:
            Expert logits per MoE layer, (rows, tokens, experts), and scaling factors in 0..1, (rows, tokens, MoE layers).
        """
        compressed = self.compress(embedded)
        state, _ = self.lstm(compressed)
        scores = (state @ state.transpose(1, 2)).masked_fill(~visible, float("-inf"))
        mixed = sparsemax(scores) @ state + self.residual(compressed)
        return [head(mixed) for head in self.heads], self.scales(mixed).sigmoid()


def pack(tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence per row: its encoder tokens, then its decoder tokens, then padding.

    Returns:
        ids: int64 (rows, tokens), 0 for padding.
        streams: int64 (rows, tokens), the stream of each token, PADDING for padding.
        visible: bool (rows, tokens, tokens). Encoder tokens see each other, decoder tokens also what stands before them;
            padding sees itself alone, so that every row of scores has a finite entry.
    """
    rows = [np.concatenate(parts) for parts in zip(*tokens.streams, strict=True)]
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    streams = np.full((len(rows), width), PADDING, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        streams[i, : len(row)] = np.repeat(np.arange(len(tokens.streams)), [len(s[i]) for s in tokens.streams])
    stream = torch.from_numpy(streams)
    position = torch.arange(width)
    before = position[:, None] >= position[None, :]
    real = stream != PADDING
    visible = real[:, None, :] & ((stream == ENCODER)[:, None, :] | before)
    visible |= torch.eye(width, dtype=torch.bool)
    return torch.from_numpy(ids), stream, visible


class LSTMPredictor:
    """Runs a trained HashFunction over batches."""

    def __init__(
        self,
        network: HashFunction,
        shape: RoutingShape,
        embedding: torch.Tensor,
        width: Width,
        calibration: Calibration | None = None,
        device: str = "cpu",
    ):
        """
        Args:
            embedding: the model's input embeddings, (vocab_size, embedding_dim), any floating dtype.
            device: where the network runs, as torch writes it.
        """
        self.network = network.eval().to(device)
        self.shape, self.width, self._device = shape, width, device
        self.embedding = embedding.to(device)
        self.temperatures = calibration.temperatures if calibration is not None else (1.0,) * shape.layers

    @torch.inference_mode()
    def scores(self, tokens: TokenBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Expert logits per MoE layer, float32 (tokens, experts), and scaling factors, float32 (tokens,)."""
        ids, streams, visible = (tensor.to(self._device) for tensor in pack(tokens))
        logits, scale = self.network(look_up(ids, self.embedding).float(), visible)
        mine = [streams == stream for stream in self.shape.streams]
        return (
            [logits[layer][mask].cpu().numpy() for layer, mask in enumerate(mine)],
            [scale[mask][:, layer].cpu().numpy() for layer, mask in enumerate(mine)],
        )

    def logits(self, tokens: TokenBatch) -> list[np.ndarray]:
        """Per MoE layer float32 (tokens, experts)."""
        return self.scores(tokens)[0]

    def predict(self, tokens: TokenBatch) -> HashTable:
        logits, scales = self.scores(tokens)
        sure = [inclusion(z, t, self.shape.top_k) for z, t in zip(logits, self.temperatures, strict=True)]
        return from_probabilities(sure, scales, self.width)
