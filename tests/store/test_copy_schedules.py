"""The copy engine step by step: a reader, the copy thread and another who plans and finishes batches, run by hand in one thread.

Small histories in every order of steps, larger ones in random orders. After each step: no two experts in one slot, the budget is
kept, nobody is evicted who is being read or wanted sooner, and every view holds the arena's bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from store.arena import Arena, build
from store.copies import CopyEngine
from store.eviction import FIFO, LRU, LookAhead
from store.just_in_time import KNOWN, NEVER, SURE
from store.layout import ArenaLayout, Key
from store.slots import Slots

A, B, C, D = range(4)
Uses = Sequence[Sequence[tuple[int, float]]]


def make_arena(path: Path, layers: Sequence[tuple[int, int]]) -> Arena:
    """Layers of (experts, block bytes), full of bytes that differ from expert to expert."""
    layout = ArenaLayout.of([(experts, {"w": ((nbytes,), "uint8")}) for experts, nbytes in layers], {})
    noise = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return build(path, layout, "", lambda memory: memory.copy_(noise))


def sure(*layers: Sequence[int]) -> Uses:
    """A plan that is certain of its experts."""
    return [[(expert, 1.0) for expert in layer] for layer in layers]


def random_plan(rng: random.Random, layers: int, experts: int) -> Uses:
    return [[(e, rng.choice((0.2, 0.6, 1.0))) for e in rng.sample(range(experts), rng.randint(0, 3))] for _ in range(layers)]


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
        least_hits: in the one that is worst, where the copy thread comes too late for everything: those of misses that stayed.
    """

    slots: int
    reader: list[tuple]
    other: list[tuple] = field(default_factory=list)
    layers: tuple[tuple[int, int], ...] = ((4, 256),)
    policy: type = FIFO
    most_hits: int = -1
    least_hits: int = 0


class World:
    """Runs a case under a schedule and checks, after every step, all that must always hold.

    The engine's lock is replaced: nobody moves unless the schedule says so, and where the engine would wait, others move.
    """

    def __init__(self, arena: Arena, case: Case, schedule: Schedule):
        self.arena, self.schedule = arena, schedule
        self.slots = Slots(arena, case.slots, torch.device("cpu"))
        self.slots.memory.fill_(0xEE)
        self.engine = CopyEngine(arena, self.slots, case.policy(), background=False)
        self.engine._changed = self  # type: ignore[assignment]
        self.engine._proceed = lambda: None  # type: ignore[method-assign] - the copy thread moves when it is its turn
        self.engine._trust.learn = lambda *said: None  # type: ignore[method-assign] - what it makes of tables is not the subject
        self._fills, self.engine._fill = self.engine._fill, self._fill  # type: ignore[method-assign]
        self.filling: list[Key] = []  # misses that are to stay
        self.is_copier = False
        self.other = list(case.other)
        self.copying: tuple[Key, torch.Tensor] | None = None
        self.future: list[tuple[int, Key]] = []  # what is planned and not yet past, kept independently of the engine
        self.unsure: set[tuple[int, Key]] = set()  # of that, what no copy is made for
        self.planned: set[int] = set()
        self.finished = -1
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
            if batch not in self.planned and batch > self.finished:
                self.planned.add(batch)
                layers = len(self.arena.layout.layers)
                for layer, uses in enumerate(*details):
                    known = {(batch * layers + layer, (layer, e)): p for e, p in uses if p >= KNOWN}
                    self.future += known
                    self.unsure |= {use for use, p in known.items() if p < SURE}
        elif what == "finish":
            self.engine.finish(batch)
            self.finished = max(self.finished, batch)
            layers = len(self.arena.layout.layers)
            self.future = [(at, key) for at, key in self.future if at // layers > batch]
        else:
            self.read(batch, *details)

    def read(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        now = batch * len(self.arena.layout.layers) + layer
        self.future = [(at, key) for at, key in self.future if at != now]
        with self.engine.reading(batch, layer, experts) as views:
            start, end = self.slots.memory.data_ptr(), self.slots.memory.data_ptr() + self.slots.memory.numel()
            seen = []
            for at, view in views:
                expert = experts[at]
                seen.append(expert)
                self.reading = [(layer, expert)] if start <= view["w"].data_ptr() < end else []  # must stay where it is
                for moment in ("first look", "second look"):
                    assert torch.equal(view["w"], self.arena.block(layer, expert)), "other bytes than the arena's"
                    self.check()
                    self.let_others_move(f"{moment} at {at}")
                assert torch.equal(view["w"], self.arena.block(layer, expert)), "other bytes than the arena's"
                self.reading = []
            assert sorted(seen) == sorted(experts)

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
            (where, self.at, len(self.other), self.copying and self.copying[0], tuple(self.reading), tuple(self.filling)),
            (tuple(slots._slot_of.items()), tuple(slots._free), frozenset(slots._ready), frozenset((+slots._pins).items())),
            (
                tuple(engine._queue),
                frozenset(engine._wanted),
                frozenset(engine._planned),
                engine._last_finished,
            ),
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
            self.is_copier = True
            self.copying = self.engine._next_copy()
            self.is_copier = False
            assert self.evicted is None, "evicted for nobody"
            if self.copying is None:
                self.check_rest()
                return False
            self.copying[1].fill_(0xEE)
        else:
            copy, self.copying = self.copying, None
            self.is_copier = True
            self.engine._copy(*copy)
            self.is_copier = False
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
            at = min((at for at, wanted in self.future if wanted == key), default=NEVER)
            assert all(use > at for use, wanted in self.future if wanted == self.evicted), "evicted though wanted sooner"
            self.evicted = None
        if self.is_copier:
            self.admitted.append(key)
        return Slots.admit(self.slots, key)

    # In the place of the engine's method.

    def _fill(self, key: Key, slot: torch.Tensor) -> None:
        """A copy has two steps; a miss that stays is filled by the reader, while others move."""
        if not self.is_copier:
            self.filling.append(key)
            slot.fill_(0xEE)
            self.let_others_move("a miss comes")
            self.filling.remove(key)
        self._fills(key, slot)

    def check_rest(self) -> None:
        """The copy thread has nothing to do only if there is no way to bring who is needed next."""
        first = {key: min(at for at, wanted in self.future if wanted == key) for _, key in self.future}
        missing = [at for key, at in first.items() if key not in self.slots and (at, key) not in self.unsure]
        if missing and self.slots.count:
            assert not self.slots.has_free, "rests beside a free slot"
            if self.engine._policy.looks_ahead:
                return  # it waits on purpose
            late = [key for key in self.slots._slot_of if all(use > min(missing) for use, wanted in self.future if wanted == key)]
            assert not any(self.slots.is_evictable(key) for key in late), "rests though one may go"

    def check(self) -> None:
        slots = self.slots
        taken = list(slots._slot_of.values())
        assert len(set(taken)) == len(taken), "two experts in one slot"
        assert not set(taken) & set(slots._free)
        assert len(taken) + len(slots._free) == slots.count
        assert sorted(self.engine._policy.order()) == sorted(slots._slot_of)
        assert slots.resident_bytes == sum(slots.block_bytes(key) for key in slots._slot_of)
        assert slots.resident_bytes <= slots.resident_peak_bytes <= slots.memory.numel()
        assert set(self.reading) <= slots._ready <= slots._slot_of.keys()
        assert all(slots._pins[key] for key in self.reading)
        coming = [self.copying[0]] if self.copying else []
        assert slots._slot_of.keys() - slots._ready >= {*coming, *self.filling}
        assert all(slots._pins[key] for key in slots._slot_of.keys() - slots._ready - {*coming})
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
        least_hits=1,
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
    "plans come in any order": Case(
        slots=1,
        reader=[("read", 0, 0, [A, B]), ("finish", 0), ("read", 1, 0, [B, C]), ("finish", 1), ("read", 2, 0, [C])],
        other=[("plan", 2, sure([C])), ("plan", 0, sure([A])), ("plan", 1, sure([B]))],
        most_hits=3,
    ),
    "a slot passes from one to another of the same layer": Case(
        slots=1,
        reader=[
            *(("plan", batch, sure(uses)) for batch, uses in enumerate([[A], [B, A], [B], [C]])),
            *(("read", 0, 0, [A]), ("read", 1, 0, [B, A]), ("read", 2, 0, [B])),
        ],
        other=[("finish", 1), ("plan", 4, sure([A]))],
        policy=LookAhead,
        most_hits=3,
        least_hits=2,
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
        most_hits=8,
        least_hits=3,
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
    assert min(hits) == case.least_hits
    assert max(hits) == case.most_hits


def random_case(seed: int) -> Case:
    """Batches planned ahead by another thread, not always in order; predictions are often wrong, and some are cancelled."""
    rng = random.Random(seed)
    batches, experts, layers = 5, 4, 2
    reader: list[tuple] = []
    other: list[tuple] = []
    for batch in range(batches):
        other.insert(rng.randint(max(0, len(other) - 2), len(other)), ("plan", batch, random_plan(rng, layers, experts)))
        if rng.random() < 0.2:
            other.append(("finish", rng.randint(0, batch)))
        if rng.random() < 0.3:
            reader.append(("plan", batch, random_plan(rng, layers, experts)))
        reader += [("read", batch, layer, rng.sample(range(experts), rng.randint(0, 3))) for layer in range(layers)]
        reader.append(("finish", batch))
    return Case(
        rng.choice((0, 1, 1, 2, 2, 3, 5, 8)),
        reader,
        other,
        ((experts, 256), (experts, rng.choice((256, 768)))),
        rng.choice((FIFO, LRU, LookAhead)),
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
