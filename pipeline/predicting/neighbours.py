"""How much of a router's choice do a token's neighbours decide? `python -m pipeline.predicting.neighbours SHEET.yaml ROW`

What is learnt of the row's `training` data is, for a token alone and with one and two neighbours on either side, how often each
expert was chosen; what was never seen leans on the narrower context. Judged on the row's own data: on all tokens, and on those
whose widest context had been seen often. Where that is no better than the token alone, a predictor that reads a few embeddings
around a token cannot be either: what decides lies farther off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.predicting.measured import opened
from pipeline.predicting.sheet import load_sheet
from pipeline.predicting.train import record
from pipeline.prepare import prepare
from pipeline.reports.markdown import table
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import Trace

WIDEST = 2
"""Neighbours on either side."""
OFTEN = 3
COLUMNS = ("MoE layer", "neighbours on either side", "top-1 / top-3", "of tokens whose widest context was seen often")


@dataclass(frozen=True)
class Hits:
    """Of one MoE layer, with so many neighbours on either side.

    Attributes:
        top1, top3: shares of all judged tokens.
        often: share of them whose widest context was seen OFTEN times or more.
        often_top1, often_top3: shares of those.
    """

    top1: float
    top3: float
    often: float
    often_top1: float
    often_top3: float


def neighbours(training: Trace, judged: Trace, shape: RoutingShape, layer: int) -> list[Hits]:
    """Of 0, 1 ... WIDEST neighbours."""
    stream, experts = shape.streams[layer], shape.experts[layer]
    chosen, true = (trace.layers[layer].top[:, 0].astype(np.int64) for trace in (training, judged))
    likely = np.tile(np.bincount(chosen, minlength=experts) / len(chosen), (len(true), 1))  # (judged tokens, experts)
    ranks = []
    for width in range(WIDEST + 1):
        seen = _seen(_around(training.tokens, stream, width), chosen, _around(judged.tokens, stream, width), experts)
        times = seen.sum(axis=1, keepdims=True)
        likely = (seen + likely) / (times + 1)
        ranks.append((likely > np.take_along_axis(likely, true[:, None], 1)).sum(axis=1))  # experts before the true one
    often = times[:, 0] >= OFTEN

    def share(right: np.ndarray) -> float:
        return float(right.sum() / max(len(right), 1))

    return [Hits(*(share(x) for x in (r < 1, r < 3, often, r[often] < 1, r[often] < 3))) for r in ranks]


def _around(tokens: TokenBatch, stream: int, width: int) -> np.ndarray:
    """Each token amid its neighbours, int64 (tokens, 2 * width + 1); -1 beyond the row."""
    padded = (np.pad(row, width, constant_values=-1) for row in tokens.streams[stream] if len(row))
    return np.concatenate([np.lib.stride_tricks.sliding_window_view(row, 2 * width + 1) for row in padded])


def _seen(contexts: np.ndarray, chosen: np.ndarray, asked: np.ndarray, experts: int) -> np.ndarray:
    """How often each expert was chosen in each context that is asked for, float32 (asked, experts)."""
    known, place = np.unique(asked, axis=0, return_inverse=True)
    every, where = np.unique(np.concatenate([known, contexts]), axis=0, return_inverse=True)
    number = np.full(len(every), -1)
    number[where.ravel()[: len(known)]] = np.arange(len(known))
    found = number[where.ravel()[len(known) :]]  # of each context in training, which of `known`
    counts = np.bincount(found[found >= 0] * experts + chosen[found >= 0], minlength=len(known) * experts)
    return counts.reshape(len(known), experts)[place.ravel()].astype(np.float32)


def lines(training: Config, judged: Config) -> Iterator[list[str]]:
    """A line for each MoE layer and width, as COLUMNS names it.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    found = []
    for config in (training, judged):
        prepared = prepare(config)
        with opened(prepared):
            found.append(record(prepared))
    for layer in range(prepared.model.shape.layers):
        for width, hits in enumerate(neighbours(found[0], found[1], prepared.model.shape, layer)):
            known = f"{hits.often_top1:.1%} / {hits.often_top3:.1%} of {hits.often:.1%}"
            yield [str(layer), str(width), f"{hits.top1:.1%} / {hits.top3:.1%}", known]


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2:
            raise ConfigError("say SHEET.yaml ROW")
        sheet = load_sheet(Path(arguments[0]), arguments[2:])
        if arguments[1] not in sheet.rows:
            raise ConfigError(f"{arguments[0]}: rows: there is no {arguments[1]!r}; there are {', '.join(sheet.rows)}")
        print("\n".join(table(COLUMNS, lines(sheet.training(arguments[1]), sheet.config(arguments[1])))))
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
