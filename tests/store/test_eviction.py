"""Who goes first, and what it is worth."""

from __future__ import annotations

import heapq
import math
import random

import pytest
import torch

from store.copies import CopyEngine
from store.eviction import FIFO, LRU, POLICIES, LookAhead
from store.layout import Key
from store.slots import Slots
from tests.store.lane_model import make_arena

A, B, C, D = (0, 1), (0, 2), (1, 1), (1, 2)


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


# LookAhead.


def test_who_is_wanted_last_goes_first_to_a_policy_that_looks_ahead():
    policy = admit(LookAhead(), A, B, C)
    for key, position in ((A, 5), (B, 9), (C, 2)):
        policy.wanted(key, position)
    assert list(policy.order()) == [B, A, C]


def test_before_those_wanted_go_those_that_nobody_wants_the_least_recently_used_first():
    policy = admit(LookAhead(), A, B, C, D)
    policy.wanted(B, 1000)
    policy.used(A)
    assert list(policy.order()) == [C, D, A, B]
    policy.used(C)
    assert list(policy.order()) == [D, A, C, B]


def test_the_order_follows_what_is_wanted_now():
    policy = admit(LookAhead(), A, B)
    policy.wanted(A, 3)
    policy.wanted(B, 4)
    assert list(policy.order()) == [B, A]
    policy.wanted(A, 5)
    assert list(policy.order()) == [A, B]
    policy.wanted(B, None)
    assert list(policy.order()) == [B, A]


def test_what_is_wanted_of_one_who_is_not_there_counts_when_it_comes():
    policy = admit(LookAhead(), A)
    policy.wanted(A, 5)
    policy.wanted(B, 8)
    policy.wanted(C, 2)
    admit(policy, B, C)
    assert list(policy.order()) == [B, A, C]
    policy.evicted(B)
    policy.wanted(B, 1)
    admit(policy, B)
    assert list(policy.order()) == [A, C, B]


def test_a_policy_that_looks_ahead_agrees_with_one_that_sorts_anew_each_time():
    rng = random.Random(0)
    keys = [(layer, expert) for layer in range(3) for expert in range(6)]
    for _ in range(20):
        policy = LookAhead()
        touched: dict[Key, int] = {}  # of the resident ones
        counts: dict[Key, int] = {}  # the same, as it was when none wanted it, or when that changed
        wanted: dict[Key, int] = {}
        for now in range(400):
            key = rng.choice(keys)
            what = rng.choice(("come or go", "used", "wanted", "wanted", "not wanted"))
            if what == "come or go" and key in touched:
                policy.evicted(key)
                del touched[key]
            elif what == "come or go":
                policy.admitted(key)
                touched[key] = counts[key] = now
            elif what == "used" and key in touched:
                policy.used(key)
                touched[key] = now
            elif what == "wanted":
                wanted[key] = rng.randrange(30)
                policy.wanted(key, wanted[key])
            elif what == "not wanted":
                wanted.pop(key, None)
                policy.wanted(key, None)
            if key in touched and (what in ("wanted", "not wanted") or key not in wanted):
                counts[key] = touched[key]
            order = sorted(touched, key=lambda key: (-wanted.get(key, math.inf), counts[key]))
            assert list(policy.order()) == order


# What it is worth.

Trace = list[list[list[int]]]  # batch -> layer -> experts
TRACES = {
    "few of many": (4, 32, 6, 1.0, 25),
    "few of many, half of the slots": (4, 32, 6, 1.0, 51),
    "a layer takes a third of the slots": (6, 32, 12, 0.8, 38),
    "half of the experts fit": (6, 32, 12, 0.8, 96),
    "a layer takes half of the slots": (3, 64, 40, 0.6, 76),
    "small": (2, 16, 4, 1.2, 9),
}
"""(layers, experts, experts used by a layer, exponent, slots)."""


def zipf(layers: int, experts: int, used: int, exponent: float, batches: int = 60) -> Trace:
    """Each layer has its own favourites; the experts of a layer of a batch differ."""
    generator = torch.Generator().manual_seed(0)
    weights = [(1.0 / (1 + torch.randperm(experts, generator=generator))) ** exponent for _ in range(layers)]
    return [[torch.multinomial(w, used, generator=generator).tolist() for w in weights] for _ in range(batches)]


def fewest_moves(trace: Trace, slots: int) -> int:
    """Belady's MIN, which may also read in place: after every layer those stay that are used next, of all that it had at hand."""
    history = [[(layer, expert) for expert in experts] for batch in trace for layer, experts in enumerate(batch)]
    next_uses: list[dict[Key, float]] = []
    soonest: dict[Key, float] = {}
    for at in reversed(range(len(history))):
        next_uses.append({key: soonest.get(key, math.inf) for key in history[at]})
        soonest.update(dict.fromkeys(history[at], at))
    resident: dict[Key, float] = {}
    moves = 0
    for keys, uses in zip(history, reversed(next_uses), strict=True):
        moves += sum(key not in resident for key in keys)
        resident |= uses
        resident = dict(heapq.nsmallest(slots, resident.items(), key=lambda item: item[1]))
    return moves


def moves_of(policy: str, trace: Trace, experts: int, slots: int, lookahead: int) -> int:
    """Experts that cross the link, copied or read in place, when tables are right and `lookahead` batches ahead."""
    arena = make_arena([(experts, 256)] * len(trace[0]))
    engine = CopyEngine(arena, Slots(arena, slots, torch.device("cpu")), POLICIES[policy](), background=False)
    for planned in range(len(trace) + lookahead):
        if planned < len(trace):
            engine.plan(planned, [[(expert, 1.0) for expert in layer] for layer in trace[planned]])
        if (batch := planned - lookahead) >= 0:
            for layer, used in enumerate(trace[batch]):
                with engine.reading(batch, layer, used):
                    pass
            engine.finish(batch)
    moved = engine.take()
    return (moved.prefetch_bytes + moved.read_in_place_bytes) // 256


@pytest.mark.parametrize("name", TRACES)
def test_with_right_tables_a_policy_that_looks_ahead_moves_least_and_none_less_than_min(name):
    layers, experts, used, exponent, slots = TRACES[name]
    trace = zipf(layers, experts, used, exponent)
    fewest = fewest_moves(trace, slots)
    moves = {policy: moves_of(policy, trace, experts, slots, lookahead=16) for policy in POLICIES}
    assert fewest <= moves["lookahead"] < 1.4 * fewest  # this link is infinitely fast: whatever may come early does
    assert min(moves["lru"], moves["fifo"]) > 1.2 * moves["lookahead"]


@pytest.mark.parametrize("name", TRACES)
def test_tables_further_ahead_save_moves(name):
    layers, experts, used, exponent, slots = TRACES[name]
    trace = zipf(layers, experts, used, exponent)
    assert moves_of("lookahead", trace, experts, slots, 16) < moves_of("lookahead", trace, experts, slots, 1)
