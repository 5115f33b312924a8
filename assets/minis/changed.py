"""Texts that nobody wrote: parts of texts, with words left out and others put in. A tutor says what they are worth.

Seventy thousand phrases say little of the words that are in few of them; what a tutor says of every word in many places does (Tang
et al. 2019, "Distilling task-specific knowledge from BERT"). Texts are rows of word numbers; `spelt` gives any tokenizer's ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows of numbers in a row: values (sum of the lengths,), lengths int64 (rows,)."""

    values: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def chosen(self, which: np.ndarray) -> Rows:
        lengths = self.lengths[which]
        return Rows(self.values[np.repeat(self.starts[which], lengths) + places(lengths)], lengths)


def places(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... within each row."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True)
class Changes:
    """Attributes:
    part: share of the texts of which only a part in a row is kept.
    left_out: share of the words that are left out.
    put_in: words of a text for which others stand: from none up to this share of them, drawn for each text.
    flat: how even the draw of other words is: 0 as often as they are in the texts, 1 all alike.
    """

    part: float = 0.4
    left_out: float = 0.05
    put_in: float = 0.35
    flat: float = 0.5


def changed(texts: Rows, frequency: np.ndarray, count: int, how: Changes, order: np.random.Generator) -> Rows:
    """`count` texts made of random ones, long ones more often than short ones.

    Args:
        frequency: of each word that may be put in, by its number; 0 for one that may not.
    """
    wanted = np.minimum(texts.lengths, 16).astype(np.float64)
    rows = texts.chosen(order.choice(len(texts.lengths), count, p=wanted / wanted.sum()))
    lengths, place = rows.lengths, places(rows.lengths)
    first, last = np.sort((order.random((2, count)) * lengths).astype(np.int64), axis=0)
    whole = order.random(count) >= how.part
    first, last = np.where(whole, 0, first), np.where(whole, lengths - 1, last)
    row = np.repeat(np.arange(count), lengths)
    keep = (place >= first[row]) & (place <= last[row])
    keep &= (order.random(len(row)) >= how.left_out) | (place == first[row])
    weight = np.where(frequency > 0, np.maximum(frequency, 1e-9).astype(np.float64) ** (1 - how.flat), 0.0)
    other = order.random(len(row)) < (order.random(count) * how.put_in)[row]
    drawn = np.searchsorted(np.cumsum(weight / weight.sum()), order.random(int(other.sum())))
    values = rows.values.copy()
    values[other] = np.minimum(drawn, len(frequency) - 1)
    return Rows(values[keep], np.bincount(row[keep], minlength=count))


def spelt(texts: Rows, words: Rows, before: tuple[int, ...], after: tuple[int, ...], longest: int) -> Rows:
    """Token ids of texts of word numbers, cut to `longest` with `after` at the end.

    Args:
        words: the token ids of every word.
    """
    many = words.lengths[texts.values]
    ids = words.chosen(texts.values).values
    row = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
    lengths = np.bincount(row, weights=many, minlength=len(texts.lengths)).astype(np.int64)
    kept = np.minimum(lengths, longest - len(before) - len(after))
    ids = ids[places(lengths) < np.repeat(kept, lengths)]
    total = kept + len(before) + len(after)
    out = np.zeros(int(total.sum()), dtype=np.int64)
    starts = np.cumsum(total) - total
    for i, token in enumerate(before):
        out[starts + i] = token
    for i, token in enumerate(after):
        out[starts + total - len(after) + i] = token
    out[np.repeat(starts + len(before), kept) + places(kept)] = ids
    return Rows(out, total)
