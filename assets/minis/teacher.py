"""What word n-grams alone say of a sentence's sentiment: a logistic regression over TF-IDF, every row judged by one that has not
seen its sentence.

Beside the label this tells a mini's head which rows are plain and which are not. Phrases of a sentence go together: they share its
words, and a judge that has seen one has seen them all. Written in torch, so that preparing needs no package more.
"""

from __future__ import annotations

import bisect
import re
import zlib

import numpy as np
import torch

from assets.minis.texts import Example, folded

BUCKETS = 2**20
"""N-grams are told apart by a hash."""
LONGEST, FOLDS, STEPS, STRENGTH = 3, 5, 40, 1e-6


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower().replace("n't", " not").replace("-lrb-", "(").replace("-rrb-", ")"))


def features(texts: list[str]) -> torch.Tensor:
    """TF-IDF of all runs of up to LONGEST words, rows of length 1: sparse float32 (texts, BUCKETS)."""
    rows, columns = [], []
    for i, text in enumerate(texts):
        said = words(text)
        grams = {" ".join(said[a : a + n]) for n in range(1, LONGEST + 1) for a in range(len(said) - n + 1)}
        columns += [zlib.crc32(gram.encode()) % BUCKETS for gram in grams]
        rows += [i] * len(grams)
    row, column = np.array(rows), np.array(columns)
    inverse = np.log((1 + len(texts)) / (1 + np.bincount(column, minlength=BUCKETS))) + 1
    value = inverse[column]
    length = np.sqrt(np.bincount(row, value**2, minlength=len(texts)))
    value = value / length[row]
    indices = torch.from_numpy(np.stack([row, column]))
    return torch.sparse_coo_tensor(indices, torch.from_numpy(value).float(), (len(texts), BUCKETS)).coalesce()


def fitted(x: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Weights, float32 (BUCKETS, 1), by L-BFGS; nothing is fitted to a constant.

    Args:
        positive: how probable label 1 is, float32 (rows,).
    """
    x = x.to_sparse_csr()
    back = x.to_sparse_coo().t().to_sparse_csr()
    weights = torch.zeros(BUCKETS, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, history_size=8, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        with torch.no_grad():
            logits = (x @ weights)[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, positive)
            weights.grad = back @ ((logits.sigmoid() - positive) / len(positive))[:, None] + 2 * STRENGTH * weights
            return loss + STRENGTH * weights.square().sum()

    optimizer.step(closure)
    return weights.detach()


def sentences(examples: list[Example], whole: list[str]) -> np.ndarray:
    """Which of the whole sentences each text is a part of, int64 (examples,); a number of its own where it is of none."""
    texts = [folded(text) for text in whole]
    joined = "|".join(texts)
    starts = np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts])])
    found = []
    for i, example in enumerate(examples):
        at = joined.find(folded(example.text))
        found.append(bisect.bisect_right(starts, at) - 1 if at >= 0 else len(texts) + i)
    return np.array(found)


def judged(examples: list[Example], whole: list[str]) -> np.ndarray:
    """How probable label 1 is of each, float32, said by a judge that was fitted to rows of other sentences."""
    x = features([example.text for example in examples])
    positive = torch.tensor([example.positive for example in examples])
    fold = sentences(examples, whole) % FOLDS
    said = np.zeros(len(examples), dtype=np.float32)
    for number in range(FOLDS):
        mine, others = (torch.from_numpy(np.flatnonzero(where)) for where in (fold == number, fold != number))
        weights = fitted(x.index_select(0, others).coalesce(), positive[others])
        said[mine.numpy()] = (x.index_select(0, mine) @ weights)[:, 0].sigmoid().numpy()
    return said
