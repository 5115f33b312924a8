"""The bounds of prediction: the oracle, which repeats a trace, and chance."""

from __future__ import annotations

import numpy as np
import pytest

from predictor.baselines import Oracle, Random
from predictor.errors import PredictorError
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from predictor.traces import Trace, select
from tests.predictor.made_traces import ragged, random_trace

VOCAB = 60
SHAPE = RoutingShape(experts=(10, 6), streams=(ENCODER, DECODER), top_k=1, vocab_size=VOCAB)
TOP_2 = RoutingShape(experts=(10, 6), streams=(ENCODER, DECODER), top_k=2, vocab_size=VOCAB)


def make_trace(shape: RoutingShape = SHAPE) -> Trace:
    rng = np.random.default_rng(0)
    return random_trace(rng, ragged(rng, rows=12, vocab=VOCAB, streams=2, shortest=3), shape, top_t=5)


@pytest.mark.parametrize("shape", [SHAPE, TOP_2], ids=["top-1", "top-2"])
def test_the_oracle_gives_what_was_recorded_for_rows_in_any_order_and_batch(shape):
    trace = make_trace(shape)
    oracle = Oracle(trace, shape, top_k=3)
    order = np.random.default_rng(1).permutation(12)
    for rows in (order[:5], order[5:6], order[6:]):
        part = select(trace, rows, shape)
        table = oracle.predict(part.tokens)
        for layer, true in enumerate(part.layers):
            np.testing.assert_array_equal(table.experts[layer], true.top[:, :3])
            sure = np.arange(3) < shape.top_k
            np.testing.assert_array_equal(table.probability[layer], np.broadcast_to(sure, table.experts[layer].shape))
            chosen = true.probabilities[:, :3].astype(np.float64) * sure
            expected = true.weight[:, None] * chosen / chosen.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(table.scaling[layer], expected, rtol=1e-3)


def test_the_oracle_expects_exactly_the_experts_that_the_routers_chose():
    trace = make_trace()
    uses = Oracle(trace, SHAPE, top_k=3).predict(trace.tokens).uses
    for layer, true in enumerate(trace.layers):
        needed = {expert for expert, p in uses[layer] if p > 0.5}
        assert needed == set(true.top[:, 0].tolist())
        assert all(p == 0 for expert, p in uses[layer] if expert not in needed)


def test_the_oracle_refuses_a_row_that_it_never_saw():
    trace = make_trace()
    known = select(trace, np.array([2]), SHAPE).tokens
    oracle = Oracle(trace, SHAPE, top_k=1)
    longer = TokenBatch(((np.append(known.streams[0][0], 7),), known.streams[1]))
    other_decoder = TokenBatch((known.streams[0], (known.streams[1][0] + 1,)))
    moved = TokenBatch(((np.append(known.streams[0][0], known.streams[1][0][:1]),), (known.streams[1][0][1:],)))
    for tokens in (longer, other_decoder, moved):
        with pytest.raises(PredictorError, match=str(known.streams[0][0][0])) as error:
            oracle.predict(tokens)
        assert "\n" not in str(error.value)


def test_the_oracle_does_not_change_its_trace():
    trace = make_trace()
    oracle = Oracle(trace, SHAPE, top_k=3)
    first = oracle.predict(trace.tokens)
    second = oracle.predict(trace.tokens)
    for a, b in zip(first.scaling, second.scaling, strict=True):
        np.testing.assert_array_equal(a, b)


def batch(seed: int) -> TokenBatch:
    return ragged(np.random.default_rng(seed), rows=6, vocab=VOCAB, streams=2)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.experts, b.experts, strict=True))


def test_chance_is_the_same_for_the_same_batch_and_seed_only():
    table = Random(SHAPE, 3, seed=0).predict(batch(0))
    assert same(table, Random(SHAPE, 3, seed=0).predict(batch(0)))
    assert not same(table, Random(SHAPE, 3, seed=1).predict(batch(0)))
    again = Random(SHAPE, 3, seed=0)
    again.predict(batch(1))
    assert same(table, again.predict(batch(0)))  # whatever it was asked before


def test_chance_names_different_experts_for_a_token_and_all_experts_in_the_end():
    tokens = ragged(np.random.default_rng(2), rows=100, vocab=VOCAB, streams=2)
    table = Random(SHAPE, 3, seed=0).predict(tokens)
    for experts, n, stream in zip(table.experts, SHAPE.experts, SHAPE.streams, strict=True):
        assert experts.shape == (len(tokens.flat(stream)), 3)
        assert all(len(set(row)) == 3 for row in experts.tolist())
        counts = np.bincount(experts.ravel(), minlength=n)
        assert len(counts) == n
        np.testing.assert_allclose(counts / counts.sum(), 1 / n, atol=0.03)


def test_chance_gives_all_experts_when_there_are_no_more_than_top_k():
    table = Random(SHAPE, 8, seed=0).predict(batch(0))
    assert [experts.shape[1] for experts in table.experts] == [8, 6]
