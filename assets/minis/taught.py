"""A tutor's lessons for a mini: it learns the labels, then says what it thinks of the texts and of many that are made of them.

Knows the packed file, words as numbers in it, and a clock; nothing of the mini but its ids. Judged as it goes by SST-2's dev
set, which chooses nothing here.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from assets.minis import steps
from assets.minis.changed import Changes, Rows, changed, spelt
from assets.minis.lessons import Labelled
from assets.minis.network import EOS
from assets.minis.steps import Phase, Steps, say
from assets.minis.tutor import FIRST, LAST, Tutor

SURE = 0.97
"""A label is held to be no surer than this where it meets what a tutor says."""


def rows(data: dict[str, np.ndarray], ids: str, lengths: str) -> Rows:
    return Rows(data[ids].astype(np.int64), data[lengths].astype(np.int64))


def embeddings(data: dict[str, np.ndarray], drawn: torch.Tensor) -> torch.Tensor:
    """Embeddings (vocab_size, d_model) that begin as what the tutor knows of words: its own, in as many principal directions.

    Pieces of the mini that are in no word as a whole keep what was drawn for them; entries are of size 1 as those are.
    """
    words = rows(data, "sst2.words.ids", "sst2.words.lengths")
    pieces = rows(data, "tutor.pieces.ids", "tutor.pieces.lengths")
    known = torch.from_numpy((data["tutor.matrix.words"] * data["tutor.scale.words"]).astype(np.float32))
    row = torch.from_numpy(np.repeat(np.arange(len(pieces.lengths)), pieces.lengths))
    summed = torch.zeros(len(pieces.lengths), known.shape[1]).index_add(0, row, known[torch.from_numpy(pieces.values)])
    means = summed / torch.from_numpy(pieces.lengths)[:, None]
    whole = torch.from_numpy(np.flatnonzero(words.lengths == 1))
    means = means[whole] - means[whole].mean(0)
    _, axes = torch.linalg.eigh(means.T @ means)
    seen = means @ axes.flip(1)[:, : drawn.shape[1]]
    made = drawn.clone()
    made[torch.from_numpy(words.values[words.starts])[whole], : seen.shape[1]] = seen / seen.square().mean().sqrt()
    return made


def _right(tutor: Tutor, held_out: Rows, label: np.ndarray) -> float:
    leaning = tutor.says(held_out.values, held_out.lengths)[1].cpu().numpy()
    return float(((leaning > 0) == label.astype(bool)).mean())


def lessons(
    data: dict[str, np.ndarray],
    how: dict[str, Any],
    widths: tuple[int, ...],
    device: torch.device,
    seconds: float,
    graphs: bool,
    steps_seed: int,
) -> tuple[Labelled, dict[str, Any]]:
    """Rows for `Leanings`, and what is to be said of them.

    Args:
        how: `tutor` of the recipe. share and asks: of the time, for learning and for what it is asked; most: steps; rows: so many
            texts are made at a time; texts: as many at most; plain: share of the texts as they are among all rows; labels: what a
            label counts beside the tutor's leaning to it.
        seconds: for a share of 1.
    """
    tutor = Tutor.of(data).to(device)
    texts = rows(data, "sst2.train.words", "sst2.train.counts")
    words, pieces = rows(data, "sst2.words.ids", "sst2.words.lengths"), rows(data, "tutor.pieces.ids", "tutor.pieces.lengths")
    positive = torch.from_numpy(data["sst2.train.positive"])
    longest = widths[-1]
    own = spelt(texts, pieces, (FIRST,), (LAST,), longest)
    held_out = spelt(rows(data, "sst2.dev.words", "sst2.dev.counts"), pieces, (FIRST,), (LAST,), longest)
    phase = Phase("tutor", seconds * how["share"], how["lr"], how["weight_decay"], graphs=graphs, most=how["most"])
    found: dict[str, Any] = steps.run(
        Steps(tutor, tutor.loss, phase, device),
        Labelled.of(own.values, own.lengths, tuple(how["widths"]), (positive,), device).batches(how["tokens"]),
        watch=lambda: f"sst2.dev {_right(tutor, held_out, data['sst2.dev.label']):.4f}",
    )
    found["sst2.dev"] = _right(tutor, held_out, data["sst2.dev.label"])
    states, leaning = tutor.says(own.values, own.lengths)
    label = positive.to(device).clamp(1 - SURE, SURE).logit()
    asked, said = [spelt(texts, words, (), (EOS,), longest)], [((1 - how["labels"]) * leaning + how["labels"] * label, states)]
    order = np.random.default_rng(steps_seed)
    begun = time.monotonic()
    made = 0
    while made < how["texts"] and (not made or time.monotonic() - begun < seconds * how["asks"]):
        new = changed(texts, data["sst2.frequency"], how["rows"], Changes(), order)
        theirs = spelt(new, pieces, (FIRST,), (LAST,), longest)
        states, leaning = tutor.says(theirs.values, theirs.lengths)
        asked.append(spelt(new, words, (), (EOS,), longest))
        said.append((leaning, states))
        made += how["rows"]
    copies = max(round(how["plain"] / (1 - how["plain"]) * made / len(texts.lengths)), 1)
    asked, said = asked[:1] * copies + asked[1:], said[:1] * copies + said[1:]
    found |= {"made": made, "copies": copies, "asked_s": round(time.monotonic() - begun, 1)}
    say(f"tutor: right about {found['sst2.dev']:.1%} of SST-2's development set; asked about {made} texts in {found['asked_s']} s")
    truths = tuple(torch.cat([part[i] for part in said]) for i in (0, 1))
    ids, lengths = (np.concatenate([getattr(one, name) for one in asked]) for name in ("values", "lengths"))
    return Labelled.of(ids, lengths, widths, truths, device), found
