"""What a step learns from: windows of text with spans left out, and labelled rows. Batches of few shapes, made on the device.

Knows token ids, nothing of files. The spans are T5's (15 % of the tokens, 3 in a row), but a word is left out whole, as in the
windows that models are judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
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
    """Rows of token ids in groups of like length: ids int64 (rows, tokens), and what is to be learnt of each row, (rows, ...)."""

    groups: tuple[Batch, ...]

    @staticmethod
    def of(
        ids: np.ndarray, lengths: np.ndarray, widths: tuple[int, ...], truths: tuple[torch.Tensor, ...], device: torch.device
    ) -> Labelled:
        """
        Args:
            ids: all rows' tokens in a row.
            lengths: of each row; what is longer than the largest width is cut.
            truths: of each row, (rows, ...); how probable label 1 is, for `Labels`.
        """
        lengths = lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        lengths = np.minimum(lengths, widths[-1])
        group = np.searchsorted(widths, lengths)
        groups = []
        for i, width in enumerate(widths):
            chosen = np.flatnonzero(group == i)
            if not len(chosen):
                continue
            at = np.arange(width)[None, :]
            real = at < lengths[chosen][:, None]
            padded = np.full(real.shape, PAD, dtype=np.int64)
            padded[real] = ids[(starts[chosen][:, None] + at)[real]]
            where = torch.from_numpy(chosen)
            rows = (truth.index_select(0, where.to(truth.device)).to(device) for truth in truths)
            groups.append((torch.from_numpy(padded).to(device), *rows))
        return Labelled(tuple(groups))

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Shuffled batches of `tokens` tokens, padding included, for ever; a group's last rows wait for its next round."""
        sizes = [min(max(tokens // group[0].shape[1], 1), len(group[0])) for group in self.groups]
        while True:
            parts = []
            for number, (group, size) in enumerate(zip(self.groups, sizes, strict=True)):
                order = torch.randperm(len(group[0]), device=group[0].device)
                parts += [(number, order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
            for i in torch.randperm(len(parts)).tolist():
                number, rows = parts[i]
                yield tuple(part[rows] for part in self.groups[number])


def _forgotten(ids: torch.Tensor, share: float) -> torch.Tensor:
    gone = (torch.rand(ids.shape, device=ids.device) < share) & (ids > UNK)
    return torch.where(gone, UNK, ids)


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
        ids = _forgotten(ids, self.forget)
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


class Pupil(nn.Module):
    """A mini, and how its pooled states are read as a tutor's: what is trained when a tutor teaches. Only the mini is kept."""

    def __init__(self, model: Switch, width: int):
        super().__init__()
        self.model = model
        self.reads = nn.Linear(model.shape.d_model, width)


@dataclass(frozen=True)
class Leanings:
    """How a tutor teaches a head: how far it leans to label 1, and the states that this comes from.

    Attributes:
        temperature: both logits are divided by it; the higher, the more a sure "yes" differs from a surer one.
        states: weight of the squared difference to the tutor's pooled states, each of these brought to mean 0 and variance 1.
        forget: as `Labels`.
    """

    temperature: float = 2.0
    states: float = 1.0
    forget: float = 0.0

    def loss(self, pupil: Pupil, batch: Batch) -> torch.Tensor:
        """batch: ids, leaning (rows,), pooled states (rows, width)."""
        ids, leaning, states = batch
        spent = Spent()
        pooled = pupil.model.pooled(_forgotten(ids, self.forget), spent)
        said = pupil.model.labelled(pooled)
        t = self.temperature
        truth = (leaning / t).sigmoid()
        loss = t * t * functional.binary_cross_entropy_with_logits((said[:, 1] - said[:, 0]) / t, truth)
        wanted = functional.layer_norm(states.float(), states.shape[-1:])
        loss = loss + self.states * functional.mse_loss(pupil.reads(pooled).float(), wanted)
        return loss + BALANCE * spent.balance + Z * spent.z
