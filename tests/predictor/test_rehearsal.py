"""From what routers say in a rehearsal to tables: for prefetching the likely experts, for hash routing the routers' own weights."""

from __future__ import annotations

import numpy as np
import pytest

from predictor.calibration import Calibration, inclusion
from predictor.hash_table import Width
from predictor.rehearsal import UNJUDGED, Rehearsal, Rehearsed
from predictor.tokens import ENCODER, RoutingShape
from tests.predictor.made_traces import ragged

TOKENS = ragged(np.random.default_rng(0), rows=4, vocab=30)
COUNT = len(TOKENS.flat(ENCODER))


def shape(top_k: int) -> RoutingShape:
    return RoutingShape(experts=(8, 6), streams=(ENCODER, ENCODER), top_k=top_k, vocab_size=30)


def rehearsed(top_k: int) -> list[Rehearsed]:
    said = []
    for layer, experts in enumerate(shape(top_k).experts):
        logits = np.random.default_rng(layer).normal(0, 2, (COUNT, experts)).astype(np.float32)
        chosen = np.argsort(-logits, axis=1)[:, :top_k]
        weights = np.random.default_rng(9).uniform(0.1, 0.9, chosen.shape).astype(np.float32)
        said.append(Rehearsed(logits, chosen, weights))
    return said


@pytest.mark.parametrize("top_k", [1, 2])
def test_tables_begin_with_what_the_routers_chose_and_give_it_their_weights(top_k):
    said = rehearsed(top_k)
    table = Rehearsal(lambda tokens: said, None, shape(top_k), Width(4)).predict(TOKENS)
    for layer, router in enumerate(said):
        assert [set(row) for row in table.experts[layer][:, :top_k]] == [set(row) for row in router.chosen]
        for token in range(COUNT):
            given = dict(zip(table.experts[layer][token].tolist(), table.scaling[layer][token].tolist(), strict=True))
            expected = dict(zip(router.chosen[token].tolist(), router.weights[token].tolist(), strict=True))
            assert {expert: weight for expert, weight in given.items() if weight} == pytest.approx(expected)


def test_under_hash_routing_only_what_the_routers_chose_is_needed():
    said = rehearsed(1)
    table = Rehearsal(lambda tokens: said, None, shape(1), Width(4)).predict(TOKENS)
    for layer, router in enumerate(said):
        assert {expert for expert, _ in table.uses_under("hash")[layer]} == set(router.chosen.ravel())
        assert (table.deciding.experts[layer][:, 1:] == -1).all()


def test_a_tie_that_the_router_broke_its_own_way_stays_broken_that_way():
    logits = np.zeros((COUNT, 8), np.float32)
    said = [Rehearsed(logits, np.full((COUNT, 1), 5), np.ones((COUNT, 1), np.float32))]
    one = RoutingShape(experts=(8,), streams=(ENCODER,), top_k=1, vocab_size=30)
    assert (Rehearsal(lambda tokens: said, None, one, Width(2)).predict(TOKENS).experts[0][:, 0] == 5).all()


@pytest.mark.parametrize("calibration", [None, Calibration((0.5, 2.0), (1.0, 1.0), (1.0, 1.0))])
def test_probabilities_have_the_temperature_that_was_found(calibration):
    said = rehearsed(1)
    table = Rehearsal(lambda tokens: said, calibration, shape(1), Width(3)).predict(TOKENS)
    for layer, router in enumerate(said):
        temperature = calibration.temperatures[layer] if calibration else UNJUDGED
        expected = np.take_along_axis(inclusion(router.logits, temperature, 1), table.experts[layer].astype(np.int64), 1)
        np.testing.assert_allclose(table.probability[layer], expected, rtol=1e-5)
