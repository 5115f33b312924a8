"""Calibration: probabilities that add to what is chosen, and temperatures that make them come true."""

from __future__ import annotations

import numpy as np
import pytest

from predictor.calibration import Calibration, fit_temperature, inclusion


def scores(rng: np.random.Generator, tokens: int = 200, experts: int = 12) -> np.ndarray:
    return rng.normal(0, 3, (tokens, experts)).astype(np.float32)


@pytest.mark.parametrize("top_k", [1, 2, 4, 11, 12])
@pytest.mark.parametrize("temperature", [0.02, 1.0, 20.0])
def test_a_tokens_probabilities_add_to_the_experts_that_are_chosen_and_keep_their_order(top_k, temperature):
    z = scores(np.random.default_rng(0))
    p = inclusion(z, temperature, top_k)
    np.testing.assert_allclose(p.sum(axis=1), top_k, rtol=1e-3)
    assert (p >= 0).all() and (p <= 1 + 1e-6).all()
    order = np.take_along_axis(p, np.argsort(-z, axis=1), 1)
    assert (np.diff(order, axis=1) <= 1e-6).all()


def test_for_one_expert_it_is_the_softmax():
    z = scores(np.random.default_rng(1))
    expected = np.exp(z / 0.5 - (z / 0.5).max(axis=1, keepdims=True))
    np.testing.assert_allclose(inclusion(z, 0.5, 1), expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_choices_is_found(true, top_k):
    rng = np.random.default_rng(2)
    z = scores(rng, tokens=6000)
    noise = rng.gumbel(size=z.shape) if top_k == 1 else rng.logistic(size=z.shape)
    chosen = np.argsort(-(z / true + noise), axis=1)[:, :top_k]
    assert fit_temperature(z, chosen) == pytest.approx(true, rel=0.25)


def test_what_was_never_wrong_is_as_sure_as_can_be():
    z = scores(np.random.default_rng(3))
    assert inclusion(z, fit_temperature(z, z.argmax(axis=1)[:, None]), 1).max(axis=1).mean() > 0.99


def test_goes_to_plain_data_and_back():
    calibration = Calibration((1.0, 0.5), (0.9, 0.8), (1.0, 0.99))
    assert Calibration.from_dict(calibration.to_dict()) == calibration
