"""Who goes first, and what it is worth."""

from __future__ import annotations

import heapq
import math
import random

import pytest
import torch

from store import foresight
from store.copies import CopyEngine
from store.eviction import FIFO, LFU, LIFO, LRU, POLICIES, LookAhead, Priority
from store.foresight import HALF_LIFE
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


def test_lfu_evicts_what_was_used_least_often_and_among_equals_the_oldest():
    policy = admit(LFU(), A, B, C)
    for key in (B, A, B, C):
        policy.used(key)
    assert list(policy.order()) == [A, C, B]


def test_to_lfu_a_use_in_place_counts_and_an_eviction_forgets_none():
    policy = admit(LFU(), A, B)
    for key in (C, C, A, B, B, B):
        policy.used(key)
    policy.evicted(B)
    admit(policy, C, B)
    assert list(policy.order()) == [A, C, B]


def test_lifo_evicts_first_what_the_batch_does_not_use_then_the_last_in():
    policy = admit(LIFO(), A, B, C, D)
    policy.wanted(A, 3)
    policy.wanted(D, 2)
    assert list(policy.order()) == [B, C, D, A]


def test_to_lifo_a_batch_uses_what_it_has_used_until_it_ends():
    policy = admit(LIFO(), A, B, C)
    policy.wanted(B, 3)
    policy.wanted(B, None)
    policy.used(B)
    policy.wanted(C, 4)
    assert list(policy.order()) == [A, C, B]
    policy.finished()
    assert list(policy.order()) == [A, B, C]


def test_priority_evicts_what_is_least_probable_for_its_distance():
    policy = admit(Priority(), A, B, C, D)
    policy.wanted(A, 10, 0.9)  # 0.09 per layer
    policy.wanted(B, 4, 0.6)  # 0.15
    policy.wanted(C, 10, 0.5)  # 0.05
    assert list(policy.order()) == [D, C, A, B]


def test_priority_measures_distance_from_what_has_passed():
    policy = admit(Priority(), A, B)
    policy.wanted(A, 20, 1.0)
    policy.wanted(B, 12, 0.55)
    assert list(policy.order()) == [B, A]
    policy.wanted(C, 11, 1.0)
    policy.wanted(C, None)  # it is 11 now
    assert list(policy.order()) == [A, B]


def test_to_priority_those_that_nobody_wants_come_first_the_least_recently_used_before_all():
    policy = admit(Priority(), A, B, C)
    policy.wanted(B, 1000, 0.5)
    policy.used(A)
    assert list(policy.order()) == [C, A, B]


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


def test_a_use_that_may_fail_to_come_counts_as_later():
    policy = admit(LookAhead(), A, B)
    for position in range(0, 100, 10):
        policy.wanted(C, position)  # experts come back after ten layers
    policy.wanted(A, 7, 0.5)
    policy.wanted(B, 7)
    assert list(policy.order()) == [A, B]
    policy.wanted(B, 8, 0.99)
    assert list(policy.order()) == [B, A]  # a mean learns slowly


def test_beyond_the_tables_what_is_often_used_stays_before_what_was_used_last():
    policy = admit(LookAhead(), A, B, C)
    for key in (A, A, A, B, C):
        policy.used(key)
    assert list(policy.order()) == [B, C, A]


def test_beyond_the_tables_whoever_would_be_the_first_to_go_is_not_let_in():
    policy = admit(LookAhead(), A)
    policy.used(A)
    assert not policy.outlasts(B, A), "one use, this one, beside two"
    policy.used(B)
    assert policy.outlasts(B, A), "two, and newer"
    assert all(POLICIES[name]().outlasts(B, A) for name in POLICIES if name != "lookahead"), "they take whom they like"


def test_what_was_often_used_long_ago_goes_in_the_end():
    policy = admit(LookAhead(), A, B)
    for _ in range(50):
        policy.used(A)
    for _ in range(round(30 * HALF_LIFE)):
        policy.used(B)
    assert list(policy.order()) == [A, B]
    for _ in range(30):
        policy.used(A)
    policy.used(C)  # read in place: remembered for when it comes
    assert list(policy.order()) == [A, B]


@pytest.mark.parametrize("said", [False, True], ids=["nobody says which layers pass", "passes are told"])
def test_weighing_anew_changes_no_order(monkeypatch, said):
    policies = [LookAhead(), LookAhead()]
    experts = [(layer, expert) for layer in range(3) for expert in range(6)]
    rng = random.Random(5)
    resident: set[Key] = set()
    heaviest = [float("inf"), 1.05]  # never, and after every few uses
    for step in range(400):
        key = rng.choice(experts)
        if key not in resident:
            what, details = "admitted", (key,)
            resident.add(key)
        else:
            what, details = rng.choice(
                [("used", (key,)), ("used", (key,)), ("evicted", (key,)), ("wanted", (key, step + 9)), ("wanted", (key, None))]
            )
            if what == "evicted":
                resident.remove(key)
        orders = []
        for policy, most in zip(policies, heaviest, strict=True):
            monkeypatch.setattr(foresight, "HEAVIEST", most)
            getattr(policy, what)(*details)
            if said and step % 5 == 0:
                policy.reads(key[0], 2)
            orders.append(list(policy.order()))
        if said:  # layers are compared as they were when they passed, or were weighed
            orders = [sorted(order, key=lambda key: key[0]) for order in orders]
        assert orders[0] == orders[1], step
    assert policies[1]._use < 1.1 < policies[0]._use


def test_of_equals_the_one_goes_whose_layer_has_just_been_read():
    policy, first = admit(LookAhead(), A, C), []
    for _ in range(4):
        for layer, key in enumerate((A, C)):
            policy.reads(layer, 1)
            policy.used(key)
            first.append(next(iter(policy.order())))
        policy.finished()
    assert first[2:] == [A, C] * 3, "the other's layer is the next"


def test_what_is_rarely_used_goes_before_what_has_just_been_read():
    policy = admit(LookAhead(), A, B, C)
    for batch in range(12):
        policy.reads(0, 1)
        policy.used(B if batch % 4 == 3 else A)
        policy.reads(1, 1)
        policy.used(C)
        policy.finished()
        assert batch < 6 or next(iter(policy.order())) == B


def test_a_policy_that_looks_ahead_agrees_with_one_that_sorts_anew_each_time():
    rng = random.Random(0)
    keys = [(layer, expert) for layer in range(3) for expert in range(6)]
    for _ in range(20):
        policy = LookAhead()
        resident: set[Key] = set()
        weight: dict[Key, float] = {}
        counts: dict[Key, float] = {}  # the same, as it was when none wanted it, or when that changed
        wanted: dict[Key, int] = {}
        time = 0.0
        for _ in range(400):
            key = rng.choice(keys)
            what = rng.choice(("come or go", "used", "wanted", "wanted", "not wanted"))
            if what == "come or go" and key in resident:
                policy.evicted(key)
                resident.remove(key)
            elif what in ("come or go", "used"):
                time += 1 / (HALF_LIFE * (len(resident) + 1))
                weight[key] = weight.get(key, 0) + 2**time
                if what == "used":
                    policy.used(key)
                else:
                    policy.admitted(key)
                    resident.add(key)
            elif what == "wanted":
                wanted[key] = rng.randrange(30)
                policy.wanted(key, wanted[key])
            else:
                wanted.pop(key, None)
                policy.wanted(key, None)
            if key in resident and (what != "used" or key not in wanted):
                counts[key] = weight[key]
            assert list(policy.order()) == sorted(resident, key=lambda key: (-wanted.get(key, math.inf), counts[key]))


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
                with engine.reading(batch, layer, used) as blocks:
                    assert len([*blocks]) == len(used)
            engine.finish(batch)
    moved = engine.take()
    return (moved.prefetch_bytes + moved.read_in_place_bytes) // 256


@pytest.mark.parametrize("name", TRACES)
def test_with_right_tables_a_policy_that_looks_ahead_moves_least_and_none_less_than_min(name):
    layers, experts, used, exponent, slots = TRACES[name]
    trace = zipf(layers, experts, used, exponent)
    fewest = fewest_moves(trace, slots)
    moves = {policy: moves_of(policy, trace, experts, slots, lookahead=16) for policy in POLICIES}
    assert moves["lookahead"] == moves["priority"] == fewest
    assert min(moves[name] for name in ("fifo", "lru", "lfu", "lifo")) > 1.2 * moves["lookahead"]


@pytest.mark.parametrize("name", TRACES)
def test_tables_further_ahead_save_moves(name):
    layers, experts, used, exponent, slots = TRACES[name]
    trace = zipf(layers, experts, used, exponent)
    none, one, many = (moves_of("lookahead", trace, experts, slots, lookahead) for lookahead in (0, 1, 16))
    assert none > one >= many


@pytest.mark.parametrize("asked", [False, True], ids=("tables", "routers asked"))
def test_nobody_is_left_out_of_an_order_that_is_asked_for_and_left_again_and_again(asked):
    """Wanted, and wanted no more without a use: then an expert stands where it stood, and stale twins of it beside it."""
    rng = random.Random(0)
    policy, resident = LookAhead(), set()
    for step in range(4000):
        key = (rng.randrange(3), rng.randrange(6))
        if key not in resident and len(resident) < 7:
            policy.admitted(key)
            resident.add(key)
        if rng.random() < 0.3:
            policy.used(key)
        policy.wanted(key, rng.choice([None, step, step + 5]))
        policy.wanted(rng.choice([*resident]), None)
        if asked and rng.random() < 0.3:
            policy.reads(key[0], rng.randrange(1, 6))
        first = next(policy.order())
        assert first in resident
        if rng.random() < 0.3:
            policy.evicted(first)
            resident.remove(first)
        if step % 50 == 0:
            assert {*policy.order()} == resident
        if rng.random() < 0.02:
            policy.finished()
    assert {*policy.order()} == resident
