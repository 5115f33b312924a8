"""The staged copy engine and its ring step by step: everything of test_device_interleavings.py, where nothing is read in place.

The copy thread carries a chunk at a time, and each is a step. Whatever a router names has been in a slot when the layer has
run, in every order of steps; nobody waits for ever. At the end, again, one thing is wrong at a time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from store.device_copies import DeviceCopyEngine
from store.eviction import FIFO, LRU, LookAhead
from store.layout import Key
from store.ring import RingLanes
from store.schedule import Schedule
from store.slots import Slots
from store.staged_copies import StagedCopyEngine
from tests.store.lane_model import make_arena
from tests.store.ring_model import LiveRing, SimulatedPoint, SimulatedRing
from tests.store.test_device_interleavings import (
    CPU,
    PATIENCE_S,
    Case,
    FoundError,
    Uses,
    World,
    ahead,
    explore,
    forward,
    hasty_threads,
    name,
    no_garbage_collector,
    sure,
    wander,
)

__all__ = ["hasty_threads", "no_garbage_collector"]  # fixtures
A, B, C, D = range(4)


class StagedWorld(World):
    """A World whose copy thread carries chunks, and in which a layer's experts are those that its router has named."""

    def __init__(self, case: Case, engine: type[DeviceCopyEngine] = StagedCopyEngine, lanes: Any = SimulatedRing):
        super().__init__(case, engine, lanes)
        self.now = 0  # the position under way

    lanes: SimulatedRing

    def twin(self) -> World:
        copied = super().twin()
        assert isinstance(copied, StagedWorld)
        copied.lanes.rebind()
        return copied

    def state(self) -> tuple:
        return self.now, *super().state()

    def _copier_may_land(self) -> bool:
        return super()._copier_may_land() or self.lanes.may_carry()

    def move_copier(self) -> None:
        if self.landing and not super()._copier_may_land():
            self.history = (f"copier: carries {self.lanes._filling[0][1]}", self.history)
            self.lanes.carry()
        else:
            super().move_copier()

    def _do_plan(self, batch: int, uses: Uses) -> None:
        super()._do_plan(batch, uses)
        self._forget_what_is_past()

    def _do_demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        super()._do_demand(batch, layer, experts)
        self.now = self.position(batch, layer)
        self._forget_what_is_past()

    def _forget_what_is_past(self) -> None:
        self.future = [(at, key) for at, key in self.future if at >= self.now]

    def _do_stage(self, batch: int, layer: int) -> int | None:
        goes_on_at = super()._do_stage(batch, layer)
        _, missing = self.wanted_at(self.position(batch, layer))
        assert goes_on_at is None or not missing, "computed though somebody is missing"
        return goes_on_at

    def check_rest(self) -> None:
        super().check_rest()
        there, missing = self.wanted_at(self.now)
        assert there or not missing or self.engine._enqueuing, "rests though one is named"

    def check_end(self) -> None:
        assert not self.lanes.has_more
        super().check_end()


def named(batch: int, *layers: Sequence[int], waits: bool = True) -> list[tuple]:
    return forward(batch, *layers, how="demand", waits=waits)


CASES = {
    "all is predicted, in time or not, and fits": Case(
        slots=2,
        executor=[*named(0, [A, B]), *named(1, [B])],
        other=[("plan", 0, sure([A, B])), ("plan", 1, sure([B]))],
        depth=2,
    ),
    "nothing is predicted and one slot changes hands": Case(
        slots=1, executor=[*named(0, [A], waits=False), *named(1, [B, A], waits=False), *named(2, [B])], policy=LRU
    ),
    "who goes for a later batch is named at once": Case(
        slots=1,
        executor=[("plan", 0, sure([A])), *named(0, [A], waits=False), *named(1, [A, B])],
        other=[("plan", 1, sure([B]))],
    ),
    "predictions are wrong": Case(
        slots=2,
        executor=[*named(0, [C]), *named(1, [A, C])],
        other=[("plan", 0, sure([A, B])), ("plan", 1, sure([C, D]))],
        policy=LRU,
        depth=2,
    ),
    "parts of two": Case(
        slots=4,
        executor=[("plan", 0, sure(range(2))), *named(0, range(6), waits=False), *named(1, [0])],
        layers=(6,),
        depth=2,
        part=2,
    ),
    "few may come at the cost of others, but whoever is named does": Case(
        slots=2,
        executor=[("plan", 1, sure([A], [A])), ("plan", 0, sure([], [B])), *named(0, [C], [B]), *named(1, [A], [])],
        layers=(3, 2),
        policy=LookAhead,
        depth=1,
    ),
    "what was planned never comes, and fills all slots": Case(
        slots=2,
        executor=[("plan", 0, sure([A], [B])), ("plan", 1, sure([A, B], [])), *named(3, [C], [C, A])],
        other=[("plan", 2, sure([B], [A]))],
        layers=(3, 3),
        policy=LookAhead,
        depth=2,
    ),
    "plans come in any order, and of layers that are past": Case(
        slots=1,
        executor=[*named(1, [A], [B]), *named(0, [B], [B])],
        other=[("plan", 1, sure([B], [A])), ("plan", 0, sure([A], [B]))],
        layers=(2, 2),
    ),
    "a batch is enqueued before the one before it has ended": Case(
        slots=1,
        executor=ahead(named(0, [A, B], waits=False), named(1, [C, A], waits=False)),
        other=[("plan", 1, sure([C]))],
        policy=LRU,
    ),
    "a layer is given up between its parts": Case(
        slots=1,
        executor=[
            *(("demand", 0, 0, [A, B, C]), ("stage", 0, 0), ("launch", 0, 0, [A, B, C], False), ("read", 0, 0, False)),
            *(("finish", 0), *named(1, [B, A])),
        ],
        other=[("plan", 1, sure([B, A]))],
    ),
    "a layer is given up when its router has spoken": Case(
        slots=1, executor=[("demand", 0, 0, [A, B]), ("finish", 0), *named(1, [B, A])], other=[("plan", 2, sure([C]))]
    ),
    "there is a slot for every expert": Case(
        slots=3, executor=[*named(0, [A, B]), *named(1, [B, C]), *named(2, [A])], other=[("plan", 1, sure([C]))], layers=(3,)
    ),
}


HANDS, GOES, PARTS, ASIDE, PAST, LATE = (
    "nothing is predicted and one slot changes hands",
    "who goes for a later batch is named at once",
    "parts of two",
    "few may come at the cost of others, but whoever is named does",
    "what was planned never comes, and fills all slots",
    "plans come in any order, and of layers that are past",
)


@pytest.mark.parametrize(("case", "entries"), [(case, 1) for case in CASES] + [(HANDS, 2), (GOES, 2), (PARTS, 2)])
def test_in_every_order_of_steps_all_that_is_named_comes_and_nobody_waits_for_ever(monkeypatch, case, entries):
    monkeypatch.setattr(SimulatedRing, "entries_of_ring", entries)
    states, hits = explore(StagedWorld(CASES[case]))
    assert states > 100
    counted = [operation for operation in CASES[case].executor if operation[0] == "counted"]
    assert len(hits) == 1 and min(hits) >= len(counted), "all, in whatever order"


def random_case(seed: int) -> Case:
    """Predictions late, wrong or missing; batches in any order; forwards that break."""
    rng = random.Random(seed)
    batches, experts, layers = 6, 5, rng.choice((1, 2, 2, 3))
    executor: list[tuple] = []
    other: list[tuple] = []
    for batch in rng.sample(range(batches), batches) if rng.random() < 0.3 else range(batches):
        truth = [rng.sample(range(experts), rng.randint(0, 4)) for _ in range(layers)]
        guess = [[(e, rng.choice((0.2, 0.6, 1.0))) for e in rng.sample(range(experts), rng.randint(0, 3))] for _ in range(layers)]
        uses = rng.choice((sure(*truth), guess))
        if rng.random() < 0.5:
            executor.insert(rng.randint(max(0, len(executor) - 24), len(executor)), ("plan", batch, uses))
        elif rng.random() < 0.8:
            other.insert(rng.randint(max(0, len(other) - 2), len(other)), ("plan", batch, uses))
        operations = named(batch, *truth, waits=rng.random() < 0.5)
        if rng.random() < 0.1:
            operations = [*operations[: rng.randrange(len(operations) - 2)], ("finish", batch)]
        executor += operations
    slots, policy = rng.choice((1, 1, 2, 3, 4, 5, 8)), rng.choice((FIFO, LRU, LookAhead))
    return Case(slots, executor, other, (experts,) * layers, policy, rng.choice((1, 1, 2, 3, 5)), rng.choice((1, 1, min(2, slots))))


def test_in_random_orders_of_random_histories_all_that_is_named_comes_and_nobody_waits_for_ever(monkeypatch):
    fills = parts = hits = 0
    for seed in range(300):
        monkeypatch.setattr(SimulatedRing, "entries_of_ring", 1 + seed % 3)
        world = StagedWorld(random_case(seed))
        wander(world, seed)
        fills, parts, hits = fills + world.lanes.filled, parts + world.parts, hits + world.hits()
    assert fills > 5 * 300 and parts > 300 and hits > fills / 2


@pytest.mark.parametrize(("slots", "policy", "depth"), [(1, FIFO, 1), (2, LRU, 2), (10, LookAhead, 3)])
def test_under_stress_all_that_is_named_is_read_from_slots(hasty_threads, slots, policy, depth):
    """Real threads: an executor, one who plans, the engine's own, and the lanes'."""
    rng, experts, layers, batches = random.Random(slots), 8, 3, 400
    lanes = LiveRing(slots, slots, pauses_s=(0,) * 60 + (0.0002,))
    engine = StagedCopyEngine(make_arena([(experts, 256)] * layers), Slots(make_arena([(1, 256)]), slots, CPU), policy(), lanes)
    engine.slots = Slots(engine._arena, slots, CPU)
    engine._depth = engine._most_early = depth
    truth = [[rng.sample(range(experts), rng.randint(0, 4)) for _ in range(layers)] for _ in range(batches)]
    executed, errors = threading.Semaphore(4), list[BaseException]()

    def plan() -> None:
        guesses = random.Random(7)
        for batch, layered in enumerate(truth):
            executed.acquire()
            guess = [[e for e in range(experts) if guesses.random() < (0.8 if e in used else 0.1)] for used in layered]
            engine.plan(batch, sure(*guess))

    def execute() -> None:
        try:
            for batch, layered in enumerate(truth):
                for layer, used in enumerate(layered):
                    engine.demand(batch, layer, used)
                    in_part = True
                    while in_part:
                        in_part = engine.stage(batch, layer)
                        with lanes.changed:
                            lanes.snapshot((batch, layer), used, last=not in_part)
                            lanes.first((batch, layer))
                            lanes.second((batch, layer), last=not in_part)
                        (engine.read if in_part else engine.passed)(batch, layer)
                lanes.synchronize()
                engine.finish(batch)
                for layer, used in enumerate(layered):
                    routed = np.isin(range(experts), used).astype(np.int32)
                    engine.counted(layer, routed, np.isin(range(experts), [e for _, e in lanes.found[batch, layer]]), routed)
                executed.release()
        except BaseException as error:
            errors.append(error)
            executed.release(batches)

    engine.start()
    threads = [threading.Thread(target=part, daemon=True) for part in (plan, execute)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not errors, errors[0]
        assert not thread.is_alive(), "somebody waits for ever"
    engine.close()
    lanes.end()
    moved = engine.take()
    assert sum(moved.hits) == sum(len(used) for layered in truth for used in layered) and sum(moved.misses) == 0
    assert moved.demand_bytes > 0 and moved.prefetch_bytes > 0
    assert moved.demand_bytes + moved.prefetch_bytes == 256 * lanes.filled


# With one thing wrong.


class WritesTooEarly(SimulatedRing):
    """An entry is taken to be free although what was in it has not left."""

    def _send(self, entry: int, key: Key, slot: int, begin: int, end: int) -> SimulatedPoint:
        super()._send(entry, key, slot, begin, end)
        return self.point_type(self, 0)


class PointsTooEarly(SimulatedRing):
    """The entry of the table points to the slot before the last chunk has come."""

    def _point_to(self, key: Key, slot: int) -> SimulatedPoint:
        point = super()._point_to(key, slot)
        queue = self.queues["copy"]
        queue[-3], queue[-2] = queue[-2], queue[-3]
        return point


class MarksTooEarly(SimulatedRing):
    """A fill is taken for done when its last chunk has been given to the lane."""

    def _point_to(self, key: Key, slot: int) -> SimulatedPoint:
        super()._point_to(key, slot)
        return self.point_type(self, 0)


class LosesItsTurn(SimulatedRing):
    """An entry that is not the one whose turn it is."""

    def _write(self, entry: int, key: Key, slot: int, begin: int, end: int) -> None:
        super()._write(0, key, slot, begin, end)


class ForgetsTheSecondChunk(SimulatedRing):
    def carry(self) -> None:
        self._chunk_bytes = self._block_bytes[0]
        super().carry()


class WithdrawsWithoutWait(SimulatedRing):
    def withdraw(self, key: Key) -> None:
        super().withdraw(key)
        self.queues["copy"].pop()


class WithdrawsNobody(StagedCopyEngine):
    def _evicted(self, key: Key) -> None:
        pass


class LetsGo(StagedCopyEngine):
    """Whoever is not there is read elsewhere."""

    def stage(self, batch: int, layer: int) -> bool:
        self.is_letting_go = True
        try:
            return DeviceCopyEngine.stage(self, batch, layer)
        finally:
            self.is_letting_go = False

    def _is_coming(self) -> bool:
        return False


class SetsAside(StagedCopyEngine):
    """One whom a router has named is not worth an eviction."""

    _comes = Schedule._comes


class KeepsThePast(StagedCopyEngine):
    """What was planned and never came is waited for."""

    def demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        DeviceCopyEngine.demand(self, batch, layer, experts)


class TakesLatePlans(StagedCopyEngine):
    _want = Schedule._want


class EvictsTheNamed(StagedCopyEngine):
    def _victim(self, position: int) -> Key | None:
        return next(filter(self.slots.is_evictable, self._policy.order()), None)


class ReadsNobody(StagedCopyEngine):
    def read(self, batch: int, layer: int) -> None:
        self._unread.clear()
        super().read(batch, layer)


@pytest.mark.parametrize(
    ("engine", "lanes", "case"),
    [
        (StagedCopyEngine, WritesTooEarly, HANDS),
        (StagedCopyEngine, PointsTooEarly, HANDS),
        (StagedCopyEngine, MarksTooEarly, HANDS),
        (StagedCopyEngine, LosesItsTurn, PARTS),
        (StagedCopyEngine, ForgetsTheSecondChunk, HANDS),
        (StagedCopyEngine, WithdrawsWithoutWait, HANDS),
        (WithdrawsNobody, SimulatedRing, HANDS),
        (LetsGo, SimulatedRing, HANDS),
        (SetsAside, SimulatedRing, ASIDE),
        (KeepsThePast, SimulatedRing, PAST),
        (TakesLatePlans, SimulatedRing, LATE),
        (EvictsTheNamed, SimulatedRing, HANDS),
        (ReadsNobody, SimulatedRing, PARTS),
    ],
    ids=name,
)
def test_the_model_catches_one_thing_wrong(monkeypatch, engine, lanes, case):
    monkeypatch.setattr(SimulatedRing, "entries_of_ring", 1 if lanes is WritesTooEarly else 2)
    with pytest.raises((FoundError, RuntimeError)):
        explore(StagedWorld(CASES[case], engine, lanes))


def test_a_ring_is_what_its_tests_are_about():
    assert issubclass(SimulatedRing, RingLanes) and SimulatedRing.carry is RingLanes.carry
