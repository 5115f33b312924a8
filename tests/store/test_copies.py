"""The copy engine: what moves, who goes, and that a reader sees the arena's bytes whatever happens at the same time.

Three ways to ask. Synchronous engines, where every move can be written down beforehand. Schedules: a reader, the copy thread and
somebody who plans and finishes batches, all run by hand in one thread, in every order (small cases) or in many random ones. And
real threads under stress.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from store.arena import Arena, build
from store.copies import WORTH_COPYING, CopyEngine
from store.eviction import FIFO, LRU, POLICIES
from store.layout import ArenaLayout, Key
from store.slots import Slots

PATIENCE_S = 60
CPU = torch.device("cpu")
BLOCK = 1024
A, B, C, D, E = range(5)
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
    """An arena of which every block that the engine copies is recorded, and may be slow or broken."""

    def __init__(self, arena: Arena, before: Callable[[Key], None] = lambda key: None):
        self.layout, self._arena, self._before = arena.layout, arena, before
        self.copied: list[Key] = []

    def block(self, layer: int, expert: int) -> torch.Tensor:
        self._before((layer, expert))
        self.copied.append((layer, expert))
        return self._arena.block(layer, expert)


@pytest.fixture
def make(arena: Arena) -> Iterator[Callable[..., CopyEngine]]:
    """make(slots, policy, background, before) -> an engine; `copied(engine)` says what it copied."""
    engines = []

    def made(count: int, policy=FIFO, background: bool = False, before: Callable[[Key], None] = lambda key: None) -> CopyEngine:
        engines.append(CopyEngine(Watched(arena, before), Slots(arena, count, CPU), policy(), background))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


def copied(engine: CopyEngine) -> list[Key]:
    return engine._arena.copied


def resident(engine: CopyEngine, *keys: Key) -> list[bool]:
    return [engine.slots.is_ready(key) for key in keys]


def read(engine: CopyEngine, batch: int, layer: int, *experts: int) -> None:
    with engine.reading(batch, layer, experts) as views:
        assert len(views) == len(experts)
        for expert, view in zip(experts, views, strict=True):
            assert torch.equal(view["w"], engine._arena._arena.block(layer, expert))


# Synchronous: every move is known.


def test_planned_experts_are_copied_in_the_order_of_layers_and_likelihood(make):
    engine = make(10)
    engine.plan(0, sure([D, A], [C, B]))
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
    assert copied(engine) == [(0, A), (0, B), (1, C)]  # a miss brings nobody in


def test_what_moved_is_told_once(make):
    engine = make(10)
    engine.plan(0, sure([A], []))
    read(engine, 0, 0, A, B)
    first, second = engine.take(), engine.take()
    assert (first.prefetch_bytes, first.read_in_place_bytes, first.hits, first.misses) == (BLOCK, BLOCK, [1, 0], [1, 0])
    assert (second.prefetch_bytes, second.read_in_place_bytes, second.hits, second.misses) == (0, 0, [0, 0], [0, 0])
    assert sum(experts for _, _, experts in first.copy_spans) == 1
    assert second.copy_spans == []


def test_copy_spans_count_every_copy_and_lie_in_order(make):
    engine = make(10)
    engine.plan(0, sure([A, B, C], [A, B]))
    spans = engine.take().copy_spans
    assert sum(experts for _, _, experts in spans) == 5
    assert all(start <= end for start, end, _ in spans)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


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
    assert engine.slots.resident_peak_bytes == 256 + 1024


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


@pytest.mark.parametrize(("probability", "worth"), [(1.0, True), (WORTH_COPYING, True), (WORTH_COPYING - 0.01, False), (0.0, False)])
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


def test_nobody_is_evicted_while_being_read(make):
    engine = make(1)
    engine.plan(0, sure([A], []))
    with engine.reading(0, 0, [A]) as (view,):
        before = view["w"].clone()
        engine.plan(1, sure([B], []))
        assert resident(engine, (0, A), (0, B)) == [True, False]
        assert torch.equal(view["w"], before)
    assert resident(engine, (0, A), (0, B)) == [False, True]


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
        assert views == []
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


# Schedules: the reader, the copy thread and another that plans and finishes, run by hand.


class SeenBeforeError(Exception):
    """This schedule has led to a state from which all has been tried, or asked somebody to move who cannot."""


@dataclass
class Schedule:
    """Decides who moves next. Replays a list of decisions, then takes the first possibility, or a random one.

    Attributes:
        seen: the states in which a decision was taken, in any schedule; None for random ones.
        taken: (decision, number of possibilities).
    """

    replay: list[int] = field(default_factory=list)
    rng: random.Random | None = None
    seen: set | None = None
    taken: list[tuple[int, int]] = field(default_factory=list)

    def choose(self, possibilities: int, state: tuple) -> int:
        if len(self.taken) < len(self.replay):
            choice = self.replay[len(self.taken)]
        elif self.rng:
            choice = self.rng.randrange(possibilities)
        else:
            assert self.seen is not None
            if state in self.seen:
                raise SeenBeforeError
            self.seen.add(state)
            choice = 0
        self.taken.append((choice, possibilities))
        return choice


def every_schedule() -> Iterator[Schedule]:
    """All that differ, depth first; each must be run before the next is asked for."""
    replay: list[int] = []
    seen: set = set()
    while True:
        schedule = Schedule(replay, seen=seen)
        yield schedule
        taken = schedule.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        replay = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]


@dataclass(frozen=True)
class Case:
    """A small history. Operations are ("plan", batch, uses), ("read", batch, layer, experts) and ("finish", batch).

    Attributes:
        layers: (experts, block bytes) of each.
        reader: what the executor does, in order.
        other: what another thread does meanwhile, in order.
        most_hits: in the order of steps that is best.
    """

    slots: int
    reader: list[tuple]
    other: list[tuple] = field(default_factory=list)
    layers: tuple[tuple[int, int], ...] = ((4, 256),)
    policy: type = FIFO
    most_hits: int = -1


class World:
    """Runs a case under a schedule and checks, after every step, all that must always hold.

    The engine's lock is replaced: nobody moves unless the schedule says so, and where the engine would wait, others move.
    """

    def __init__(self, arena: Arena, case: Case, schedule: Schedule):
        self.arena, self.schedule = arena, schedule
        self.slots = Slots(arena, case.slots, CPU)
        self.slots.memory.fill_(0xEE)
        self.engine = CopyEngine(arena, self.slots, case.policy(), background=False)
        self.engine._changed = self  # type: ignore[assignment]
        self.engine._proceed = lambda: None  # type: ignore[method-assign] - the copy thread moves when it is its turn
        self.other = list(case.other)
        self.copying: tuple[Key, torch.Tensor] | None = None
        self.future: list[tuple[int, Key]] = []  # what is planned and not yet past, kept independently of the engine
        self.ordinals: dict[int, int] = {}
        self.gone: set[int] = set()
        self.evicted: Key | None = None
        self.reading: list[Key] = []
        self.admitted: list[Key] = []
        self.at = 0
        self.evictions = self.hits = 0
        self.slots.evict, self.slots.admit = self._evict, self._admit  # type: ignore[method-assign]

    def run(self, case: Case) -> None:
        for self.at, operation in enumerate(case.reader):
            self.let_others_move("between")
            self.perform(*operation)
            self.check()
        while self.move_copier() or self.move_other():
            pass
        assert self.copying is None
        moved = self.engine.take()
        self.hits = sum(moved.hits)
        assert moved.prefetch_bytes == sum(self.slots.block_bytes(key) for key in self.admitted)

    def perform(self, what: str, batch: int, *details) -> None:
        if what == "plan":
            self.engine.plan(batch, *details)
            if batch not in self.ordinals and batch not in self.gone:
                ordinal = self.ordinals[batch] = len(self.ordinals)
                layers = len(self.arena.layout.layers)
                self.future += [
                    (ordinal * layers + layer, (layer, e)) for layer, uses in enumerate(*details) for e, p in uses if p >= WORTH_COPYING
                ]
        elif what == "finish":
            self.engine.finish(batch)
            self.gone.add(batch)
            if batch in self.ordinals:
                layers = len(self.arena.layout.layers)
                self.future = [(at, key) for at, key in self.future if at // layers != self.ordinals[batch]]
        else:
            self.read(batch, *details)

    def read(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        if batch in self.ordinals and batch not in self.gone:
            now = self.ordinals[batch] * len(self.arena.layout.layers) + layer
            self.future = [(at, key) for at, key in self.future if at != now]
        with self.engine.reading(batch, layer, experts) as views:
            start, end = self.slots.memory.data_ptr(), self.slots.memory.data_ptr() + self.slots.memory.numel()
            self.reading = [
                (layer, e) for e, view in zip(experts, views, strict=True) if start <= view["w"].data_ptr() < end
            ]  # these must stay where they are
            for moment in ("first look", "second look"):
                for expert, view in zip(experts, views, strict=True):
                    assert torch.equal(view["w"], self.arena.block(layer, expert)), "other bytes than the arena's"
                self.check()
                self.let_others_move(moment)
            for expert, view in zip(experts, views, strict=True):
                assert torch.equal(view["w"], self.arena.block(layer, expert)), "other bytes than the arena's"
            self.reading = []

    def let_others_move(self, where: str) -> None:
        """Any number of steps of the others, in any order."""
        while True:
            choice = self.schedule.choose(2 + bool(self.other), self.state(where))
            if choice == 0:
                return
            if not (self.move_copier, self.move_other)[choice - 1]() and self.schedule.rng is None:
                raise SeenBeforeError

    def state(self, where: str) -> tuple:
        """All that what follows depends on."""
        engine, slots = self.engine, self.slots
        return (
            (where, self.at, len(self.other), self.copying and self.copying[0], tuple(self.reading)),
            (tuple(slots._slot_of.items()), tuple(slots._free), frozenset(slots._ready), frozenset((+slots._pins).items())),
            (tuple(engine._queue), frozenset(engine._wanted), tuple(engine._ordinals.items()), frozenset(engine._finished)),
            (tuple(self.engine._policy.order()), tuple(self.engine._movement.hits), self.evictions),
        )

    def move_other(self) -> bool:
        if not self.other:
            return False
        self.perform(*self.other.pop(0))
        self.check()
        return True

    def move_copier(self) -> bool:
        """Begins a copy, or ends the one begun; in between the slot holds rubbish."""
        if self.copying is None:
            self.copying = self.engine._next_copy()
            assert self.evicted is None, "evicted for nobody"
            if self.copying is None:
                return False
            self.copying[1].fill_(0xEE)
        else:
            copy, self.copying = self.copying, None
            self.engine._copy(*copy)
        self.check()
        return True

    # In the place of the engine's condition.

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Others move until the reader may go on, and perhaps longer: a thread that is woken does not run at once."""
        while not predicate():
            movers = [self.move_copier, self.move_other]
            if not movers.pop(self.schedule.choose(2, self.state("waiting")) if self.other else 0)():
                assert movers[0](), "the reader waits for ever"
        self.let_others_move("woken")

    # In the place of the slots' methods.

    def _evict(self, key: Key) -> None:
        assert self.evicted is None
        assert key not in self.reading, "evicted while being read"
        Slots.evict(self.slots, key)
        self.evicted = key
        self.evictions += 1

    def _admit(self, key: Key) -> torch.Tensor:
        if self.evicted is not None:
            at = min(at for at, wanted in self.future if wanted == key)
            assert all(use > at for use, wanted in self.future if wanted == self.evicted), "evicted though wanted sooner"
            self.evicted = None
        self.admitted.append(key)
        return Slots.admit(self.slots, key)

    def check(self) -> None:
        slots = self.slots
        taken = list(slots._slot_of.values())
        assert len(set(taken)) == len(taken), "two experts in one slot"
        assert not set(taken) & set(slots._free)
        assert len(taken) + len(slots._free) == slots.count
        assert slots.resident_bytes == sum(slots.block_bytes(key) for key in slots._slot_of)
        assert slots.resident_bytes <= slots.resident_peak_bytes <= slots.memory.numel()
        assert set(self.reading) <= slots._ready <= slots._slot_of.keys()
        assert all(slots._pins[key] for key in self.reading)
        assert slots._slot_of.keys() - slots._ready == ({self.copying[0]} if self.copying else set())
        for key in slots._ready:
            begin = slots._slot_of[key] * self.arena.layout.slot_bytes
            block = self.arena.block(*key)
            assert torch.equal(slots.memory[begin : begin + block.numel()], block)


CASES = {
    "an expert comes while another is waited for": Case(
        slots=2,
        reader=[("plan", 0, sure([A])), ("plan", 1, sure([B])), ("read", 0, 0, [A, B]), ("read", 1, 0, [B])],
        other=[("finish", 1), ("plan", 2, sure([C]))],
        most_hits=3,
    ),
    "one slot changes hands": Case(
        slots=1,
        reader=[("plan", 0, sure([A])), ("plan", 1, sure([B])), ("read", 0, 0, [A]), ("finish", 0), ("read", 1, 0, [B, A])],
        other=[("plan", 2, sure([C]))],
        most_hits=2,
    ),
    "predictions are wrong": Case(
        slots=2,
        reader=[("plan", 0, sure([A, B])), ("read", 0, 0, [C]), ("finish", 0), ("plan", 1, sure([C])), ("read", 1, 0, [A, C])],
        policy=LRU,
        most_hits=2,
    ),
    "layers differ in size": Case(
        slots=1,
        reader=[("plan", 0, sure([A], [B])), ("read", 0, 0, [A]), ("read", 0, 1, [B, A]), ("finish", 0)],
        other=[("plan", 1, sure([B], []))],
        layers=((2, 256), (2, 512)),
        most_hits=2,
    ),
    "there are no slots": Case(
        slots=0, reader=[("plan", 0, sure([A])), ("read", 0, 0, [A]), ("finish", 0)], other=[("plan", 1, sure([B]))], most_hits=0
    ),
    "a batch is finished by another and its expert wanted again": Case(
        slots=1,
        reader=[("plan", 0, sure([A])), ("read", 7, 0, [A]), ("read", 2, 0, [A])],
        other=[("finish", 0), ("plan", 1, sure([B])), ("plan", 2, sure([A]))],
        most_hits=2,
    ),
    "three batches compete for two slots": Case(
        slots=2,
        reader=[
            *(("plan", batch, sure(*uses)) for batch, uses in enumerate([([A, B], [C]), ([B], [A, C]), ([A], [B])])),
            *(("read", 0, 0, [A, B]), ("read", 0, 1, [C, D]), ("finish", 0), ("read", 1, 0, [C, B]), ("read", 1, 1, [A, C])),
            *(("finish", 1), ("read", 2, 0, [A]), ("read", 2, 1, [B, C])),
        ],
        layers=((4, 256), (4, 256)),
        policy=LRU,
        most_hits=9,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_in_every_order_of_steps_readers_see_the_arenas_bytes_and_the_budget_is_kept(arena_dir, name):
    case = CASES[name]
    arena = make_arena(arena_dir / "small", case.layers)
    hits = []
    for schedule in every_schedule():
        world = World(arena, case, schedule)
        try:
            world.run(case)
        except SeenBeforeError:
            continue
        hits.append(world.hits)
    assert len(hits) > 1  # there was something to order
    assert min(hits) == 0  # the copy thread may come too late for everything
    assert max(hits) == case.most_hits


def random_case(seed: int) -> Case:
    """Batches planned ahead by another thread, with predictions that are often wrong, some of them lost or cancelled."""
    rng = random.Random(seed)
    batches, experts, layers = 5, 4, 2
    reader: list[tuple] = []
    other: list[tuple] = []
    for batch in range(batches):
        other.append(("plan", batch, random_plan(rng, layers, experts)))
        if rng.random() < 0.2:
            other.append(("finish", rng.randint(0, batch)))
        if rng.random() < 0.3:
            reader.append(("plan", batch, random_plan(rng, layers, experts)))
        reader += [("read", batch, layer, rng.sample(range(experts), rng.randint(0, 3))) for layer in range(layers)]
        reader.append(("finish", batch))
    return Case(
        rng.choice((0, 1, 1, 2, 2, 3, 5, 8)), reader, other, ((experts, 256), (experts, rng.choice((256, 768)))), rng.choice((FIFO, LRU))
    )


def test_in_random_orders_of_random_histories_readers_see_the_arenas_bytes_and_the_budget_is_kept(arena_dir):
    evictions = hits = 0
    for seed in range(300):
        case = random_case(seed)
        world = World(make_arena(arena_dir / f"{case.layers[1][1]}", case.layers), case, Schedule(rng=random.Random(seed)))
        world.run(case)
        evictions += world.evictions
        hits += world.hits
    assert evictions > 300  # slots did change hands
    assert hits > 300


# Real threads.


def in_threads(*targets: Callable[[], None]) -> None:
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
        thread.join(PATIENCE_S)
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


def test_an_expert_that_comes_in_during_the_wait_is_read_in_place(make):
    """It has no pin. The copy of A ends and that of B begins while the reader waits for A; B's slot is still full of rubbish."""
    first, second = Gate((0, A)), Gate((0, B))
    engine = make(2, background=True, before=lambda key: (first(key), second(key)) and None)
    engine.slots.memory.fill_(0xEE)
    engine.plan(0, sure([A], []))
    engine.plan(1, sure([B], []))
    assert first.reached.wait(PATIENCE_S)
    engine._changed.acquire()  # the reader is let in, and its wake-up delayed, until B is under way

    def reads() -> None:
        read(engine, 0, 0, A, B)

    def opens() -> None:
        with engine._changed:
            until_waiting(engine)
        first.open()

    def until_waiting(engine: CopyEngine) -> None:
        pass

    engine._changed.release()
    in_threads(reads, opens, lambda: (second.reached.wait(PATIENCE_S), time.sleep(0.05), second.open()) and None)
    moved = engine.take()
    assert moved.hits[0] + moved.misses[0] == 2


def test_what_nobody_copies_is_not_waited_for(make):
    """Planned and next in the queue, but the copy thread is busy with another: reading in place beats waiting."""
    gate = Gate((0, A))
    engine = make(3, background=True, before=gate)
    engine.plan(0, sure([A, B], []))
    assert gate.reached.wait(PATIENCE_S)
    read(engine, 0, 0, B)
    assert engine.take().misses == [1, 0]
    gate.open()


@dataclass
class Tally:
    reads: int = 0
    hits: int = 0
    misses: int = 0
    prefetch_bytes: int = 0
    in_place_bytes: int = 0


@pytest.mark.parametrize("together", ["the reader plans", "another plans and cancels", "two read"])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 18])
def test_under_stress_every_view_holds_the_arenas_bytes_for_as_long_as_it_is_read(arena_dir, hasty_threads, count, together):
    layers, experts, nbytes, batches, ahead = 3, 6, 16 * 1024, 60, 4
    arena = make_arena(arena_dir / "a", [(experts, nbytes)] * layers)
    truth = {(layer, e): arena.block(layer, e).clone() for layer in range(layers) for e in range(experts)}
    slow = random.Random(1)
    watched = Watched(arena, lambda key: time.sleep(slow.choice((0, 0, 0.0001, 0.0005))))  # slots stay half made for a while
    slots = Slots(arena, count, CPU)
    slots.memory.fill_(0xEE)
    engine = CopyEngine(watched, slots, LRU())
    tally = Tally()
    planned = threading.Semaphore(0)

    def reads(seed: int, plans: bool) -> None:
        rng = random.Random(seed)
        for batch in range(batches):
            if plans:
                engine.plan(batch + ahead, random_plan(rng, layers, experts))
            for layer in range(layers):
                wanted = rng.sample(range(experts), rng.randint(1, 4))
                with engine.reading(batch, layer, wanted) as views:
                    for _ in range(2):
                        for expert, view in zip(wanted, views, strict=True):
                            assert torch.equal(view["w"], truth[layer, expert]), (batch, layer, expert)
                        time.sleep(rng.choice((0, 0.0001, 0.0003)))
                assert slots.resident_bytes <= count * nbytes
                tally.reads += len(wanted)
            engine.finish(batch)
            planned.release()

    def plans_and_cancels() -> None:
        rng = random.Random(7)
        for batch in range(batches + ahead):
            if batch >= ahead:
                assert planned.acquire(timeout=PATIENCE_S)
            engine.plan(batch, random_plan(rng, layers, experts))
            if rng.random() < 0.3:
                time.sleep(0.0002)
                engine.finish(batch - rng.randint(0, 2))

    try:
        if together == "the reader plans":
            in_threads(lambda: reads(0, True))
        elif together == "two read":
            in_threads(lambda: reads(0, True), lambda: reads(1, False))
        else:
            in_threads(lambda: reads(0, False), plans_and_cancels)
    finally:
        engine.close()
    moved = engine.take()
    assert sum(moved.hits) + sum(moved.misses) == (tally.reads if together != "two read" else sum(moved.hits) + sum(moved.misses))
    assert moved.read_in_place_bytes == sum(moved.misses) * nbytes
    assert moved.prefetch_bytes == len(watched.copied) * nbytes
    assert slots.resident_peak_bytes <= count * nbytes
    assert (sum(moved.hits) > 0) == (len(watched.copied) > 0) == (count > 0)
    for key in slots._slot_of:
        assert torch.equal(slots._slots[slots._slot_of[key]], truth[key])
