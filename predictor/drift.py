"""Drift: whether a predictor is still as good as it was on the rows that it was judged by.

Exact routing tells the truth for nothing. The latest few thousand tokens are compared, layer by layer, with what the predictor's
file says; a difference that chance makes is none.
"""

from __future__ import annotations

import math
from collections import deque

from predictor.accuracy import Accuracy
from predictor.calibration import Calibration

WINDOW_TOKENS = 4000
FEWEST_TOKENS = 500
"""Before so many of a MoE layer are seen nothing is said of it."""
MARGIN = 0.02
SIGMAS = 4.0
"""How far below the file's figure a layer must be: both apart from what the window's size alone would do."""


class Drift:
    """Watches one run."""

    def __init__(self, calibration: Calibration, wide: bool):
        """
        Args:
            wide: the tables name three experts for every token; otherwise only the first counts.
        """
        self._what = "top-3" if wide else "top-1"
        self._wide = wide
        self._expected = calibration.top3 if wide else calibration.top1
        self._window: deque[Accuracy] = deque()

    def saw(self, accuracy: Accuracy) -> str | None:
        """Takes in a batch; says what has drifted, if anything has."""
        if accuracy.tokens:
            self._window.append(accuracy)
        while len(self._window) > 1 and sum(max(a.tokens) for a in self._window) - max(self._window[0].tokens) >= WINDOW_TOKENS:
            self._window.popleft()
        total = Accuracy()
        for batch in self._window:
            total.add(batch)
        right = total.top3 if self._wide else total.top1
        for layer, (hits, tokens, expected) in enumerate(zip(right, total.tokens, self._expected, strict=False)):
            if tokens < FEWEST_TOKENS:
                continue
            chance = SIGMAS * math.sqrt(max(expected * (1 - expected), 1e-4) / tokens)
            if hits / tokens < expected - MARGIN - chance:
                return (
                    f"the predictor has drifted: {self._what} of MoE layer {layer} is {hits / tokens:.1%} over the last {tokens} "
                    f"tokens, {expected:.1%} when it was trained; train it on such rows (trace.save, then train with trace.load)"
                )
        return None
