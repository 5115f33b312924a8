"""The token table: counts per token id, and what it says of ids that it never saw."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from predictor.hash_table import Width
from predictor.token_table import KEPT, PRIOR, TokenTable
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from tests.predictor.made_traces import ragged, random_trace

VOCAB = 20
SEEN = 15
"""Token ids from here on are in no trace."""
SHAPE = RoutingShape(experts=(12, 5), streams=(ENCODER, DECODER), top_k=1, vocab_size=VOCAB)


def make_trace(seed: int, shape: RoutingShape = SHAPE):
    rng = np.random.default_rng(seed)
    return random_trace(rng, ragged(rng, rows=40, vocab=SEEN, streams=2), shape)


def counted(trace, shape: RoutingShape, layer: int) -> tuple[dict[int, Counter], Counter, dict[int, list[float]]]:
    """Experts by token id, experts overall, and scaling factors by token id; one token at a time."""
    by_token, overall, weights = {}, Counter(), {}
    recorded = trace.layers[layer]
    for token, top, weight in zip(trace.tokens.flat(shape.streams[layer]).tolist(), recorded.top, recorded.weight, strict=True):
        for expert in top[: shape.top_k].tolist():
            by_token.setdefault(token, Counter())[expert] += 1
            overall[expert] += 1
        weights.setdefault(token, []).append(float(weight))
    return by_token, overall, weights


@pytest.mark.parametrize("top_k", [1, 2])
def test_shares_are_the_counts_of_the_token_id_with_the_overall_distribution_as_a_prior(top_k):
    shape = RoutingShape(SHAPE.experts, SHAPE.streams, top_k, VOCAB)
    trace = make_trace(0, shape)
    table = TokenTable.fit(trace, shape, Width(3))
    for layer, experts in enumerate(shape.experts):
        by_token, overall, _ = counted(trace, shape, layer)
        everything = sum(overall.values())
        for token in range(VOCAB):
            counts = by_token.get(token, Counter())
            whole = sum(counts.values()) + PRIOR
            share = np.array([(counts[e] + PRIOR * overall[e] / everything) / whole for e in range(experts)])
            named = table.experts[layer][token]
            assert len(set(named.tolist())) == min(KEPT, experts)
            np.testing.assert_allclose(table.shares[layer][token], share[named], atol=1e-3)  # float16
            np.testing.assert_allclose(table.shares[layer][token], np.sort(share)[::-1][:KEPT], atol=1e-3)


def test_scaling_factors_are_the_mean_of_the_token_id_drawn_to_the_overall_mean():
    trace = make_trace(1)
    table = TokenTable.fit(trace, SHAPE, Width(3))
    for layer in range(SHAPE.layers):
        _, _, weights = counted(trace, SHAPE, layer)
        mean = np.mean([w for all_of_token in weights.values() for w in all_of_token])
        for token in range(VOCAB):
            mine = weights.get(token, [])
            expected = (sum(mine) + PRIOR * mean) / (len(mine) + PRIOR)
            assert table.scale[layer][token] == pytest.approx(expected, abs=1e-3)


def test_an_unseen_token_id_gets_the_overall_distribution():
    trace = make_trace(2)
    table = TokenTable.fit(trace, SHAPE, Width(3))
    unseen = np.array([SEEN, VOCAB - 1, 0])
    predicted = table.predict(TokenBatch(((unseen,), (unseen,))))
    for layer in range(SHAPE.layers):
        _, overall, _ = counted(trace, SHAPE, layer)
        everything = sum(overall.values())
        most = [count / everything for _, count in overall.most_common(3)]
        for experts, p in zip(predicted.experts[layer], predicted.probability[layer], strict=True):
            assert p == pytest.approx(most, abs=1e-3)
            assert [overall[e] / everything for e in experts.tolist()] == pytest.approx(most, abs=1e-3)


def test_a_table_names_top_k_experts_of_each_token_likeliest_first():
    trace = make_trace(3)
    tokens = ragged(np.random.default_rng(4), rows=5, vocab=VOCAB, streams=2)
    table = TokenTable.fit(trace, SHAPE, Width(3))
    predicted = table.predict(tokens)
    for layer, stream in enumerate(SHAPE.streams):
        ids = tokens.flat(stream)
        np.testing.assert_array_equal(predicted.probability[layer], table.shares[layer][ids][:, :3].astype(np.float32))
        np.testing.assert_array_equal(np.sort(predicted.experts[layer], axis=1), np.sort(table.experts[layer][ids][:, :3], axis=1))
        assert (np.diff(predicted.probability[layer], axis=1) <= 0).all()
        np.testing.assert_allclose(predicted.scaling[layer].sum(axis=1), table.scale[layer][ids].astype(np.float32), rtol=1e-3)


def test_more_experts_than_are_kept_gives_all_that_are_kept():
    table = TokenTable.fit(make_trace(5), SHAPE, Width(30))
    predicted = table.predict(ragged(np.random.default_rng(6), rows=2, vocab=VOCAB, streams=2))
    assert [experts.shape[1] for experts in predicted.experts] == [KEPT, 5]
