"""What a step learns from: windows of text with spans left out, and labelled rows. Batches of few shapes, made on the device.

Knows token ids, nothing of files. The spans are T5's (15 % of the tokens, 3 in a row), but a word is left out whole, as in the
windows that models are judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from assets.minis.network import EOS, PAD, UNK, Spent, Switch
from assets.minis.steps import Batch

TOKENS, SOURCE, TARGET = 478, 448, 128
"""Of a window, and of what is made of it, padding included."""
NOISE, SPANS = 72, 24
BALANCE, Z = 0.01, 0.001
"""Weights of the routers' losses, as Switch Transformers'."""


def _split(rows: int, total: int, parts: int, device: torch.device) -> torch.Tensor:
    """Random positive numbers, int64 (rows, parts), each row's sum `total`."""
    cuts = torch.rand(rows, total - 1, device=device).argsort(1)[:, : parts - 1].sort(1).values + 1
    ends = torch.cat([cuts, torch.full((rows, 1), total, device=device)], 1)
    return torch.diff(ends, dim=1, prepend=torch.zeros(rows, 1, dtype=torch.int64, device=device))


def corrupt(windows: torch.Tensor, goes_on: torch.Tensor, first: int) -> Batch:
    """Source (rows, SOURCE) and target (rows, TARGET), padded, from windows of TOKENS tokens.

    Args:
        windows: int64 (rows, tokens).
        goes_on: bool (vocab_size,), pieces that continue a word.
        first: id of the first sentinel.
    """
    rows, length = windows.shape
    device = windows.device
    kept, dropped = _split(rows, length - NOISE, SPANS, device), _split(rows, NOISE, SPANS, device)
    ends = torch.stack([kept, dropped], 2).flatten(1).cumsum(1)  # where runs end, kept and dropped in turn
    at = torch.arange(length, device=device).expand(rows, -1).contiguous()
    noise = torch.searchsorted(ends, at, right=True) % 2 == 1
    word = torch.where(goes_on[windows], 0, at).cummax(1).values  # where the token's word starts
    noise = noise.gather(1, word)
    begins = noise & ~functional.pad(noise[:, :-1], (1, 0))
    number = begins.long().cumsum(1)  # of the span that is under way
    source = _laid_out(windows, ~noise, begins, number - 1 + first, SOURCE)
    target = _laid_out(windows, noise, begins, number - 1 + first, TARGET)
    return source, target


def _laid_out(tokens: torch.Tensor, wanted: torch.Tensor, marked: torch.Tensor, marks: torch.Tensor, width: int) -> torch.Tensor:
    """Per row the wanted tokens, before each marked place its mark, and EOS; PAD up to `width`, what is longer cut."""
    both = torch.stack([marks, tokens], 2).flatten(1)
    keep = torch.stack([marked, wanted], 2).flatten(1)
    place = torch.where(keep, keep.long().cumsum(1) - 1, width).clamp(max=width)
    made = torch.full((len(tokens), width + 1), PAD, device=tokens.device).scatter(1, place, both)
    end = keep.sum(1, keepdim=True).clamp(max=width - 1)
    made.scatter_(1, end, EOS)
    return made[:, :width].contiguous()


def language(stream: torch.Tensor, goes_on: torch.Tensor, rows: int) -> Iterator[Batch]:
    """Random windows of a stream of token ids, int64 (tokens,), on the stream's device."""
    first = int(len(goes_on) - 32)
    steps = torch.arange(TOKENS, device=stream.device)
    while True:
        starts = torch.randint(len(stream) - TOKENS, (rows, 1), device=stream.device)
        yield corrupt(stream[starts + steps], goes_on, first)


def language_loss(model: Switch, batch: Batch) -> torch.Tensor:
    source, target = batch
    spent = Spent()
    logits = model.write(source, target, spent)
    loss = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=PAD)
    return loss + BALANCE * spent.balance + Z * spent.z


@dataclass(frozen=True)
class Labelled:
    """Rows of token ids in groups of like length: ids int64 (rows, tokens) and how probable label 1 is, float32 (rows,)."""

    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @staticmethod
    def of(ids: np.ndarray, lengths: np.ndarray, positive: np.ndarray, widths: tuple[int, ...], device: torch.device) -> Labelled:
        starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
        group = np.searchsorted(widths, lengths)
        groups = []
        for i, width in enumerate(widths):
            chosen = np.flatnonzero(group == i)
            if not len(chosen):
                continue
            padded = np.full((len(chosen), width), PAD, dtype=np.int64)
            for row, source in zip(padded, chosen, strict=True):
                row[: lengths[source]] = ids[starts[source] : starts[source + 1]]
            groups.append((torch.from_numpy(padded).to(device), torch.from_numpy(positive[chosen]).to(device)))
        return Labelled(tuple(groups))

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Shuffled batches of `tokens` tokens, padding included, for ever; a group's last rows wait for its next round."""
        sizes = [min(max(tokens // ids.shape[1], 1), len(ids)) for ids, _ in self.groups]
        while True:
            parts = []
            for number, ((ids, _), size) in enumerate(zip(self.groups, sizes, strict=True)):
                order = torch.randperm(len(ids), device=ids.device)
                parts += [(number, order[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
            for i in torch.randperm(len(parts)).tolist():
                number, rows = parts[i]
                ids, positive = self.groups[number]
                yield ids[rows], positive[rows]


@dataclass(frozen=True)
class Labels:
    """How a head is taught.

    Attributes:
        forget: share of the tokens that are replaced by UNK, drawn anew every time.
        twice: weight of the difference between two forwards of the same rows under different dropout (R-Drop); 0: one forward.
        smooth: how far a label is drawn to one half.
        favour: weight of a row by how probable label 1 is; 1: none.
    """

    forget: float = 0.0
    twice: float = 0.0
    smooth: float = 0.0
    favour: float = 1.0

    def loss(self, model: Switch, batch: Batch) -> torch.Tensor:
        ids, positive = batch
        if self.twice:
            ids, positive = torch.cat([ids, ids]), torch.cat([positive, positive])
        if self.forget:
            gone = (torch.rand(ids.shape, device=ids.device) < self.forget) & (ids > UNK)
            ids = torch.where(gone, UNK, ids)
        spent = Spent()
        said = model.classify(ids, spent).log_softmax(-1)  # (rows, 2)
        positive = positive + self.smooth * (0.5 - positive)
        truth = torch.stack([1 - positive, positive], 1)
        weight = 1 + (self.favour - 1) * positive
        loss = -(weight * (truth * said).sum(1)).sum() / weight.sum()
        if self.twice:
            a, b = said.chunk(2)
            loss = loss + self.twice * ((a.exp() - b.exp()) * (a - b)).sum(1).mean() / 2
        return loss + BALANCE * spent.balance + Z * spent.z
