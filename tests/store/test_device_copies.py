"""The copy engine of a GPU, on lanes that are simulated: what it copies and when, whom it holds, what it counts, how it ends.

test_device_interleavings.py goes through the orders of steps one by one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from store.copy_thread import DEPTH
from store.device_copies import PART, DeviceCopyEngine
from store.eviction import FIFO, LRU, LookAhead
from store.layout import Key
from store.slots import Slots
from tests.store.at_once import play
from tests.store.lane_model import LiveLanes, SimulatedLanes, make_arena

PATIENCE_S = 30
A_MOMENT_S = 0.05
CPU = torch.device("cpu")
BLOCK = 1024
A, B, C, D, E = range(5)
Uses = Sequence[Sequence[tuple[int, float]]]


def sure(*layers: Sequence[int]) -> Uses:
    """A plan that is certain of its experts."""
    return [[(expert, 1.0) for expert in layer] for layer in layers]


@pytest.fixture
def make() -> Iterator[Callable[..., DeviceCopyEngine]]:
    """make(slots, policy, depth, held, layers, part) -> an engine of two MoE layers of five experts that has been started."""
    engines = []

    def made(
        count: int, policy=FIFO, depth: int | None = None, held: Sequence[Key] = (), layers=(5, 5), part: int | None = None
    ) -> DeviceCopyEngine:
        arena = make_arena([(experts, BLOCK) for experts in layers])
        lanes = LiveLanes(count)
        lanes.held.update(held)
        engine = DeviceCopyEngine(arena, Slots(arena, count, CPU), policy(), lanes)
        if depth:
            engine._depth = engine._most_early = depth
        if part:
            engine._part = part
        engines.append(engine)
        engine.start()
        return engine

    yield made
    for engine in engines:
        engine._lanes.let(*engine._lanes.held)
        in_threads(engine.close)
        engine._lanes.end()
        assert engine._lanes.broken is None


def in_threads(*parts: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Runs them side by side; fails if one of them raises, or does not end."""
    errors: list[BaseException] = []

    def guarded(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(part,), daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience_s)
        assert errors or not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.001)


def at_rest(engine: DeviceCopyEngine) -> None:
    """Waits until the engine has done all that it can."""
    until(lambda: engine._at_rest)


def filling(engine: DeviceCopyEngine) -> list[Key]:
    """The experts of all copies, in the order in which they were given to the lane."""
    return engine._lanes.filling


def resident(engine: DeviceCopyEngine, *keys: Key) -> list[bool]:
    return [engine.slots.is_ready(key) for key in keys]


class Waited:
    """A mark of the compute lane; the last answer is given for ever."""

    def __init__(self, ns: int, reached: list[bool]):
        self._ns, self._reached = ns, reached

    def is_reached(self) -> bool:
        return self._reached.pop(0) if len(self._reached) > 1 else self._reached[0]

    def span(self) -> tuple[int, int]:
        return 7, 7 + self._ns


def stage(engine: DeviceCopyEngine, batch: int, layer: int) -> bool:
    """Whether those that are there should be read first."""
    in_parts: list[bool] = []
    in_threads(lambda: in_parts.append(engine.stage(batch, layer)))
    return in_parts[0]


class Held:
    """Somebody in `stage`, on a thread of their own."""

    def __init__(self, engine: DeviceCopyEngine, batch: int, layer: int):
        self.error: BaseException | None = None
        self._in_parts: list[bool] = []
        self._thread = threading.Thread(target=self._stage, args=(engine, batch, layer), daemon=True)
        self._thread.start()

    def _stage(self, engine: DeviceCopyEngine, batch: int, layer: int) -> None:
        try:
            self._in_parts.append(engine.stage(batch, layer))
        except BaseException as error:
            self.error = error

    def is_held(self) -> bool:
        self._thread.join(A_MOMENT_S)
        return self._thread.is_alive()

    def goes_on(self) -> bool:
        """Waits until they do; says what `stage` said."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "hangs"
        if self.error:
            raise self.error
        return self._in_parts[0]


def run(engine: DeviceCopyEngine, batch: int, layer: int) -> None:
    """One layer of which nothing is read."""
    while stage(engine, batch, layer):
        engine.read(batch, layer)
    engine.passed(batch, layer)


def compute(engine: DeviceCopyEngine, batch: int, layer: int, experts: Sequence[int]) -> list[Key]:
    """One layer that uses these experts; says which it read from slots."""
    lanes, run = engine._lanes, (batch, layer)
    in_parts = True
    while in_parts:
        in_parts = stage(engine, batch, layer)
        lanes.snapshot(run, experts, last=not in_parts)
        lanes.first(run)
        lanes.second(run, last=not in_parts)
        (engine.read if in_parts else engine.passed)(batch, layer)
    lanes.synchronize()
    return sorted(lanes.found[run])


def count(
    engine: DeviceCopyEngine, layer: int, tokens: dict[int, int], hits: Sequence[int], reads: dict[int, int] | None = None
) -> None:
    """What kernels found: tokens per expert, those read from slots, and how often blocks were read, if not once."""
    routed, hit, read = np.zeros((3, 5), dtype=np.int32)
    for expert, n in tokens.items():
        routed[expert], hit[expert], read[expert] = n, expert in hits, (reads or {}).get(expert, 1)
    engine.counted(layer, routed, hit, read)


# What is copied, and when.


def test_planned_experts_are_copied_in_the_order_of_layers_and_likelihood(make):
    engine = make(9, depth=2)
    engine.plan(0, [[(D, 0.9), (A, 0.8)], [(C, 1.0), (B, 0.6)]])
    at_rest(engine)
    engine.plan(1, sure([B, A], []))
    at_rest(engine)
    assert filling(engine) == [(0, D), (0, A), (1, C), (1, B), (0, B)]
    assert all(resident(engine, *filling(engine)))
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes, moved.resident) == (5 * BLOCK, 0, [3, 2])
    assert sum(experts for _, _, experts in moved.copy_spans) == 5


def test_what_is_needed_sooner_overtakes_all_but_what_is_under_way(make):
    engine = make(9, depth=2, held=[(0, A)])
    engine.plan(1, sure([A, B, C], []))
    until(lambda: len(filling(engine)) == 2)
    engine.plan(0, sure([], [E]))
    engine._lanes.let((0, A))
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, B), (1, E), (0, C)]


def test_what_is_not_likely_enough_is_not_copied(make):
    engine = make(9)
    engine.plan(0, [[(A, 0.9), (B, 0.4)], [(C, 0.1)]])
    at_rest(engine)
    assert filling(engine) == [(0, A)]


@pytest.mark.parametrize(
    ("slots", "depth"), [(0, 1), (1, 1), (15, 1), (16, 2), (8 * DEPTH - 1, DEPTH - 1), (8 * DEPTH, DEPTH), (10 * DEPTH, DEPTH)]
)
def test_an_eighth_of_the_slots_may_be_filled_ahead(slots, depth):
    arena = make_arena([(1000, 256)])
    assert DeviceCopyEngine(arena, Slots(arena, slots, CPU), FIFO(), SimulatedLanes(slots))._depth == depth


@pytest.mark.parametrize(("slots", "part"), [(0, 1), (1, 1), (15, 1), (16, 2), (8 * PART - 1, PART - 1), (10 * PART, PART)])
def test_an_eighth_of_the_slots_is_worth_a_part(slots, part):
    arena = make_arena([(1000, 256)])
    assert DeviceCopyEngine(arena, Slots(arena, slots, CPU), FIFO(), SimulatedLanes(slots))._part == part


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_so_many_copies_are_under_way(make, depth):
    held = [(0, expert) for expert in range(5)]
    engine = make(9, depth=depth, held=held)
    engine.plan(0, sure(range(5), []))
    for done in range(5):
        begun = min(5, done + depth)
        until(lambda begun=begun: len(filling(engine)) == begun)
        time.sleep(A_MOMENT_S / 5)
        assert filling(engine) == held[:begun]
        engine._lanes.let(held[done])
    at_rest(engine)


def test_a_plan_that_comes_twice_or_late_does_nothing(make):
    engine = make(9)
    engine.plan(3, sure([A], []))
    engine.plan(3, sure([B], [B]))
    at_rest(engine)
    engine.finish(3)
    engine.plan(3, sure([C], []))
    engine.plan(2, sure([C], []))
    engine.plan(4, sure([D], []))
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, D)]


def test_a_layer_that_has_passed_makes_room(make):
    engine = make(2)
    engine.plan(0, sure([A, B], [C, D]))
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, B)]  # full, and both are wanted before layer 1
    stage(engine, 0, 0)
    engine.passed(0, 0)
    at_rest(engine)
    assert filling(engine)[2:] == [(1, C), (1, D)]
    assert resident(engine, (0, A), (0, B), (1, C), (1, D)) == [False, False, True, True]


def test_all_layers_may_pass_at_once(make):
    engine = make(2)
    engine.plan(0, sure([A], [B]))
    engine.plan(1, sure([C], [D]))
    at_rest(engine)
    engine.passed(0, 0, 1)
    at_rest(engine)
    assert filling(engine) == [(0, A), (1, B), (0, C), (1, D)]


def test_a_batch_that_is_finished_wants_nobody(make):
    engine = make(1)
    engine.plan(0, sure([A], [B]))
    engine.plan(1, sure([C], []))
    at_rest(engine)
    engine.finish(0)
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, C)]


def test_one_who_made_room_comes_back(make):
    engine = make(1)
    engine.plan(1, sure([B], []))
    at_rest(engine)
    engine.plan(0, sure([A], []))
    at_rest(engine)
    run(engine, 0, 0)
    at_rest(engine)
    assert filling(engine) == [(0, B), (0, A), (0, B)]


def test_where_there_is_a_slot_for_every_expert_all_come_without_a_plan_and_stay(make):
    engine = make(10)
    until(lambda: engine.is_complete)
    assert filling(engine) == [(layer, expert) for layer in (0, 1) for expert in range(5)]
    for batch in range(3):
        engine.plan(batch, sure([A, B], [C]))
        assert engine.is_ready(batch)
        for layer in (0, 1):
            run(engine, batch, layer)
        count(engine, 0, {A: 1, B: 2}, [A, B])
        engine.finish(batch)
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.hits, moved.misses) == (10 * BLOCK, [6, 0], [0, 0])
    assert not engine._queue
    assert not any(position >= 0 for position in engine._wanted)


def test_without_slots_nothing_moves_and_nobody_is_held(make):
    engine = make(0)
    for batch in range(3):
        engine.plan(batch, sure([A, B], [C]))
    for batch in range(3):
        assert not engine.is_ready(batch)
        for layer in (0, 1):
            assert not stage(engine, batch, layer)  # nobody to compute a part of
            engine.passed(batch, layer)
        engine.finish(batch)
    at_rest(engine)
    assert filling(engine) == []
    assert not engine._wanted
    assert not engine._queue


# Who is held, and for how long.


def test_a_layer_is_held_until_the_copies_under_way_for_it_have_ended(make):
    engine = make(9, held=[(0, A)])
    engine.plan(0, sure([A], []))
    waits = Held(engine, 0, 0)
    assert waits.is_held()
    engine._lanes.let((0, A))
    waits.goes_on()
    assert resident(engine, (0, A)) == [True]
    assert engine.take().stall_ns > 0.5 * A_MOMENT_S * 1e9


def test_a_layer_is_held_for_what_is_planned_and_has_not_begun(make):
    engine = make(9, held=[(0, A)])
    engine.plan(0, sure([A], [B]))
    until(lambda: len(filling(engine)) == 1)
    waits = Held(engine, 0, 1)
    assert waits.is_held()
    engine._lanes.let((0, A))
    waits.goes_on()
    assert resident(engine, (1, B)) == [True]


def test_a_layer_is_held_for_what_was_planned_a_moment_ago(make):
    """The copy thread may not have looked yet."""
    engine = make(9)
    for batch in range(100):
        engine.plan(batch, sure([batch % 5], [(batch + 1) % 5]))
        for layer in (0, 1):
            stage(engine, batch, layer)
            assert resident(engine, (layer, (batch + layer) % 5)) == [True]
            engine.passed(batch, layer)
        engine.finish(batch)


@pytest.mark.parametrize("uses", [sure([A, B, C], []), sure([C], [A, B])], ids=["as soon", "sooner"])
def test_a_layer_is_not_held_for_what_cannot_come_because_others_are_wanted(make, uses):
    engine = make(1)
    engine.plan(0, uses)
    at_rest(engine)
    stage(engine, 0, 0 if uses[0] != [(C, 1.0)] else 1)
    assert len(filling(engine)) == 1


def test_a_layer_is_held_for_those_that_can_come_and_not_for_the_others(make):
    engine = make(2, held=[(0, B)], part=5)
    engine.plan(0, sure([A, B, C, D], []))
    waits = Held(engine, 0, 0)
    assert waits.is_held()
    engine._lanes.let((0, B))
    waits.goes_on()
    assert resident(engine, *((0, expert) for expert in (A, B, C, D))) == [True, True, False, False]


def test_a_layer_for_which_all_is_there_is_not_held_by_copies_for_others(make):
    engine = make(9, held=[(1, C)])
    engine.plan(0, sure([A], [C]))
    until(lambda: filling(engine) == [(0, A), (1, C)])
    assert not stage(engine, 0, 0)
    assert not stage(engine, 7, 1)  # nothing is planned for it


def test_a_layer_is_not_held_for_those_that_are_not_worth_an_eviction(make):
    """To a policy that looks ahead: A and B are wanted again sooner than C and D, of which as many as may be pass through."""
    engine = make(2, LookAhead, depth=1)
    for batch in range(3):
        engine.plan(batch, sure([A, B], [C, D]))
    run(engine, 0, 0)
    stage(engine, 0, 1)
    assert filling(engine) == [(0, A), (0, B), (1, C)]
    assert resident(engine, (1, C), (1, D)) == [True, False]


def test_a_batch_is_ready_when_all_that_its_table_wants_is_in_slots(make):
    engine = make(9, held=[(1, C)])
    assert engine.is_ready(0)  # it wants nothing yet
    engine.plan(0, sure([A, B], [C]))
    until(lambda: filling(engine)[-1:] == [(1, C)])
    assert not engine.is_ready(0)
    engine._lanes.let((1, C))
    at_rest(engine)
    assert engine.is_ready(0)
    engine.plan(1, sure([A], [B]))
    at_rest(engine)
    assert engine.is_ready(1)


# Parts of a layer.


@pytest.mark.parametrize("policy", [FIFO, LRU, LookAhead])
@pytest.mark.parametrize(("slots", "part"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_a_layer_that_wants_more_than_there_are_slots_finds_all_of_them_in_slots(make, policy, slots, part):
    engine = make(slots, policy, depth=2, part=part)
    engine.plan(0, sure(range(5), [C, E]))
    assert compute(engine, 0, 0, range(5)) == [(0, expert) for expert in range(5)]
    assert compute(engine, 0, 1, [C, D, E]) == [(1, C), (1, E)]
    engine.finish(0)
    assert not engine._wanted
    assert not any(engine._next_uses.values())
    assert engine.take().prefetch_bytes == 7 * BLOCK  # each came once


def test_what_routers_name_comes_in_parts_too_and_is_a_demand_copy(make):
    engine = make(2)
    engine.demand(0, 0, range(5))
    assert compute(engine, 0, 0, range(5)) == [(0, expert) for expert in range(5)]
    engine.finish(0)
    engine.plan(1, sure([A], []))
    at_rest(engine)
    moved = engine.take()
    assert (moved.demand_bytes, moved.prefetch_bytes) == (5 * BLOCK, BLOCK)


def test_a_part_is_computed_as_soon_as_enough_are_there_for_one_and_others_have_no_slot(make):
    engine = make(4, part=2, depth=1, held=[(0, B), (0, C)])
    engine.plan(0, sure(range(5), []))
    waits = Held(engine, 0, 0)
    assert waits.is_held()  # A is there, and B may come
    engine._lanes.let((0, B))
    assert waits.goes_on()
    assert resident(engine, (0, A), (0, B), (0, C)) == [True, True, False]


def test_who_stages_when_enough_are_there_for_a_part_is_not_held(make):
    engine = make(4, part=2, depth=1, held=[(0, C)])
    engine.plan(0, sure(range(5), []))
    until(lambda: filling(engine)[-1:] == [(0, C)])
    assert stage(engine, 0, 0)


def test_the_last_who_are_under_way_are_waited_for_however_many_are_there(make):
    engine = make(4, part=1, depth=2, held=[(0, C)])
    engine.plan(0, sure([A, B, C], []))
    until(lambda: filling(engine)[-1:] == [(0, C)])
    waits = Held(engine, 0, 0)
    assert waits.is_held()
    engine._lanes.let((0, C))
    assert not waits.goes_on()


def test_what_a_part_has_read_makes_room_for_the_next(make):
    engine = make(2)
    engine.plan(0, sure([A, B, C, D], []))
    at_rest(engine)
    assert stage(engine, 0, 0)
    time.sleep(A_MOMENT_S)
    assert filling(engine) == [(0, A), (0, B)]  # its kernels are on their way
    engine.read(0, 0)
    at_rest(engine)
    assert filling(engine)[2:] == [(0, C), (0, D)]
    assert resident(engine, (0, C), (0, D)) == [True, True]
    assert not stage(engine, 0, 0)


def test_one_who_comes_while_a_part_is_enqueued_is_left_to_the_next(make):
    engine = make(3, depth=1, part=1, held=[(0, B)])
    engine.plan(0, sure([A, B, C, D], []))
    until(lambda: filling(engine) == [(0, A), (0, B)])
    assert stage(engine, 0, 0)
    engine._lanes.let((0, B))
    until(lambda: engine.slots.is_ready((0, C)))
    engine.read(0, 0)
    at_rest(engine)
    assert resident(engine, (0, A), (0, B), (0, C), (0, D)) == [False, True, True, True]
    assert not stage(engine, 0, 0)


def test_who_is_wanted_by_a_later_layer_is_kept_though_a_part_has_read_them(make):
    engine = make(2, LookAhead)
    engine.plan(0, sure([A, B, C], []))
    engine.plan(1, sure([A], []))
    at_rest(engine)
    run(engine, 0, 0)
    assert filling(engine) == [(0, A), (0, B), (0, C)]
    assert resident(engine, (0, A), (0, B)) == [True, False]


@pytest.mark.parametrize("when", ["before read", "after read"])
def test_a_layer_given_up_between_its_parts_wants_nobody_and_holds_nobody_back(make, when):
    engine = make(1)
    engine.plan(0, sure([A, B, C], []))
    engine.plan(1, sure([D], []))
    assert stage(engine, 0, 0)
    if when == "after read":
        engine.read(0, 0)
    engine.finish(0)
    at_rest(engine)
    assert resident(engine, (0, D)) == [True]
    assert compute(engine, 1, 0, [D]) == [(0, D)]
    engine.finish(1)
    assert not engine._wanted
    assert not any(engine._next_uses.values())


# While a layer is being enqueued.


def test_nobody_goes_between_a_layers_first_kernel_and_its_last(make):
    """The first reads where the experts are, the last reads them there: a withdrawal between them would come too early."""
    engine = make(1)
    engine.plan(0, sure([A], []))
    run(engine, 0, 0)
    engine.finish(0)
    stage(engine, 1, 0)
    engine.plan(2, sure([B], []))  # A is wanted by nobody, and yet the layer may use it
    at_rest(engine)
    time.sleep(A_MOMENT_S)
    assert filling(engine) == [(0, A)]
    engine.passed(1, 0)
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, B)]


@pytest.mark.parametrize("then", ["finish", "stage"])
def test_a_forward_that_breaks_within_a_layer_holds_nobody_back(make, then):
    engine = make(1)
    engine.plan(0, sure([A], []))
    stage(engine, 0, 0)
    engine.plan(1, sure([B], []))
    if then == "finish":
        engine.finish(0)
    else:
        engine.demand(0, 0, [C])
        stage(engine, 0, 0)
        engine.passed(0, 0)
    stage(engine, 1, 0)
    assert resident(engine, (0, B)) == [True]


# What routers name.


def test_what_a_router_names_comes_before_all_else_and_is_a_demand_copy(make):
    engine = make(3, held=[(0, A)], part=3)
    engine.plan(0, sure([A], []))
    engine.plan(1, sure([D, E], []))
    until(lambda: len(filling(engine)) == 1)
    engine.demand(0, 0, [A, B, C])
    engine._lanes.let((0, A))
    stage(engine, 0, 0)
    until(lambda: resident(engine, (0, A), (0, B), (0, C)) == [True] * 3)
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes) == (BLOCK, 2 * BLOCK)  # A was on its way
    engine.passed(0, 0)
    at_rest(engine)
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes) == (2 * BLOCK, 0)


@pytest.mark.parametrize("probability", [1.0, 0.8])
def test_what_a_table_foretold_too_late_is_a_demand_copy_all_the_same(make, probability):
    engine = make(3, held=[(1, A)])
    engine.plan(0, [[], [(A, 1.0)]])
    until(lambda: len(filling(engine)) == 1)
    with engine._changed:  # the copy thread is busy: a table's word comes just before the router's
        engine.plan(1, [[(B, probability)], []])
        engine.demand(1, 0, [B, C])
    engine._lanes.let((1, A))
    stage(engine, 1, 0)
    until(lambda: resident(engine, (1, A), (0, B), (0, C)) == [True] * 3)
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes) == (BLOCK, 2 * BLOCK)


def test_behind_a_demand_the_compute_lane_waits_for_copies_and_the_host_does_not(make):
    engine = make(3, held=[(0, B)])
    lanes = engine._lanes
    engine.demand(0, 0, [A, B])
    stage(engine, 0, 0)
    assert not engine.slots.is_ready((0, B))
    lanes.snapshot((0, 0), [A, B], [(0, A), (0, B)])
    lanes.first((0, 0))
    lanes.second((0, 0))
    engine.passed(0, 0)
    time.sleep(0.02)
    assert not lanes.has_run((0, 0))
    lanes.let((0, B))
    lanes.synchronize()
    assert lanes.has_run((0, 0))


def test_nor_does_it_when_the_lane_has_room_for_more_and_nobody_is_left(make):
    engine = make(9, depth=3, held=[(0, A)])
    engine.demand(0, 0, [A])
    engine.expect(0, 1, [B])
    stage(engine, 0, 0)
    assert not engine.slots.is_ready((0, A))
    engine._lanes.let((0, A))


def test_a_layer_is_enqueued_when_those_expected_next_are_on_their_way_too(make):
    """Their withdrawals would stand behind its kernels, and the link would lie idle while these run."""
    engine = make(9, depth=2, held=[(0, A), (0, B)])
    engine.demand(0, 0, [A, B])
    engine.expect(0, 1, [C])
    held = Held(engine, 0, 0)
    assert held.is_held()  # the lane has no room for C
    engine._lanes.let((0, A))
    assert not held.goes_on()
    assert filling(engine) == [(0, A), (0, B), (1, C)]
    assert not engine.slots.is_ready((0, B))
    engine._lanes.let((0, B))


def test_who_is_expected_begins_at_once(make):
    engine = make(9, depth=3, held=[(0, A)])
    with engine._changed:  # the copy thread is busy
        engine.demand(0, 0, [A])
        assert engine._settled
        engine.expect(0, 1, [C, D])
        assert filling(engine) == [(0, A), (1, C), (1, D)]
        assert engine._settled
    engine._lanes.let((0, A))


def test_what_the_compute_lane_has_waited_counts_as_far_as_it_has_come_and_once(make):
    engine = make(3)
    waits = [Waited(10, [False, True]), Waited(300, [True]), Waited(5000, [False])]
    engine._followed.extend(waits)
    assert engine.take().stall_ns == 0  # the first had not ended, when it was asked
    engine.finish(0)
    assert engine.take().stall_ns == 310
    assert list(engine._followed) == waits[2:]


def test_a_copy_that_cannot_begin_is_told_to_whoever_comes_later(make, monkeypatch):
    engine = make(3)

    def refuses(key, slot):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(engine._lanes, "fill", refuses)
    with pytest.raises(RuntimeError, match="out of resources"):
        engine.demand(0, 0, [A, B])
    engine.finish(0)
    with pytest.raises(RuntimeError, match="copying experts failed"):
        in_threads(lambda: engine.stage(1, 0))


def test_what_a_table_wanted_and_the_router_does_not_is_not_copied_any_more(make):
    engine = make(2, held=[(0, A)])
    engine.plan(0, sure([A, B, C, D], []))
    until(lambda: len(filling(engine)) == 1)
    engine.demand(0, 0, [E])
    engine._lanes.let((0, A))
    stage(engine, 0, 0)
    at_rest(engine)
    assert filling(engine) == [(0, A), (0, E)]
    assert engine.take().demand_bytes == BLOCK


def test_one_who_was_demanded_in_vain_and_comes_later_by_a_table_is_a_prefetch(make):
    engine = make(1)
    engine.demand(0, 0, [A, B])
    assert stage(engine, 0, 0)
    engine.finish(0)  # the forward broke
    assert resident(engine, (0, A), (0, B)) == [True, False]
    engine.plan(1, sure([B], []))
    stage(engine, 1, 0)
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.demand_bytes) == (BLOCK, BLOCK)


@pytest.mark.parametrize("end", ["passed", "finish"])
def test_a_demand_is_over_with_its_layer_whatever_is_planned_meanwhile(make, end):
    """Else its experts would keep their slots for ever."""
    engine = make(2)
    engine.demand(5, 0, [A, B])
    stage(engine, 5, 0)
    engine.plan(5, sure([C], [C]))  # late: the batch has begun
    if end == "passed":
        engine.passed(5, 0)
    engine.finish(5)
    assert not engine._wanted
    assert not any(engine._next_uses.values())
    engine.plan(6, sure([D, E], []))
    stage(engine, 6, 0)
    assert resident(engine, (0, D), (0, E)) == [True, True]


def test_a_demand_in_the_midst_of_a_plan_is_not_forgotten(make):
    """A plan gives the lock away between its layers."""
    engine = make(2)

    def uses() -> Iterator[Sequence[tuple[int, float]]]:
        yield []
        engine.demand(0, 1, [A, B])
        yield [(C, 1.0)]

    engine.plan(0, uses())
    stage(engine, 0, 1)
    until(lambda: resident(engine, (1, A), (1, B)) == [True, True])
    engine.passed(0, 1)
    engine.finish(0)
    assert not engine._wanted
    assert not any(engine._next_uses.values())


# What is counted.


def test_hits_misses_and_blocks_read_in_place_are_counted(make):
    engine = make(9)
    count(engine, 0, {A: 40, B: 1, C: 100}, hits=[B], reads={A: 3, B: 1, C: 7})
    count(engine, 1, {D: 2}, hits=[D], reads={D: 9})  # re-reads of a slot do not cross the link
    moved = engine.take()
    assert (moved.hits, moved.misses) == ([1, 1], [2, 0])
    assert moved.read_in_place_bytes == 10 * BLOCK
    again = engine.take()
    assert (again.hits, again.misses, again.read_in_place_bytes) == ([0, 0], [0, 0], 0)


def test_blocks_of_different_sizes_are_counted_by_their_own():
    arena = make_arena([(5, 256), (5, 1024)])
    lanes = LiveLanes(2)
    engine = DeviceCopyEngine(arena, Slots(arena, 2, CPU), FIFO(), lanes)
    engine.start()
    engine.plan(0, sure([A], [B]))
    at_rest(engine)
    count(engine, 0, {C: 1}, hits=[])
    count(engine, 1, {C: 1}, hits=[], reads={C: 2})
    moved = engine.take()
    assert (moved.prefetch_bytes, moved.read_in_place_bytes) == (256 + 1024, 256 + 2 * 1024)
    assert moved.resident_peak_bytes == 256 + 1024
    engine.close()
    lanes.end()


def test_the_policy_learns_of_those_that_were_read_from_slots_and_are_still_there(make):
    engine = make(2, LRU)
    engine.plan(0, sure([A, B], []))
    run(engine, 0, 0)
    count(engine, 0, {A: 1, B: 0, C: 5, D: 2}, hits=[A, D])  # D has gone since, C never was there
    assert list(engine._policy.order()) == [(0, B), (0, A)]
    engine.finish(0)
    engine.plan(1, sure([E], []))
    at_rest(engine)
    assert resident(engine, (0, A), (0, B), (0, E)) == [True, False, True]


# Ends and failures.


class LinkDownError(Exception):
    pass


THREAD_ERRORS_ARE_EXPECTED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class BrokenMark:
    """Of a copy that fails on the device, after a while."""

    def __init__(self, fails: threading.Event):
        self.fails = fails

    def wait(self) -> None:
        assert self.fails.wait(PATIENCE_S)
        raise LinkDownError


@THREAD_ERRORS_ARE_EXPECTED
@pytest.mark.parametrize("where", ["fill", "withdraw"])
@pytest.mark.parametrize("layer", [0, 1], ids=["a layer that waits for it", "another"])
def test_a_failure_in_the_lanes_reaches_whoever_stages_and_stays(make, monkeypatch, where, layer):
    engine = make(2)
    engine.plan(0, sure([A, B], []))
    run(engine, 0, 0)
    engine.finish(0)

    def broken(*what) -> None:
        raise LinkDownError

    monkeypatch.setattr(engine._lanes, where, broken)
    engine.plan(1, sure([C], []))
    engine._thread.join(PATIENCE_S)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="copying experts failed") as error:
            stage(engine, 1, layer)
        assert isinstance(error.value.__cause__, LinkDownError)
    engine.passed(1, 0)
    engine.finish(1)
    engine.plan(2, sure([D], []))


@THREAD_ERRORS_ARE_EXPECTED
def test_a_failure_between_parts_reaches_whoever_stages_the_next(make, monkeypatch):
    engine = make(1)
    engine.plan(0, sure([A, B, C], []))
    assert stage(engine, 0, 0)

    def broken(*what) -> None:
        raise LinkDownError

    monkeypatch.setattr(engine._lanes, "withdraw", broken)
    engine.read(0, 0)
    with pytest.raises(RuntimeError, match="copying experts failed"):
        stage(engine, 0, 0)
    engine.finish(0)
    assert not engine._wanted


@THREAD_ERRORS_ARE_EXPECTED
def test_a_copy_that_fails_under_way_wakes_whoever_is_held_for_it(make, monkeypatch):
    engine = make(2)
    fails = threading.Event()
    monkeypatch.setattr(engine._lanes, "fill", lambda key, slot: BrokenMark(fails))
    engine.plan(0, sure([A], []))
    waits = Held(engine, 0, 0)
    assert waits.is_held()
    fails.set()
    with pytest.raises(RuntimeError, match="copying experts failed"):
        waits.goes_on()


@pytest.mark.parametrize("uses", [sure([], []), sure([A], [B]), sure(range(5), range(5))], ids=["idle", "done", "waiting for room"])
def test_close_stops_the_copy_thread(make, uses):
    engine = make(2)
    engine.plan(0, uses)
    in_threads(engine.close)
    assert not engine._thread.is_alive()
    in_threads(engine.close)  # twice does no harm


def test_close_waits_for_what_is_under_way_and_begins_nothing_else(make):
    engine = make(9, depth=2, held=[(0, A)])
    engine.plan(0, sure(range(5), []))
    until(lambda: len(filling(engine)) == 2)
    closes = threading.Thread(target=engine.close)
    closes.start()
    closes.join(A_MOMENT_S)
    assert closes.is_alive()
    engine._lanes.let((0, A))
    closes.join(PATIENCE_S)
    assert not closes.is_alive()
    assert filling(engine) == [(0, A), (0, B)]
    assert resident(engine, (0, A), (0, B)) == [True, True]


def test_whoever_is_held_when_the_engine_closes_goes_on(make):
    engine = make(9, held=[(0, A)])
    engine.plan(0, sure([A, B], [C]))
    until(lambda: len(filling(engine)) == 1)
    waiting = [Held(engine, 0, layer) for layer in (0, 1)]
    assert all(held.is_held() for held in waiting)
    closes = threading.Thread(target=engine.close)
    closes.start()
    until(lambda: engine._closed)
    engine._lanes.let((0, A))
    closes.join(PATIENCE_S)
    for held in waiting:
        held.goes_on()


def test_after_close_what_is_there_is_read_and_nobody_is_held_for_the_others(make):
    engine = make(2)
    engine.plan(0, sure(range(5), []))
    at_rest(engine)
    in_threads(engine.close)
    assert stage(engine, 0, 0)
    engine.read(0, 0)
    assert not stage(engine, 0, 0)
    engine.passed(0, 0)
    assert filling(engine) == [(0, A), (0, B)]


def test_after_close_nobody_is_held(make):
    engine = make(9)
    in_threads(engine.close)
    engine.plan(0, sure([A], [B]))
    run(engine, 0, 0)
    engine.demand(0, 1, [C])
    run(engine, 0, 1)
    engine.finish(0)
    assert filling(engine) == []


@pytest.mark.parametrize("prompt", [True, False], ids=["after steps", "again and again"])
def test_a_forward_that_reads_all_experts_leaves_slots_to_those_that_come_again(prompt):
    """On demand: nobody knows what the next layer reads, but that it comes is known. `lru` hits none."""
    layers, experts, slots = 4, 16, 32
    rng = random.Random(0)
    step = [[rng.randrange(2)] for _ in range(layers)]
    every = [list(range(experts))] * layers
    history = [every, *[step] * 8, every] if prompt else [every] * 10
    ours, others = (play([experts] * layers, slots, policy, history, None)[0][-1] for policy in ("lookahead", "lru"))
    assert layers * experts - slots <= ours <= layers * experts - 0.5 * slots
    assert others >= layers * experts - (layers if prompt else 0)
