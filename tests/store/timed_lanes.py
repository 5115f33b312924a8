"""What a batch would take on a GPU, without one: `python -m tests.store.timed_lanes TRACE BATCH BUDGET [KEPT [HOST_MS]]`

The GPU's own copy engine over lanes that take as long as an H200 took (docs/results.md), by a clock that only counts: the same on
any machine, to the digit. Shows what a rule of the schedule makes of the link before a GPU is at hand. What it leaves out: that
kernels read an expert of many tokens more than once, and of the host all but HOST_MS.

TRACE: of a model of equal MoE layers (`train` with predictor.kind=oracle); BUDGET: a share of its experts, 0 to 1; KEPT: so many of
the true tables' names are left right (predictor.baselines.Worsened), 1 if not given; HOST_MS: of Python for each copy, and as much
for each layer's kernels, one at a time since its threads take turns; 0 if not given. docs/benchmarks.md has what came out beside
what GPUs took. Tries, not a test: the figures are of the machine that it is to stand for.
"""

from __future__ import annotations

import heapq
import json
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pipeline.bench.limit import fewest_moves
from pipeline.bench.workload import experts_used
from predictor import traces
from predictor.baselines import Oracle, Worsened
from predictor.tokens import RoutingShape
from store.device_copies import DeviceCopyEngine
from store.eviction import POLICIES
from store.layout import Key
from store.simulator import Tables, Uses, layout_of
from store.slots import Slots

COPY_MS, AROUND_COPY_MS, IN_PLACE_MS = 0.1728, 0.009, 0.1838
"""Of 9.4 MB: the link's part, the events and stores around it, and a kernel's read."""
COMPUTE_MS = {1: 1.94, 8: 3.58, 64: 7.97}
"""Of a batch with all experts in slots, by its rows."""
ROUNDS, CHUNKS, BATCHES, AHEAD = 3, 4, {1: 64, 8: 16, 64: 3}, {1: 48, 8: 8, 64: 4}


class Clock:
    """What happens when; now in ms. And who has Python's lock until when."""

    def __init__(self) -> None:
        self.now = self._python_free = 0.0
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (when, next(self._order), what))

    def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self.now, _, what = heapq.heappop(self._coming)
            what()

    def python(self, ms: float) -> float:
        """When a thread that needs so much of Python will have had it."""
        self._python_free = max(self.now, self._python_free) + ms
        return self._python_free

    def spend(self, ms: float) -> None:
        """The main thread's."""
        end, come = self.python(ms), []
        self.at(end, lambda: come.append(None))
        self.until(lambda: bool(come))


class Mark:
    """See store.lanes.Mark."""

    def __init__(self) -> None:
        self._reached = False
        self._then: list[Callable[[], None]] = []

    def is_reached(self) -> bool:
        return self._reached

    def wait(self) -> None:
        assert self._reached, "waited for by hand"

    def span(self) -> tuple[int, int]:
        return 0, 0

    def reach(self) -> None:
        self._reached = True
        for what in self._then:
            what()

    def then(self, what: Callable[[], None]) -> None:
        """Does it as soon as the mark is reached."""
        if self._reached:
            what()
        else:
            self._then.append(what)


Step = Iterator["float | Mark"]
"""Of a lane: until when, or for what, it is busy."""


class Lane:
    """Does what it is given, one after the other."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._given: deque[Step] = deque()
        self._is_busy = False

    def give(self, what: Step) -> None:
        self._given.append(what)
        if not self._is_busy:
            self._is_busy = True
            self._clock.at(self._clock.now, self._go_on)

    def mark(self) -> Mark:
        mark = Mark()

        def reach() -> Step:
            mark.reach()
            yield from ()

        self.give(reach())
        return mark

    def _go_on(self) -> None:
        while self._given:
            busy = next(self._given[0], None)
            if busy is None:
                self._given.popleft()
            elif isinstance(busy, Mark):
                busy.then(lambda: self._clock.at(self._clock.now, self._go_on))
                return
            else:
                self._clock.at(busy, self._go_on)
                return
        self._is_busy = False


class TimedLanes:
    """See store.lanes.Lanes. Copies and kernels that read in place share the link."""

    def __init__(self, compute_ms: float, layers: int):
        self.clock = Clock()
        self.compute, self._copy = Lane(self.clock), Lane(self.clock)
        self._layer_ms = compute_ms / layers
        self._slot_of: dict[Key, int] = {}
        self._link_free = 0.0
        self.link_ms, self.in_place = 0.0, 0

    def fill(self, key: Key, slot: int) -> Mark:
        def copy() -> Step:
            yield from self._cross(COPY_MS)
            self._slot_of[key] = slot
            yield self.clock.now + AROUND_COPY_MS

        self._copy.give(copy())
        return self._copy.mark()

    def withdraw(self, key: Key) -> None:
        def forget() -> Step:
            self._slot_of.pop(key, None)
            yield from ()

        self.compute.give(forget())
        self._copy.give(iter([self.compute.mark()]))

    def follow(self, fills: Sequence[Mark]) -> Mark:
        self.compute.give(iter([fills[-1]]))
        return self.compute.mark()

    def layer(self, layer: int, left: set[int], found: set[int], last: bool) -> None:
        """Kernels of the experts that are left: of those in slots, or of all."""

        def run() -> Step:
            there = {expert for expert in left if (layer, expert) in self._slot_of}
            found.update(there)
            left.difference_update(there)
            if last:
                for _ in left:
                    yield from self._cross(IN_PLACE_MS)
                self.in_place += len(left)
                yield self.clock.now + self._layer_ms

        self.compute.give(run())

    def _cross(self, ms: float) -> Step:
        for _ in range(CHUNKS):
            self._link_free = max(self.clock.now, self._link_free) + ms / CHUNKS
            self.link_ms += ms / CHUNKS
            yield self._link_free


class TimedEngine(DeviceCopyEngine):
    """Its copy thread, and whoever waits for it, by the clock: in the place of its condition, too."""

    def __init__(self, experts: Sequence[int], slots: int, lanes: TimedLanes, host_ms: float):
        arena: Any = SimpleNamespace(layout=layout_of(experts))
        super().__init__(arena, Slots(arena, slots, torch.device("meta")), POLICIES["lookahead"](), lanes, may_doubt=True)
        self._clock, self._host_ms = lanes.clock, host_ms
        self._changed = self  # type: ignore[assignment]
        self._is_asleep = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def notify_all(self) -> None:
        if self._is_asleep:
            self._is_asleep = False
            self._clock.at(self._clock.now, self._go_on)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        self._clock.until(reached)

    def _go_on(self) -> None:
        """See `_work`."""
        if self._begin():
            self._clock.at(self._clock.python(self._host_ms / 2), self._go_on)
        elif self._under_way:
            self._under_way[0][1].then(lambda: self._clock.at(self._clock.now, self._see))  # type: ignore[attr-defined]
        else:
            self._at_rest = self._is_asleep = True

    def _see(self) -> None:
        before = len(self._under_way)
        self._land()
        self._clock.at(self._clock.python((before - len(self._under_way)) * self._host_ms / 2), self._go_on)


def serve(engine: TimedEngine, lanes: TimedLanes, uses: Uses, tables: Tables, ahead: int, host_ms: float) -> list[tuple]:
    """Forwards as a GPU's Executor gives them; after each round (ms, ms that the link was used, reads in place)."""
    each, rounds, under_way = len(uses), [], deque[tuple]()
    experts, clock = max(layer.experts for layer in engine._arena.layout.layers), lanes.clock

    def answer(batch: int, found: list[set[int]], ended: Mark) -> None:
        clock.until(ended.is_reached)
        for layer, (used, there) in enumerate(zip(uses[batch % each], found, strict=True)):
            routed, hits = np.zeros((2, experts), dtype=np.int32)
            routed[list(used)], hits[list(there)] = 1, 1
            engine.counted(layer, routed, hits, routed, batch)

    def look() -> Step:
        rounds.append((clock.now, lanes.link_ms, lanes.in_place))
        yield from ()

    for planned in range(each * ROUNDS + ahead):
        if planned < each * ROUNDS:
            engine.plan(planned, tables[planned % each])
        batch = planned - ahead
        if batch < 0:
            continue
        while len(under_way) > 1:
            answer(*under_way.popleft())
        if batch % each == 0:
            lanes.compute.give(look())
        layers = uses[batch % each]
        found: list[set[int]] = [set() for _ in layers]
        asks = engine.is_doubted(batch)
        whole = not asks and engine.is_ready(batch)
        for layer, used in enumerate(layers):
            left = {*used}
            if asks:
                clock.until(lanes.compute.mark().is_reached)
                engine.demand(batch, layer, sorted(used))
            while not whole and engine.stage(batch, layer):
                lanes.layer(layer, left, found[layer], last=False)
                engine.read(batch, layer)
            lanes.layer(layer, left, found[layer], last=True)
            if not whole:
                clock.spend(host_ms)
                engine.passed(batch, layer)
        if whole:
            engine.passed(batch, *range(len(layers)))
        engine.finish(batch)
        under_way.append((batch, found, lanes.compute.mark()))
    while under_way:
        answer(*under_way.popleft())
    lanes.compute.give(look())
    clock.until(lambda: len(rounds) > ROUNDS)
    return rounds


def history(trace: str, rows: int, batches: int, kept: float) -> tuple[RoutingShape, Uses, Tables]:
    """The first `batches` of so many rows: what routers chose, and tables of which so much is left right."""
    metadata = json.loads(traces.load_checked(Path(trace), "trace", None)[1]["shape"])
    shape = RoutingShape(**{key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()})
    whole = traces.load(Path(trace), shape, None)
    parts = [traces.select(whole, np.arange(i * rows, (i + 1) * rows), shape) for i in range(batches)]
    uses = [[[expert for _, expert in layer] for layer in experts_used(part, shape.top_k)] for part in parts]
    maker = Worsened(Oracle(traces.join(parts), shape, shape.top_k), shape, kept, seed=0)
    return shape, uses, [maker.predict(part.tokens).uses for part in parts]


def main(trace: str, batch: str, budget: str, kept: str = "1", host: str = "0") -> None:
    rows, host_ms = int(batch), float(host)
    shape, uses, tables = history(trace, rows, BATCHES[rows], float(kept))
    slots = int(sum(shape.experts) * float(budget))
    sequence = [[(i, expert) for expert in layer] for each in uses for i, layer in enumerate(each)]
    limit = max(fewest_moves(sequence, slots) / len(uses) * COPY_MS, COMPUTE_MS[rows])
    lanes = TimedLanes(COMPUTE_MS[rows], shape.layers)
    engine = TimedEngine(shape.experts, slots, lanes, host_ms)
    rounds = serve(engine, lanes, uses, tables, AHEAD[rows], host_ms)
    each = [[(after - before) / len(uses) for before, after in zip(*pair, strict=True)] for pair in pairwise(rounds[1:])]
    ms, link_ms, in_place = (statistics.median(column) for column in zip(*each, strict=True))
    print(f"{ms:.2f} ms, {ms / limit:.2f} x limit; the link is used for {link_ms:.2f} ms; {in_place:.1f} read in place")


if __name__ == "__main__":
    main(*sys.argv[1:])
