"""Loads from traces and tables, and the paper's two measures, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.parallel.load import Balance, measured, predicted
from pipeline.parallel.placement import EVERYWHERE, Assignment
from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape
from tests.predictor.made_traces import ragged, random_trace

SHAPE = RoutingShape(experts=(6, 4), streams=(0, 1), top_k=2, vocab_size=30)


def test_measured_load_is_the_share_of_token_expert_pairs_that_the_router_chose():
    rng = np.random.default_rng(0)
    traces = [random_trace(rng, ragged(rng, 3, 30, 2), SHAPE, top_t=4) for _ in range(5)]
    loads = measured(traces, SHAPE)
    assert [load.shape for load in loads] == [(5, 6), (5, 4)]
    for i, load in enumerate(loads):
        for batch, trace in enumerate(traces):
            chosen = trace.layers[i].top[:, :2]
            for expert in range(SHAPE.experts[i]):
                assert load[batch, expert] == pytest.approx((chosen == expert).sum() / chosen.size)


def test_predicted_load_weighs_by_probability_and_ignores_experts_that_are_not_named():
    table = HashTable(
        (np.array([[2, 0], [2, -1]], dtype=np.int16), np.array([[-1, -1]], dtype=np.int16)),
        (np.array([[0.6, 0.4], [1.0, 0.7]], dtype=np.float32), np.zeros((1, 2), dtype=np.float32)),
        (np.zeros((2, 2), dtype=np.float32), np.zeros((1, 2), dtype=np.float32)),
    )
    first, second = predicted([table], SHAPE)
    assert first[0] == pytest.approx([0.2, 0, 0.8, 0, 0, 0])
    assert not second.any()


def test_max_load_is_the_worst_of_all_and_avg_max_load_the_mean_of_each_batchs_busiest():
    load = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]])  # the last batch does not reach it
    plan = Assignment((np.array([0, 0, 1, 1], dtype=np.int16),), 2)
    balance = Balance.of([load], plan)
    assert balance.max_load == pytest.approx(0.8)
    assert balance.avg_max_load == pytest.approx((0.8 + 0.7) / 2)
    assert balance.avg_max_used == pytest.approx((2 + 2) / 2)


def test_an_expert_that_is_everywhere_does_an_equal_share_at_each_device():
    load = np.array([[0.6, 0.3, 0.1]])
    plan = Assignment((np.array([EVERYWHERE, 0, 1], dtype=np.int16),), 2)
    balance = Balance.of([load], plan)
    assert balance.max_load == pytest.approx(0.6) and balance.avg_max_used == 2
