"""Drift: said when a layer does worse than chance allows, not before, and never of a predictor that is as good as it was."""

from __future__ import annotations

import numpy as np

from predictor.accuracy import Accuracy
from predictor.calibration import Calibration
from predictor.drift import FEWEST_TOKENS, WINDOW_TOKENS, Drift

CALIBRATION = Calibration((1.0, 1.0), (0.9, 0.6), (1.0, 0.8))
BATCH = 50


def batches(rng: np.random.Generator, count: int, top1: float, top3: float) -> list[Accuracy]:
    """Of layer 1; layer 0 is as it was."""
    return [
        Accuracy([45, int(rng.binomial(BATCH, top1))], [50, int(rng.binomial(BATCH, top3))], [BATCH, BATCH]) for _ in range(count)
    ]


def said(drift: Drift, given: list[Accuracy]) -> list[str]:
    return [text for text in map(drift.saw, given) if text is not None]


def test_a_predictor_as_good_as_it_was_never_drifts():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert not said(Drift(CALIBRATION, wide=True), batches(rng, 300, 0.6, 0.8))
        assert not said(Drift(CALIBRATION, wide=False), batches(rng, 300, 0.6, 0.8))


def test_the_layer_that_got_worse_is_named_with_both_figures():
    texts = said(Drift(CALIBRATION, wide=True), batches(np.random.default_rng(0), 100, 0.6, 0.6))
    assert "top-3 of MoE layer 1" in texts[-1] and "80.0% when it was trained" in texts[-1]
    assert all("\n" not in text for text in texts)


def test_narrow_tables_are_judged_by_their_first_expert():
    assert not said(Drift(CALIBRATION, wide=False), batches(np.random.default_rng(0), 100, 0.6, 0.1))
    assert "top-1" in said(Drift(CALIBRATION, wide=False), batches(np.random.default_rng(0), 100, 0.3, 0.8))[-1]


def test_nothing_is_said_of_a_few_tokens():
    few = FEWEST_TOKENS // BATCH - 1
    assert not said(Drift(CALIBRATION, wide=True), batches(np.random.default_rng(0), few, 0.0, 0.0))


def test_what_is_long_past_does_not_hide_a_change():
    drift, rng = Drift(CALIBRATION, wide=True), np.random.default_rng(0)
    assert not said(drift, batches(rng, 50 * WINDOW_TOKENS // BATCH, 0.6, 0.8))
    assert said(drift, batches(rng, WINDOW_TOKENS // BATCH, 0.6, 0.6))


def test_batches_under_hash_routing_tell_nothing():
    drift = Drift(CALIBRATION, wide=True)
    assert not said(drift, [Accuracy()] * 500)
