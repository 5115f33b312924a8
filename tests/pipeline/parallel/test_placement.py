"""Who gets which expert: against brute force where that is possible, and by what must hold everywhere."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from pipeline.parallel.load import Balance
from pipeline.parallel.placement import (
    EVERYWHERE,
    PLACEMENTS,
    Assignment,
    anti_correlation,
    correlation,
    greedy,
    place,
    round_robin,
)


def loads(seed: int, batches: int = 20, experts: int = 12, skew: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(30 * (1 + np.arange(experts)[::-1]) ** skew * rng.uniform(0.2, 2, (batches, experts)) / experts)
    counts[:, 0] += 1
    return counts / counts.sum(axis=1, keepdims=True)


def busiest_mean(load: np.ndarray, owner: np.ndarray, devices: int) -> float:
    return max(load.mean(axis=0)[owner == device].sum() for device in range(devices))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("experts", "devices"), [(12, 4), (13, 4), (3, 4), (1, 2), (64, 8), (7, 1)])
def test_every_expert_has_one_owner_and_no_device_has_two_more_than_another(placement, experts, devices):
    owner = PLACEMENTS[placement](loads(1, experts=experts), devices)
    held = np.bincount(owner, minlength=devices)
    assert owner.shape == (experts,) and held.sum() == experts and len(held) == devices
    assert held.max() - held.min() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_near_the_best_of_all_even_splits(seed):
    load = loads(seed, experts=10)
    best = min(
        busiest_mean(load, np.isin(np.arange(10), chosen).astype(int), 2) for chosen in combinations(range(10), 5) if 0 in chosen
    )
    found = busiest_mean(load, greedy(load, 2), 2)
    assert best <= found + 1e-12 and found <= 1.08 * best
    assert found < busiest_mean(load, round_robin(load, 2), 2)


def test_greedy_is_the_papers_procedure_step_by_step():
    load = np.array([[0.4, 0.05, 0.3, 0.1, 0.1, 0.05]])
    # 0 -> device 0, 2 -> 1, 3 -> 1 (0.3 < 0.4), 4 -> 0 or 1: both have 0.4, the first; 1 -> 1 (0.4 < 0.5); 5 -> 0, the only place
    assert greedy(load, 2).tolist() == [0, 1, 1, 1, 0, 0]


def test_anti_correlation_parts_experts_that_are_busy_together_where_greedy_cannot_see_it():
    busy = np.array([1.0, 0.0] * 8)
    load = np.stack([busy, busy, 1 - busy, 1 - busy], axis=1) / 2 + np.array([4e-3, 3e-3, 2e-3, 1e-3])
    load /= load.sum(axis=1, keepdims=True)
    owner = anti_correlation(load, 2)
    assert owner[0] != owner[1] and owner[2] != owner[3]
    best = min(
        Balance.of([load], Assignment((np.array(each, dtype=np.int16),), 2)).avg_max_load
        for each in product((0, 1), repeat=4)
        if sum(each) == 2
    )
    assert Balance.of([load], Assignment((owner,), 2)).avg_max_load == pytest.approx(best, abs=1e-3)
    together = np.stack([busy, 1 - busy, busy, 1 - busy], axis=1) / 2  # equal means: greedy takes turns
    assert Balance.of([together], place([together], 2, "greedy")).max_load == 1.0
    assert Balance.of([together], place([together], 2, "anti_correlation")).max_load == 0.5


def test_without_any_change_between_batches_anti_correlation_is_greedy():
    load = np.repeat(loads(3, batches=1), 5, axis=0)
    assert np.array_equal(anti_correlation(load, 4), greedy(load, 4))
    assert not correlation(load).any()


def test_correlation_is_pearsons():
    load = loads(4)
    assert np.allclose(correlation(load), np.corrcoef(load.T))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_replicas_are_the_hottest_of_each_layer_on_every_device_and_the_rest_is_shared_out(placement):
    layers = [loads(5), loads(6, experts=9)]
    plan = place(layers, 4, placement, replicas=2)
    for load, owner in zip(layers, plan.owners, strict=True):
        hottest = set(np.argsort(-load.mean(axis=0))[:2].tolist())
        assert set(np.flatnonzero(owner == EVERYWHERE).tolist()) == hottest
        held = np.bincount(owner[owner != EVERYWHERE], minlength=4)
        assert held.max() - held.min() <= 1
    for device in range(4):
        assert all(hot in plan.own(device)[0] for hot in np.flatnonzero(plan.owners[0] == EVERYWHERE))
    assert plan.most == max(sum(map(len, plan.own(device))) for device in range(4))


def test_more_replicas_than_experts_put_all_of_them_everywhere():
    plan = place([loads(7, experts=3)], 2, "greedy", replicas=9)
    assert plan.own(0) == plan.own(1) == [[0, 1, 2]]
    assert Balance.of([loads(8, experts=3)], plan).max_load == pytest.approx(0.5)
