"""A Switch Transformer written for training: one tensor for all experts of a layer, (experts, d_ff, d_model), one matmul for them.

Computes what transformers' SwitchTransformersForConditionalGeneration and pipeline.tasks.classifier's encoder with a head compute
(`export.py` writes their checkpoints; a test compares the logits). Knows nothing of texts, tasks or time. What would surprise: in
training an expert takes at most `capacity` times its even share of the tokens and others pass by (the shapes are then the same in
every step, so that a step can be one CUDA graph); otherwise nobody is dropped. Padding is routed nowhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

PAD, EOS, UNK = 0, 1, 2


@dataclass(frozen=True)
class Shape:
    """Sizes, under the names of transformers' config. Every second layer is sparse."""

    num_experts: int
    d_ff: int
    d_model: int = 128
    d_kv: int = 32
    num_heads: int = 4
    num_layers: int = 6
    num_decoder_layers: int = 2
    vocab_size: int = 12288
    buckets: int = 32
    max_distance: int = 128


@dataclass
class Spent:
    """What routers cost a step, summed over layers: the balance loss is 1 a layer where all experts get the same."""

    balance: torch.Tensor | float = 0.0
    z: torch.Tensor | float = 0.0


def positions(queries: int, keys: int, shape: Shape, causal: bool, device: torch.device) -> torch.Tensor:
    """The relative-position bucket of every pair, int64 (queries, keys), as T5 counts it."""
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
    buckets, first = shape.buckets, torch.zeros_like(distance)
    if causal:
        distance = -distance.clamp(max=0)
    else:
        buckets //= 2
        first = (distance > 0).long() * buckets
        distance = distance.abs()
    exact = buckets // 2
    large = torch.log(distance.clamp(min=1).float() / exact) / math.log(shape.max_distance / exact) * (buckets - exact)
    return first + torch.where(distance < exact, distance, (exact + large.long()).clamp(max=buckets - 1))


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    """Queries of one sequence to keys of the same or another. Unscaled, as T5's."""

    def __init__(self, shape: Shape):
        super().__init__()
        inner = shape.num_heads * shape.d_kv
        self.heads, self.width = shape.num_heads, shape.d_kv
        self.norm = Norm(shape.d_model)
        self.q = nn.Parameter(torch.randn(inner, shape.d_model) * (shape.d_model * shape.d_kv) ** -0.5)
        self.kv = nn.Parameter(torch.randn(2 * inner, shape.d_model) * shape.d_model**-0.5)
        self.o = nn.Parameter(torch.randn(shape.d_model, inner) * inner**-0.5)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None, bias: torch.Tensor, dropout: float) -> torch.Tensor:
        """
        Args:
            x: (batch, queries, d_model).
            other: (batch, keys, d_model), or None: x attends to itself.
            bias: added to the scores, (batch, heads, queries, keys) or what broadcasts to it.
        """
        normed = self.norm(x)
        split = (*x.shape[:1], -1, self.heads, self.width)
        q = functional.linear(normed, self.q).view(split).transpose(1, 2)
        k, v = functional.linear(normed if other is None else other, self.kv).chunk(2, dim=-1)
        k, v = k.view(split).transpose(1, 2), v.view(split).transpose(1, 2)
        # written out: the fused kernels differ in whether they know a gradient of the bias
        weights = functional.dropout((q @ k.mT + bias.to(q.dtype)).softmax(dim=-1), dropout).to(v.dtype)
        mixed = weights @ v
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.o)


class Dense(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = Norm(shape.d_model)
        self.wi = nn.Parameter(torch.randn(shape.d_ff, shape.d_model) * shape.d_model**-0.5)
        self.wo = nn.Parameter(torch.randn(shape.d_model, shape.d_ff) * shape.d_ff**-0.5)

    def forward(self, x: torch.Tensor, real: torch.Tensor, spent: Spent, dropout: float) -> torch.Tensor:
        inner = functional.linear(self.norm(x), self.wi).relu()
        return functional.linear(functional.dropout(inner, dropout), self.wo)


class Sparse(nn.Module):
    """A MoE layer: every real token goes to the one expert that its router prefers."""

    def __init__(self, shape: Shape, capacity: float):
        super().__init__()
        self.capacity = capacity
        experts, d_ff, d_model = shape.num_experts, shape.d_ff, shape.d_model
        self.norm = Norm(d_model)
        self.router = nn.Parameter(torch.randn(experts, d_model) * 0.05)
        self.wi = nn.Parameter(torch.randn(experts, d_ff, d_model) * d_model**-0.5)
        self.wo = nn.Parameter(torch.randn(experts, d_model, d_ff) * d_ff**-0.5)
        self.chosen: torch.Tensor | None = None  # of the last forward, int64 (tokens,), num_experts for padding

    def forward(self, x: torch.Tensor, real: torch.Tensor, spent: Spent, dropout: float) -> torch.Tensor:
        """
        Args:
            x: (batch, tokens, d_model).
            real: bool (batch, tokens), False for padding.
        """
        experts = len(self.router)
        tokens = self.norm(x).flatten(0, 1)  # (tokens, d_model), float32
        counts_in = real.flatten()
        with torch.autocast(x.device.type, enabled=False):  # transformers routes in float32
            logits = tokens @ self.router.T  # (tokens, experts)
            probabilities = logits.softmax(dim=-1)
            weight, expert = probabilities.max(dim=-1)
            expert = torch.where(counts_in, expert, experts)
            self.chosen = expert.detach()
            many = torch.zeros(experts + 1, device=x.device).index_add(0, expert, torch.ones_like(weight)).detach()
            if self.training:
                share = counts_in.float()[:, None] / counts_in.sum()
                spent.balance = spent.balance + experts * (many[:-1] / counts_in.sum() * (probabilities * share).sum(0)).sum()
                spent.z = spent.z + (logits.logsumexp(-1).square() * share[:, 0]).sum()
        room = math.ceil(self.capacity * len(tokens) / experts) if self.training else max(int(many[:-1].max()), 1)
        order = expert.argsort(stable=True)  # tokens by expert
        by = expert.index_select(0, order)
        place = torch.arange(len(by), device=x.device) - (many.cumsum(0) - many).long().index_select(0, by)
        slot = torch.where((by < experts) & (place < room), by * room + place, experts * room)  # the last is for nobody
        grouped = tokens.new_zeros(experts * room + 1, tokens.shape[1]).index_copy(0, slot, tokens.index_select(0, order))
        inner = torch.bmm(grouped[:-1].view(experts, room, -1), self.wi.mT).relu()
        done = torch.bmm(functional.dropout(inner, dropout), self.wo.mT).flatten(0, 1)
        done = torch.cat([done, done.new_zeros(1, done.shape[1])]).index_select(0, slot)
        back = torch.zeros_like(done).index_copy(0, order, done)
        return (back * weight[:, None]).view_as(x)


class Layer(nn.Module):
    def __init__(self, shape: Shape, sparse: bool, crossing: bool, capacity: float):
        super().__init__()
        self.attention = Attention(shape)
        self.crossing = Attention(shape) if crossing else None
        self.feed: Sparse | Dense = Sparse(shape, capacity) if sparse else Dense(shape)


class Stack(nn.Module):
    """An encoder, or a decoder with attention to an encoder's outputs."""

    def __init__(self, shape: Shape, layers: int, decoder: bool, capacity: float):
        super().__init__()
        self.shape, self.decoder = shape, decoder
        self.relative = nn.Parameter(torch.randn(shape.buckets, shape.num_heads) * shape.d_model**-0.5)
        made = [Layer(shape, i % 2 == 1, decoder, capacity) for i in range(layers)]
        self.layers = nn.ModuleList(made)
        self.norm = Norm(shape.d_model)

    def forward(
        self,
        x: torch.Tensor,
        real: torch.Tensor,
        spent: Spent,
        dropout: float,
        read: torch.Tensor | None = None,
        read_real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x: embeddings, (batch, tokens, d_model).
            real: bool (batch, tokens).
            read, read_real: the encoder's outputs and which of them are real, for a decoder.
        """
        tokens = x.shape[1]
        buckets = positions(tokens, tokens, self.shape, self.decoder, x.device)[:, :, None]
        one_hot = (buckets == torch.arange(self.shape.buckets, device=x.device)).float()
        bias = (one_hot @ self.relative).permute(2, 0, 1)[None]  # a matmul: the gradient of 262,144 look-ups in 32 rows is slow
        hidden = torch.finfo(torch.bfloat16).min / 2
        allowed = real[:, None, None, :]
        if self.decoder:
            allowed = allowed & torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        bias = bias.masked_fill(~allowed, hidden)
        if torch.is_autocast_enabled(x.device.type):
            bias = bias.to(torch.get_autocast_dtype(x.device.type))  # once for all layers
        across = None
        if read_real is not None:
            across = torch.zeros_like(read_real, dtype=bias.dtype).masked_fill(~read_real, hidden)[:, None, None, :]
            across = across.expand(-1, bias.shape[1], tokens, -1)
        p = dropout if self.training else 0.0
        x = functional.dropout(x, p)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = x + functional.dropout(layer.attention(x, None, bias, p), p)
            if layer.crossing is not None:
                x = x + functional.dropout(layer.crossing(x, read, across, p), p)
            x = x + functional.dropout(layer.feed(x, real, spent, p), p)
        return functional.dropout(self.norm(x), p)


class Switch(nn.Module):
    """Encoder, decoder and a classification head over one vocabulary; each use takes what it needs.

    Attributes:
        dropout: read at every forward in training; set it before a step is captured.
    """

    def __init__(self, shape: Shape, labels: int = 2, capacity: float = 2.0):
        super().__init__()
        self.shape, self.dropout = shape, 0.1
        self.shared = nn.Parameter(torch.randn(shape.vocab_size, shape.d_model))
        self.encoder = Stack(shape, shape.num_layers, False, capacity)
        self.decoder = Stack(shape, shape.num_decoder_layers, True, capacity)
        self.head = nn.Parameter(torch.randn(labels, shape.d_model) * shape.d_model**-0.5)
        self.head_bias = nn.Parameter(torch.zeros(labels))

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.shared.index_select(0, ids.flatten()).view(*ids.shape, -1)

    def encode(self, ids: torch.Tensor, spent: Spent) -> torch.Tensor:
        """int64 (batch, tokens), padded with PAD -> (batch, tokens, d_model)."""
        return self.encoder(self._embedded(ids), ids != PAD, spent, self.dropout)

    def pooled(self, ids: torch.Tensor, spent: Spent) -> torch.Tensor:
        """The mean of the real tokens' states, float32 (batch, d_model)."""
        states = self.encode(ids, spent).float()
        real = (ids != PAD).float()[:, :, None]
        return (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)

    def labelled(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (batch, labels), in float32."""
        with torch.autocast(pooled.device.type, enabled=False):
            return functional.linear(pooled, self.head, self.head_bias)

    def classify(self, ids: torch.Tensor, spent: Spent) -> torch.Tensor:
        """Logits (batch, labels): a linear layer over the mean of the real tokens."""
        return self.labelled(self.pooled(ids, spent))

    def write(self, ids: torch.Tensor, target: torch.Tensor, spent: Spent) -> torch.Tensor:
        """Logits of every target token given the source and the targets before it, (batch, target tokens, vocab_size)."""
        states = self.encode(ids, spent)
        before = functional.pad(target[:, :-1], (1, 0), value=PAD)  # the decoder starts with PAD
        real = functional.pad(target[:, :-1] != PAD, (1, 0), value=True)
        out = self.decoder(self._embedded(before), real, spent, self.dropout, states, ids != PAD)
        return functional.linear(out * self.shape.d_model**-0.5, self.shared)
