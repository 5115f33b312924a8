"""Who goes first."""

from __future__ import annotations

import random

import pytest

from store.eviction import FIFO, LRU, POLICIES

A, B, C = (0, 1), (0, 2), (1, 1)


def admit(policy, *keys):
    for key in keys:
        policy.admitted(key)
    return policy


def test_fifo_evicts_in_the_order_of_admission_whatever_is_used():
    policy = admit(FIFO(), A, B, C)
    policy.used(A)
    policy.used(B)
    assert list(policy.order()) == [A, B, C]


def test_lru_evicts_what_was_not_used_for_longest():
    policy = admit(LRU(), A, B, C)
    policy.used(A)
    assert list(policy.order()) == [B, C, A]
    policy.used(B)
    policy.used(A)
    assert list(policy.order()) == [C, B, A]


def test_to_lru_an_admission_is_a_use():
    policy = admit(LRU(), A, B)
    policy.used(A)
    policy.admitted(C)
    assert list(policy.order()) == [B, A, C]


@pytest.mark.parametrize("name", ["fifo", "lru"])
def test_an_expert_that_comes_back_goes_to_the_end(name):
    policy = admit(POLICIES[name](), A, B, C)
    policy.evicted(A)
    assert list(policy.order()) == [B, C]
    policy.admitted(A)
    assert list(policy.order()) == [B, C, A]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_orders_exactly_the_resident_experts(name):
    policy, resident = POLICIES[name](), set()
    rng = random.Random(0)
    keys = [(layer, expert) for layer in range(2) for expert in range(5)]
    for _ in range(500):
        key = rng.choice(keys)
        if key not in resident:
            policy.admitted(key)
            resident.add(key)
        elif rng.random() < 0.5:
            policy.used(key)
        else:
            policy.evicted(key)
            resident.remove(key)
        order = list(policy.order())
        assert len(order) == len(resident)
        assert set(order) == resident
