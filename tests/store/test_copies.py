"""The copy engine: what moves, who goes, and that a reader sees the arena's bytes whatever happens at the same time.

Synchronous engines first, where every move can be written down beforehand, then real threads under stress, then failures.
test_copy_schedules.py goes through the orders of steps one by one.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from store.arena import Arena, build
from store.copies import CopyEngine
from store.eviction import FIFO, LRU, POLICIES, LookAhead
from store.just_in_time import SURE
from store.layout import ArenaLayout, Key
from store.slots import Slots

PATIENCE_S = 30
CPU = torch.device("cpu")
BLOCK = 1024
A, B, C, D = range(4)
Uses = Sequence[Sequence[tuple[int, float]]]


def make_arena(path: Path, layers: Sequence[tuple[int, int]]) -> Arena:
    """Layers of (experts, block bytes), full of bytes that differ from expert to expert."""
    layout = ArenaLayout.of([(experts, {"w": ((nbytes,), "uint8")}) for experts, nbytes in layers], {})
    noise = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return build(path, layout, "", lambda memory: memory.copy_(noise))


@pytest.fixture
def arena(arena_dir: Path) -> Arena:
    """Two MoE layers of five experts of 1 KiB."""
    return make_arena(arena_dir / "a", [(5, BLOCK), (5, BLOCK)])


def sure(*layers: Sequence[int]) -> Uses:
    """A plan that is certain of its experts."""
    return [[(expert, 1.0) for expert in layer] for layer in layers]


class Watched:
    """An arena whose blocks may be slow or broken.

    Attributes:
        copied: what an engine has copied ahead (`watch`); a miss that stays is not among it.
    """

    def __init__(self, arena: Arena, before: Callable[[Key], None] = lambda key: None):
        self.layout, self._arena, self._before = arena.layout, arena, before
        self.copied: list[Key] = []

    def block(self, layer: int, expert: int) -> torch.Tensor:
        self._before((layer, expert))
        return self._arena.block(layer, expert)


def watch(engine: CopyEngine) -> CopyEngine:
    copy = engine._copy

    def recorded(key: Key, slot: torch.Tensor) -> None:
        engine._arena.copied.append(key)
        copy(key, slot)

    engine._copy = recorded
    return engine


@pytest.fixture
def make(arena: Arena) -> Iterator[Callable[..., CopyEngine]]:
    """make(slots, policy, background, before) -> an engine; `copied(engine)` says what it copied."""
    engines = []

    def made(count: int, policy=FIFO, background: bool = False, before: Callable[[Key], None] = lambda key: None) -> CopyEngine:
        engines.append(watch(CopyEngine(Watched(arena, before), Slots(arena, count, CPU), policy(), background)))
        return engines[-1]

    yield made
    in_threads(*(engine.close for engine in engines))


def copied(engine: CopyEngine) -> list[Key]:
    return engine._arena.copied


def resident(engine: CopyEngine, *keys: Key) -> list[bool]:
    return [engine.slots.is_ready(key) for key in keys]


def read(engine: CopyEngine, batch: int, layer: int, *experts: int) -> None:
    with engine.reading(batch, layer, experts) as views:
        seen = []
        for at, view in views:
            assert torch.equal(view["w"], engine._arena._arena.block(layer, experts[at]))
            seen.append(at)
        assert sorted(seen) == [*range(len(experts))]


# Synchronous: every move is known.


def test_planned_experts_are_copied_in_the_order_of_layers_and_likelihood(make):
    engine = make(10)
    engine.plan(0, [[(D, 0.98), (A, 0.95)], [(C, 1.0), (B, 0.91)]])
    engine.plan(1, sure([B, A], []))
    assert copied(engine) == [(0, D), (0, A), (1, C), (1, B), (0, B)]
    assert engine.take().prefetch_bytes == 5 * BLOCK


def test_what_was_predicted_is_a_hit_and_what_was_not_is_read_in_place(make):
    engine = make(10)
    engine.plan(0, sure([A, B], [C]))
    engine.take()
    read(engine, 0, 0, A, B, C)
    read(engine, 0, 1, A)
    moved = engine.take()
    assert (moved.hits, moved.misses) == ([2, 0], [1, 1])
    assert moved.read_in_place_bytes == 2 * BLOCK
    assert (moved.prefetch_bytes, moved.demand_bytes) == (0, 0)
    assert copied(engine) == [(0, A), (0, B), (1, C)]


def test_a_miss_stays_if_there_is_room_or_somebody_who_is_not_wanted_sooner_and_worth_no_more(make):
    """It moves anyway: it is one move, and none when it comes again."""
    engine = make(2, LookAhead)
    read(engine, 0, 0, A)
    read(engine, 1, 0, A, B)
    moved = engine.take()
    assert (moved.hits[0], moved.misses[0], moved.read_in_place_bytes) == (1, 2, 2 * BLOCK)
    assert (moved.prefetch_bytes, copied(engine)) == (0, [])
    engine.plan(8, sure([B], []))
    for batch in (2, 3):
        read(engine, batch, 0, C)  # nobody wants A either, which has come and been read twice
        assert resident(engine, (0, A), (0, B), (0, C)) == [True, True, False]
    read(engine, 4, 0, C)
    assert resident(engine, (0, A), (0, B), (0, C)) == [False, True, True]
    engine.plan(9, sure([C], []))
    read(engine, 5, 0, D)  # both are wanted, and D is not
    assert resident(engine, (0, B), (0, C), (0, D)) == [True, True, False]
    engine.plan(10, sure([D], []))
    read(engine, 6, 0, D)  # D is, but last
    assert resident(engine, (0, B), (0, C), (0, D)) == [True, True, False]


def test_nobody_goes_for_an_expert_whose_layer_is_not_the_next_to_be_read(make):
    """That no table wants A and B yet says little: the next one may."""
    engine = make(2, LookAhead)
    read(engine, 0, 0, A, B)
    engine.plan(1, sure([], []))
    engine.plan(2, sure([C], []))
    assert copied(engine) == []
    engine.plan(3, sure([A, B], []))
    for batch in (1, 2):
        read(engine, batch, 0, *([], [C])[batch - 1])
        read(engine, batch, 1)
        engine.finish(batch)
    read(engine, 3, 0, A, B)
    assert engine.take().hits[0] == 2, "C was read in place: A and B are wanted sooner than it is again"


def test_a_copy_for_one_layer_only_is_made_at_nobodys_cost_who_is_worth_more(make):
    engine = make(1, LookAhead)
    for batch in range(3):
        read(engine, batch, 0, A)
    engine.plan(3, sure([B], []))
    assert copied(engine) == [] and resident(engine, (0, A)) == [True]


def test_a_miss_that_stays_takes_no_slot_that_is_being_read(make):
    engine = make(2)
    read(engine, 0, 0, A, B, C)
    assert resident(engine, (0, A), (0, B), (0, C)) == [True, True, False]
    moved = engine.take()
    assert (moved.misses[0], moved.read_in_place_bytes) == (3, 3 * BLOCK)


def test_on_the_word_of_a_predictor_that_guesses_nothing_is_copied_any_more(make):
    engine = make(2)
    for batch in range(30):
        engine.plan(batch, sure([A], []))
        read(engine, batch, 0, B, C)
        engine.finish(batch)
    assert 1 <= len(copied(engine)) < 15
    before = len(copied(engine))
    engine.plan(30, sure([A], []))
    assert len(copied(engine)) == before


def test_what_moved_is_told_once(make):
    engine = make(10)
    engine.plan(0, sure([A], []))
    read(engine, 0, 0, A, B)
    first, second = engine.take(), engine.take()
    assert (first.prefetch_bytes, first.read_in_place_bytes, first.hits, first.misses) == (BLOCK, BLOCK, [1, 0], [1, 0])
    assert (second.prefetch_bytes, second.read_in_place_bytes, second.hits, second.misses) == (0, 0, [0, 0], [0, 0])
    assert sum(experts for _, _, experts in first.copy_spans) == 1, "a miss that stays is no copy ahead"
    assert second.copy_spans == []


def test_copy_spans_count_every_copy_and_lie_in_order(make):
    engine = make(10)
    engine.plan(0, sure([A, B, C], [A, B]))
    spans = engine.take().copy_spans
    assert sum(experts for _, _, experts in spans) == 5
    assert all(start <= end for start, end, _ in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_two_slots_serve_a_batch_layer_by_layer(make):
    """Each step written out: slots are taken from those whose use is past, and by nobody else."""
    engine = make(2)
    engine.plan(0, sure([A, B], [C, D]))
    assert copied(engine) == [(0, A), (0, B)]  # full, and both are wanted before layer 1
    read(engine, 0, 0, A, B)
    assert copied(engine)[2:] == [(1, C), (1, D)]
    read(engine, 0, 1, C, D)
    engine.finish(0)
    moved = engine.take()
    assert (moved.hits, moved.misses) == ([2, 2], [0, 0])
    assert moved.prefetch_bytes == 4 * BLOCK
    assert moved.read_in_place_bytes == 0
    assert engine.slots.resident_peak_bytes == 2 * BLOCK


def test_one_slot_moves_one_expert_per_use(make):
    engine = make(1)
    engine.plan(0, sure([A, B], [C]))  # B has no chance: A is wanted as soon
    read(engine, 0, 0, A, B)
    read(engine, 0, 1, C)
    engine.finish(0)
    moved = engine.take()
    assert copied(engine) == [(0, A), (1, C)]
    assert (moved.hits, moved.misses) == ([1, 1], [1, 0])
    assert (moved.prefetch_bytes, moved.read_in_place_bytes) == (2 * BLOCK, BLOCK)


def test_blocks_of_different_sizes_are_counted_by_their_own(arena_dir):
    arena = make_arena(arena_dir / "b", [(3, 256), (3, 1024)])
    engine = CopyEngine(Watched(arena), Slots(arena, 2, CPU), FIFO(), background=False)
    engine.plan(0, sure([A], [B]))
    read(engine, 0, 0, A, C)
    read(engine, 0, 1, B, C, A)
    moved = engine.take()
    assert moved.prefetch_bytes == 256 + 1024
    assert moved.read_in_place_bytes == 256 + 2 * 1024
    assert engine.slots.resident_peak_bytes == 1024 + 1024, "one of the last layer's misses has stayed beside B"


def test_without_slots_everything_is_read_in_place_and_nothing_piles_up(make):
    engine = make(0)
    for batch in range(5):
        engine.plan(batch, sure([A, B], [C]))
    for batch in range(5):
        read(engine, batch, 0, A, B)
        read(engine, batch, 1, C)
        engine.finish(batch)
    moved = engine.take()
    assert copied(engine) == []
    assert (moved.hits, moved.misses) == ([0, 0], [10, 5])
    assert (moved.prefetch_bytes, moved.read_in_place_bytes) == (0, 15 * BLOCK)
    assert engine.slots.resident_peak_bytes == 0
    assert not engine._queue
    assert not engine._wanted
    assert not any(engine._next_uses.values())


def test_with_a_slot_for_all_each_expert_moves_once(make):
    engine = make(10)
    for batch in range(6):
        engine.plan(batch, sure(range(5), range(5)))
        for layer in (0, 1):
            read(engine, batch, layer, *range(5))
        engine.finish(batch)
    moved = engine.take()
    assert moved.prefetch_bytes == 10 * BLOCK
    assert moved.hits == [30, 30]
    assert moved.read_in_place_bytes == 0


@pytest.mark.parametrize(("policy", "evicted"), [(FIFO, A), (LRU, B)])
def test_among_those_that_nobody_wants_the_policy_chooses(make, policy, evicted):
    engine = make(2, policy)
    engine.plan(0, sure([A, B], []))
    read(engine, 0, 0, B)
    read(engine, 0, 0, A)
    engine.finish(0)
    engine.plan(1, sure([C], []))
    assert resident(engine, (0, A), (0, B), (0, C)) == [evicted != A, evicted != B, True]


def test_to_fifo_one_who_was_evicted_and_comes_back_is_the_last_in(make):
    engine = make(2)
    for batch, experts in enumerate(([A, B], [C], [A], [D])):
        engine.plan(batch, sure(experts, []))
        engine.finish(batch)
    assert copied(engine) == [(0, A), (0, B), (0, C), (0, A), (0, D)]
    assert resident(engine, (0, A), (0, B), (0, C), (0, D)) == [True, False, False, True]


@pytest.mark.parametrize("policy", [FIFO, LRU])
def test_nobody_is_evicted_whom_a_queued_table_wants_sooner(make, policy):
    """A is first by either policy, but wanted by batch 1; B is wanted later than C, so B goes for it."""
    engine = make(2, policy)
    engine.plan(0, sure([A, B], []))
    read(engine, 0, 0, A, B)
    engine.finish(0)
    engine.plan(1, sure([A], []))
    engine.plan(2, sure([C], []))
    engine.plan(3, sure([B], []))
    assert resident(engine, (0, A), (0, B), (0, C)) == [True, False, True]
    read(engine, 1, 0, A)
    assert resident(engine, (0, A), (0, B), (0, C)) == [False, True, True]  # B comes back, in the place of A
    read(engine, 2, 0, C)
    read(engine, 3, 0, B)
    moved = engine.take()
    assert moved.misses == [0, 0]
    assert moved.prefetch_bytes == 4 * BLOCK  # A, B, C, and B again


def test_one_that_the_same_layer_wants_is_not_evicted_for_another_of_it(make):
    engine = make(2)
    engine.plan(0, sure([A, B, C, D], []))
    assert copied(engine) == [(0, A), (0, B)]
    read(engine, 0, 0, A, B, C, D)
    moved = engine.take()
    assert (moved.hits, moved.misses) == ([2, 0], [2, 0])


def test_one_that_is_wanted_later_makes_room_for_one_that_is_wanted_sooner(make):
    engine = make(1)
    engine.plan(0, sure([], [A]))
    read(engine, 0, 1, A)
    engine.finish(0)
    engine.plan(1, sure([B], [A]))  # A is resident, B is needed first
    assert resident(engine, (0, B), (1, A)) == [True, False]
    read(engine, 1, 0, B)
    assert resident(engine, (0, B), (1, A)) == [False, True]


def test_a_copy_that_must_wait_is_not_overtaken_by_a_later_one(make):
    """The slot that becomes free belongs to what is needed next."""
    engine = make(1)
    engine.plan(0, sure([A], []))
    engine.plan(1, sure([B], []))
    engine.plan(2, sure([C], []))
    assert copied(engine) == [(0, A)]
    read(engine, 0, 0, A)
    assert copied(engine) == [(0, A), (0, B)]


def test_who_is_there_already_is_not_copied_again(make):
    engine = make(3)
    engine.plan(0, sure([A, B], []))
    engine.plan(1, sure([B, A], []))
    engine.plan(2, sure([A, A, C], []))
    assert copied(engine) == [(0, A), (0, B), (0, C)]
    for batch in range(3):
        read(engine, batch, 0, A)
        engine.finish(batch)
    assert not engine._wanted
    assert not any(engine._next_uses.values())


@pytest.mark.parametrize(("probability", "worth"), [(1.0, True), (SURE, True), (SURE - 0.01, False), (0.0, False)])
def test_only_what_is_likely_enough_needed_is_copied(make, probability, worth):
    engine = make(10)
    engine.plan(0, [[(A, 1.0), (B, probability)], [(C, probability)]])
    assert copied(engine) == ([(0, A), (0, B), (1, C)] if worth else [(0, A)])


def test_what_is_not_worth_copying_protects_nobody(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    read(engine, 0, 0, A)
    engine.plan(1, [[(A, 0.1)], []])
    engine.plan(2, sure([B], []))
    assert resident(engine, (0, A), (0, B)) == [False, True]


def test_a_plan_that_comes_twice_counts_once(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    engine.plan(0, sure([B], [B]))
    read(engine, 0, 0, A)
    engine.plan(1, sure([C], []))
    assert copied(engine) == [(0, A), (0, C)]  # neither B, nor a second wish for A that would keep it
    engine.plan(0, sure([A], []))
    assert copied(engine) == [(0, A), (0, C)]


def test_a_plan_that_comes_after_its_batch_is_ignored(make):
    engine = make(1)
    read(engine, 0, 0, A)  # executed without a plan
    engine.finish(0)
    engine.plan(0, sure([B], []))
    assert copied(engine) == []
    engine.plan(1, sure([C], []))
    engine.finish(1)
    engine.plan(1, sure([D], []))
    assert copied(engine) == [(0, C)]


def test_a_batch_that_is_finished_unread_no_longer_wants_anybody(make):
    engine = make(1)
    engine.plan(0, sure([A], [B]))
    engine.plan(1, sure([C], []))
    assert copied(engine) == [(0, A)]
    engine.finish(0)  # it failed, say
    assert copied(engine) == [(0, A), (0, C)]
    engine.finish(0)
    engine.finish(77)  # never planned


def test_batches_may_be_executed_in_another_order_than_planned_and_repeated(make):
    engine = make(2)
    for batch, expert in enumerate((A, B, C)):
        engine.plan(batch, sure([expert], [expert]))
    for batch in (2, 0, 2, 1, 1):
        for layer in (0, 1):
            read(engine, batch, layer, A, B, C)
        engine.finish(batch)
    moved = engine.take()
    assert [h + m for h, m in zip(moved.hits, moved.misses, strict=True)] == [15, 15]
    assert not engine._wanted
    assert not engine._queue


def test_plans_that_come_in_another_order_are_served_in_the_order_of_batches(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    engine.plan(2, sure([C], []))
    engine.plan(1, sure([B], []))
    for batch, expert in enumerate((A, B, C)):
        read(engine, batch, 0, expert)
        engine.finish(batch)
    assert copied(engine) == [(0, A), (0, B), (0, C)]
    assert engine.take().misses == [0, 0]


def test_one_who_made_room_for_a_late_plan_comes_back_in_time(make):
    """A restarted executor hears of batch 1 while batch 0, whose plan was lost, comes with its own."""
    engine = make(1)
    engine.plan(1, sure([B], []))
    engine.plan(0, sure([A], []))
    read(engine, 0, 0, A)
    engine.finish(0)
    assert resident(engine, (0, B)) == [True]
    read(engine, 1, 0, B)
    assert engine.take().hits == [2, 0]


def test_a_plan_whose_batch_never_comes_blocks_nobody_after_it(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    engine.plan(1, sure([B], []))
    read(engine, 1, 0, B)
    engine.finish(1)  # batch 0 was executed by one who died
    engine.plan(2, sure([C], []))
    assert resident(engine, (0, C)) == [True]
    engine.finish(2)
    assert not engine._wanted
    assert not engine._planned
    assert not any(engine._next_uses.values())


def test_a_plan_for_a_batch_before_a_finished_one_is_ignored_and_one_after_it_is_not(make):
    engine = make(5)
    engine.finish(5)
    engine.plan(5, sure([A], []))
    engine.plan(3, sure([B], []))
    engine.plan(6, sure([C], []))
    engine.finish(4)  # late word changes nothing
    engine.plan(5, sure([D], []))
    assert copied(engine) == [(0, C)]


def test_who_is_resident_and_the_peak_are_told_with_what_moved(make):
    engine = make(3)
    engine.plan(0, sure([A, B], [C]))
    moved = engine.take()
    assert (moved.resident, moved.resident_peak_bytes) == ([2, 1], 3 * BLOCK)
    engine.finish(0)
    engine.plan(1, sure([], [A, B]))
    moved = engine.take()
    assert (moved.resident, moved.resident_peak_bytes) == ([0, 3], 3 * BLOCK)


def test_nobody_is_evicted_while_being_read(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    with engine.reading(0, 0, [A]) as views:
        _, view = next(views)
        before = view["w"].clone()
        engine.plan(1, sure([B], []))
        assert resident(engine, (0, A), (0, B)) == [True, False]
        assert torch.equal(view["w"], before)
    assert resident(engine, (0, A), (0, B)) == [False, True]


def test_who_is_wanted_sooner_gets_the_slot_of_one_that_its_layer_has_read(make):
    """B has none, and A, beside it, is wanted later: A is read first, then B comes in its place and is there the next time."""
    engine = make(1, LookAhead)
    for batch, experts in enumerate([[A], [B, A], [B], [A]]):
        engine.plan(batch, sure(experts, []))
    read(engine, 0, 0, A)
    with engine.reading(1, 0, [B, A]) as views:
        at, view = next(views)
        assert at == 1 and resident(engine, (0, A), (0, B)) == [True, False]
        at, view = next(views)
        assert at == 0 and resident(engine, (0, A), (0, B)) == [False, True]
        assert view["w"].data_ptr() == engine.slots.memory.data_ptr(), "it is not read where it lies"
        assert not engine.slots.is_evictable((0, B))
    read(engine, 2, 0, B)
    moved = engine.take()
    assert (moved.hits, moved.misses, moved.prefetch_bytes // BLOCK) == ([3, 0], [1, 0], 1)
    assert not any(engine.slots._pins.values())


def test_who_should_have_inherited_is_read_where_it_lies_if_the_slot_is_read_elsewhere_too(make):
    engine = make(1, LookAhead)
    for batch, experts in enumerate([[A], [B, A], [B], [A]]):
        engine.plan(batch, sure(experts, []))
    read(engine, 0, 0, A)
    with engine.reading(9, 0, [A]) as others:
        next(others)
        read(engine, 1, 0, B, A)
        assert resident(engine, (0, A), (0, B)) == [True, False]
    assert not any(engine.slots._pins.values())


def test_an_heir_whose_turn_never_comes_moves_nothing(make):
    engine = make(1, LookAhead)
    for batch, experts in enumerate([[A], [B, A], [B], [A]]):
        engine.plan(batch, sure(experts, []))
    read(engine, 0, 0, A)
    with pytest.raises(ZeroDivisionError), engine.reading(1, 0, [B, A]) as views:
        next(views)
        raise ZeroDivisionError
    assert not any(engine.slots._pins.values())


def test_an_error_in_the_forward_gives_up_what_it_read(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    with pytest.raises(ZeroDivisionError), engine.reading(0, 0, [A]):
        raise ZeroDivisionError
    engine.plan(1, sure([B], []))
    assert resident(engine, (0, A), (0, B)) == [False, True]


def test_reading_nobody_is_possible(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    with engine.reading(0, 0, []) as views:
        assert [*views] == []
    assert engine.take().misses == [0, 0]


def random_plan(rng: random.Random, layers: int, experts: int) -> Uses:
    return [[(e, rng.choice((0.2, 0.6, 1.0))) for e in rng.sample(range(experts), rng.randint(0, 3))] for _ in range(layers)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("count", [0, 1, 2, 5, 10])
def test_synchronous_accounts_balance_and_repeat(make, policy, count):
    """On random plans and reads: a hit is who was in a slot, bytes are those of the blocks that moved, twice the same."""
    told = []
    for _ in range(2):
        engine = make(count, POLICIES[policy])
        rng = random.Random(count)
        hits, misses = Counter(), Counter()
        for batch in range(60):
            engine.plan(batch + 3, random_plan(rng, 2, 5))
            for layer in (0, 1):
                experts = rng.sample(range(5), rng.randint(1, 4))
                there = sum(engine.slots.is_ready((layer, e)) for e in experts)
                hits[layer] += there
                misses[layer] += len(experts) - there
                read(engine, batch, layer, *experts)
                assert engine.slots.resident_bytes <= count * BLOCK
            engine.finish(batch)
        moved = engine.take()
        assert moved.hits == [hits[0], hits[1]]
        assert moved.misses == [misses[0], misses[1]]
        assert moved.prefetch_bytes == len(copied(engine)) * BLOCK
        assert moved.read_in_place_bytes == sum(moved.misses) * BLOCK
        assert engine.slots.resident_peak_bytes <= count * BLOCK
        told.append((moved.hits, moved.misses, copied(engine)))
    assert told[0] == told[1]
    assert (sum(told[0][0]) > 0) == (count > 0)


# Real threads.


def in_threads(*targets: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Runs them at once; raises the first error of any, or says that one is stuck."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience_s)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "stuck"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.001)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads change every few microseconds, not every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


class LateToWake(threading.Condition):
    """A thread whose condition has come true gets the lock only after others have had it, as happens on a busy machine."""

    def wait_for(self, predicate, timeout=None):
        if predicate():
            return True
        came_true = super().wait_for(predicate, timeout)
        self.release()
        time.sleep(0.0005)
        self.acquire()
        return came_true


class Gate:
    """Holds the copy of one expert until it is opened."""

    def __init__(self, key: Key):
        self._key = key
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, key: Key) -> None:
        if key == self._key:
            self.reached.set()
            assert self._opened.wait(PATIENCE_S)

    def open(self) -> None:
        self._opened.set()


def test_the_copy_thread_fills_the_slots_and_waits(make):
    engine = make(3, background=True)
    engine.plan(0, sure([A, B], [C, D]))
    until(lambda: all(resident(engine, (0, A), (0, B), (1, C))))
    read(engine, 0, 0, A, B)
    until(lambda: engine.slots.is_ready((1, D)))
    moved = engine.take()
    assert (moved.hits, moved.misses, moved.prefetch_bytes) == ([2, 0], [0, 0], 4 * BLOCK)


def test_a_copy_under_way_is_waited_for_and_does_not_cross_twice(make):
    gate = Gate((0, A))
    engine = make(3, background=True, before=gate)
    engine.plan(0, sure([A], []))
    assert gate.reached.wait(PATIENCE_S)
    got = threading.Event()

    def reads() -> None:
        read(engine, 0, 0, A, B)
        got.set()

    def opens() -> None:
        assert not got.wait(0.05)
        gate.open()

    in_threads(reads, opens)
    moved = engine.take()
    assert (moved.hits[0], moved.misses[0]) == (1, 1)
    assert (moved.prefetch_bytes, moved.read_in_place_bytes) == (BLOCK, BLOCK)
    assert moved.stall_ns > 0


def test_what_nobody_copies_is_not_waited_for(make):
    """Planned and next in the queue, but the copy thread is busy with another: reading in place beats waiting."""
    gate = Gate((0, A))
    engine = make(3, background=True, before=gate)
    engine.plan(0, sure([A, B], []))
    assert gate.reached.wait(PATIENCE_S)
    read(engine, 0, 0, B)
    assert engine.take().misses == [1, 0]
    gate.open()


@pytest.mark.parametrize("together", ["the reader plans", "another plans and cancels", "two read"])
@pytest.mark.parametrize(("count", "policy"), [(0, LRU), (1, LRU), (2, LRU), (5, LRU), (18, LRU), (5, LookAhead), (9, LookAhead)])
def test_under_stress_every_view_holds_the_arenas_bytes_for_as_long_as_it_is_read(
    arena_dir, hasty_threads, monkeypatch, count, policy, together
):
    layers, experts, nbytes, batches, ahead = 3, 6, 16 * 1024, 150, 4
    arena = make_arena(arena_dir / "a", [(experts, nbytes)] * layers)
    truth = {(layer, e): arena.block(layer, e).clone() for layer in range(layers) for e in range(experts)}
    slow = random.Random(1)
    watched = Watched(arena, lambda key: time.sleep(slow.choice((0, 0, 0.0001, 0.0005))))  # slots stay half made for a while
    slots = Slots(arena, count, CPU)
    slots.memory.fill_(0xEE)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Condition", LateToWake)
        engine = watch(CopyEngine(watched, slots, policy()))
    asked: list[int] = []
    done = threading.Event()

    def reads(seed: int, plans: bool) -> None:
        rng = random.Random(seed)
        for batch in range(batches):
            if plans:
                engine.plan(batch + ahead, random_plan(rng, layers, experts))
            for layer in range(layers):
                wanted = rng.sample(range(experts), rng.randint(1, 4))
                with engine.reading(batch, layer, wanted) as views:
                    for at, view in views:
                        for _ in range(2):
                            assert torch.equal(view["w"], truth[layer, wanted[at]]), (batch, layer, wanted[at])
                            time.sleep(rng.choice((0, 0.0001, 0.0003)) / len(wanted))
                assert slots.resident_bytes <= count * nbytes
                asked.append(len(wanted))
            engine.finish(batch)

    def reads_what_another_plans() -> None:
        try:
            reads(0, False)
        finally:
            done.set()

    def plans_and_cancels() -> None:
        """Not in step with the reader: whoever is resident may lose its claim, and its slot, at any moment."""
        rng = random.Random(7)
        batch = 0
        while not done.is_set():
            engine.plan(batch, random_plan(rng, layers, experts))
            engine.finish(batch - ahead)
            time.sleep(rng.choice((0, 0.0001, 0.0003)))
            batch += 1

    try:
        if together == "the reader plans":
            in_threads(lambda: reads(0, True))
        elif together == "two read":
            in_threads(lambda: reads(0, True), lambda: reads(1, False))
        else:
            in_threads(reads_what_another_plans, plans_and_cancels)
    finally:
        engine.close()
    moved = engine.take()
    assert sum(moved.hits) + sum(moved.misses) == sum(asked)
    assert moved.read_in_place_bytes == sum(moved.misses) * nbytes
    assert moved.prefetch_bytes == len(watched.copied) * nbytes
    assert slots.resident_peak_bytes <= count * nbytes
    assert (sum(moved.hits) > 0) == (count > 0)
    assert len(watched.copied) > 0 or count != 5, "in one or two slots, and with room for all, misses may always have been first"
    for key in slots._slot_of:
        assert torch.equal(slots._slots[slots._slot_of[key]], truth[key])


def test_who_is_resident_can_be_asked_while_experts_move(arena_dir, hasty_threads):
    """As the executor does after every batch."""
    arena = make_arena(arena_dir / "a", [(500, 256)])
    engine = CopyEngine(arena, Slots(arena, 400, CPU), LRU())
    rng = random.Random(0)
    try:
        for batch in range(300):
            engine.plan(batch, sure(rng.sample(range(500), 100)))
            engine.finish(batch - 2)
            assert 0 <= engine.slots.resident()[0] <= 400
    finally:
        engine.close()


# Ends and failures.


class DiskOnFireError(Exception):
    pass


def breaks_at(key: Key) -> Callable[[Key], None]:
    def before(now: Key) -> None:
        if now == key:
            raise DiskOnFireError

    return before


THREAD_ERRORS_ARE_EXPECTED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@THREAD_ERRORS_ARE_EXPECTED
@pytest.mark.parametrize("experts", [[B], [A], [C], [A, B, C]], ids=["the broken one", "a good one", "one in the arena", "all"])
def test_a_copy_that_fails_is_an_error_in_reading_not_a_hang(make, experts):
    engine = make(3, background=True, before=breaks_at((0, B)))
    engine.plan(0, sure([A, B], []))
    assert engine._thread is not None
    engine._thread.join(PATIENCE_S)

    def reads() -> None:
        with pytest.raises(RuntimeError, match="copying experts failed") as error, engine.reading(0, 0, experts):
            pytest.fail("read")
        assert isinstance(error.value.__cause__, DiskOnFireError)

    in_threads(reads)
    in_threads(reads)  # and so it stays


@THREAD_ERRORS_ARE_EXPECTED
def test_a_copy_that_fails_wakes_the_reader_who_waits_for_it(make):
    gate = Gate((0, B))

    def before(key: Key) -> None:
        gate(key)
        breaks_at((0, B))(key)

    engine = make(3, background=True, before=before)
    engine.plan(0, sure([A, B], []))
    assert gate.reached.wait(PATIENCE_S)

    def reads() -> None:
        with pytest.raises(RuntimeError, match="copying experts failed"), engine.reading(0, 0, [B]):
            pytest.fail("read")

    def opens() -> None:
        until(lambda: engine.slots._pins[0, B] > 0)  # the reader waits
        gate.open()

    in_threads(reads, opens)
    engine.close()


@THREAD_ERRORS_ARE_EXPECTED
def test_a_failure_to_admit_is_an_error_in_reading_too(make, monkeypatch):
    engine = make(3, background=True)
    monkeypatch.setattr(engine.slots, "admit", lambda key: torch.empty(1) / None)
    engine.plan(0, sure([A], []))
    assert engine._thread is not None
    engine._thread.join(PATIENCE_S)

    def reads() -> None:
        with pytest.raises(RuntimeError, match="copying experts failed"), engine.reading(0, 0, [A]):
            pytest.fail("read")

    in_threads(reads)


def test_a_synchronous_copy_that_fails_is_raised_where_it_happens_and_hangs_nobody(make):
    engine = make(3, before=breaks_at((0, B)))
    with pytest.raises(DiskOnFireError):
        engine.plan(0, sure([A, B], []))

    def reads() -> None:
        with pytest.raises((RuntimeError, DiskOnFireError)), engine.reading(0, 0, [B]):
            pytest.fail("read")

    in_threads(reads, patience_s=3)


@pytest.mark.parametrize("uses", [sure([], []), sure([A], [B]), sure(range(5), range(5))], ids=["idle", "done", "waiting for room"])
def test_close_stops_the_copy_thread(make, uses):
    engine = make(2, background=True)
    assert engine._thread is not None
    assert engine._thread.is_alive()
    engine.plan(0, uses)
    in_threads(engine.close)
    assert not engine._thread.is_alive()
    in_threads(engine.close)  # twice does no harm


def test_close_ends_the_copy_under_way_and_begins_no_other(make):
    gate = Gate((0, A))
    engine = make(10, background=True, before=gate)
    engine.plan(0, sure(range(5), range(5)))
    assert gate.reached.wait(PATIENCE_S)

    def opens() -> None:
        until(lambda: engine._closed)
        gate.open()

    in_threads(engine.close, opens)
    assert engine.slots.is_ready((0, A))
    assert copied(engine) == [(0, A)]


def test_after_close_experts_can_still_be_read(make):
    engine = make(2, background=True)
    engine.plan(0, sure([A], []))
    until(lambda: engine.slots.is_ready((0, A)))
    engine.close()
    engine.plan(1, sure([B], []))
    in_threads(lambda: read(engine, 0, 0, A, B))
    in_threads(lambda: read(engine, 1, 0, A, B))
    moved = engine.take()
    assert (moved.hits, moved.misses) == ([3, 0], [1, 0])


@pytest.mark.parametrize("policy", [FIFO, LookAhead])
def test_what_has_passed_is_forgotten(make, policy):
    """A run may be long: nothing that the schedule keeps grows with the batches behind it."""
    engine = make(2, policy)
    for batch in range(400):
        for ahead in range(batch, batch + 3):
            engine.plan(ahead, sure([A, B, C], [(ahead + i) % 5 for i in range(3)]))
        read(engine, batch, 0, A, B, C)
        read(engine, batch, 1, *[(batch + i) % 5 for i in range(3)])
        engine.finish(batch)
    assert max(map(len, (engine._aside, engine._positions, engine._queue, engine._wanted, engine._set_aside))) < 200
