"""What a batch would take on a GPU, without one: `python -m tests.store.timed_lanes TRACE BATCH BUDGET [KEPT]`

The GPU's own copy engine and its copy thread, over lanes that take as long as an H200 took (docs/results.md), some times slower, so
that Python's own time is small beside it: it shows what a rule of the schedule makes of the link before a GPU is at hand. What it
leaves out: what the host costs, and that kernels read an expert of many tokens more than once.

TRACE: of a model of equal MoE layers (`train` with predictor.kind=oracle); BUDGET: a share of its experts, 0 to 1; KEPT: so many of
the true tables' names are left right (predictor.baselines.Worsened), 1 if not given. docs/benchmarks.md has what came out beside
what an H200 took. Tries, not a test: the figures are of the machine that it is to stand for.
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
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

SLOWER = 20
COPY_MS, AROUND_COPY_MS, IN_PLACE_MS = 0.1728, 0.009, 0.1838
"""Of 9.4 MB: the link's part, the events and stores around it, and a kernel's read."""
COMPUTE_MS = {1: 1.94, 8: 3.58, 64: 7.97}
"""Of a batch with all experts in slots, by its rows."""
ROUNDS, CHUNKS, BATCHES, AHEAD = 4, 4, {1: 64, 8: 16, 64: 4}, {1: 48, 8: 8, 64: 4}
LATE_S = 0.0003
"""A thread that wakes later than this begins late."""


class Mark:
    """See store.lanes.Mark."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.reach, self.wait, self.is_reached = self._reached.set, self._reached.wait, self._reached.is_set

    def span(self) -> tuple[int, int]:
        return 0, 0


class Lane:
    """Does what it is given, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self._given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def give(self, what: Callable[[], None]) -> None:
        self._given.put(what)

    def mark(self) -> Mark:
        mark = Mark()
        self.give(mark.reach)
        return mark

    def wait(self, mark: Mark) -> None:
        mark.wait()
        self.now = max(self.now, time.perf_counter() - LATE_S)

    def goes_on_at(self, when: float) -> None:
        self.now = when
        time.sleep(max(0.0, when - time.perf_counter()))

    def _work(self) -> None:
        while True:
            what = self._given.get()
            self.now = max(self.now, time.perf_counter() - LATE_S)
            what()


class TimedLanes:
    """See store.lanes.Lanes. Copies and kernels that read in place share the link."""

    def __init__(self, compute_ms: float, layers: int):
        self._copy, self.compute = Lane(), Lane()
        self._layer_s = compute_ms / layers * SLOWER / 1e3
        self._slot_of: dict[Key, int] = {}
        self._link_free, self._link = 0.0, threading.Lock()
        self.link_s, self.in_place = 0.0, 0

    def fill(self, key: Key, slot: int) -> Mark:
        def copy() -> None:
            self._cross(self._copy, COPY_MS)
            self._slot_of[key] = slot
            self._copy.goes_on_at(self._copy.now + AROUND_COPY_MS * SLOWER / 1e3)

        self._copy.give(copy)
        return self._copy.mark()

    def withdraw(self, key: Key) -> None:
        self.compute.give(lambda: self._slot_of.pop(key, None) and None)
        mark = self.compute.mark()
        self._copy.give(lambda: self._copy.wait(mark))

    def follow(self, fills: Sequence[Mark]) -> Mark:
        last = fills[-1]
        self.compute.give(lambda: self.compute.wait(last))
        return self.compute.mark()

    def layer(self, layer: int, left: set[int], found: set[int], last: bool) -> None:
        """Kernels of the experts that are left: of those in slots, or of all."""

        def run() -> None:
            there = {expert for expert in left if (layer, expert) in self._slot_of}
            found.update(there)
            left.difference_update(there)
            if last:
                for _ in left:
                    self._cross(self.compute, IN_PLACE_MS)
                self.in_place += len(left)
                self.compute.goes_on_at(self.compute.now + self._layer_s)

        self.compute.give(run)

    def _cross(self, lane: Lane, ms: float) -> None:
        for _ in range(CHUNKS):
            with self._link:
                seconds = ms * SLOWER / 1e3 / CHUNKS
                until = self._link_free = max(lane.now, self._link_free) + seconds
                self.link_s += seconds
            lane.goes_on_at(until)


def serve(engine: DeviceCopyEngine, lanes: TimedLanes, uses: Uses, tables: Tables, ahead: int, experts: int) -> list[tuple]:
    """Forwards as a GPU's Executor gives them; after each round (time, seconds that the link was used, reads in place)."""
    count, rounds, under_way = len(uses), [], deque[tuple]()

    def answer(batch: int, found: list[set[int]], ended: Mark) -> None:
        ended.wait()
        for layer, (used, there) in enumerate(zip(uses[batch % count], found, strict=True)):
            routed, hits = np.zeros((2, experts), dtype=np.int32)
            routed[list(used)], hits[list(there)] = 1, 1
            engine.counted(layer, routed, hits, routed, batch)

    def look() -> None:
        rounds.append((time.perf_counter(), lanes.link_s, lanes.in_place))

    for planned in range(count * ROUNDS + ahead):
        if planned < count * ROUNDS:
            engine.plan(planned, tables[planned % count])
        batch = planned - ahead
        if batch < 0:
            continue
        while len(under_way) > 1:
            answer(*under_way.popleft())
        if batch % count == 0:
            lanes.compute.give(look)
        layers = uses[batch % count]
        found: list[set[int]] = [set() for _ in layers]
        asks = engine.is_doubted(batch)
        whole = not asks and engine.is_ready(batch)
        for layer, used in enumerate(layers):
            left = {*used}
            if asks:
                lanes.compute.mark().wait()
                engine.demand(batch, layer, sorted(used))
            while not whole and engine.stage(batch, layer):
                lanes.layer(layer, left, found[layer], last=False)
                engine.read(batch, layer)
            lanes.layer(layer, left, found[layer], last=True)
            if not whole:
                engine.passed(batch, layer)
        if whole:
            engine.passed(batch, *range(len(layers)))
        engine.finish(batch)
        under_way.append((batch, found, lanes.compute.mark()))
    while under_way:
        answer(*under_way.popleft())
    look()
    return rounds


def history(trace: str, rows: int, count: int, kept: float) -> tuple[RoutingShape, Uses, Tables]:
    """The first `count` batches of so many rows: what routers chose, and tables of which so much is left right."""
    metadata = json.loads(traces.load_checked(Path(trace), "trace", None)[1]["shape"])
    shape = RoutingShape(**{key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()})
    whole = traces.load(Path(trace), shape, None)
    parts = [traces.select(whole, np.arange(i * rows, (i + 1) * rows), shape) for i in range(count)]
    uses = [[[expert for _, expert in layer] for layer in experts_used(part, shape.top_k)] for part in parts]
    maker = Worsened(Oracle(traces.join(parts), shape, shape.top_k), shape, kept, seed=0)
    return shape, uses, [maker.predict(part.tokens).uses for part in parts]


def main(trace: str, batch: str, budget: str, kept: str = "1") -> None:
    rows = int(batch)
    shape, uses, tables = history(trace, rows, BATCHES[rows], float(kept))
    slots = int(sum(shape.experts) * float(budget))
    sequence = [[(i, expert) for expert in layer] for each in uses for i, layer in enumerate(each)]
    limit = max(fewest_moves(sequence, slots) / len(uses) * COPY_MS, COMPUTE_MS[rows])
    lanes = TimedLanes(COMPUTE_MS[rows], shape.layers)
    arena: Any = SimpleNamespace(layout=layout_of(shape.experts))
    engine = DeviceCopyEngine(arena, Slots(arena, slots, torch.device("meta")), POLICIES["lookahead"](), lanes, may_doubt=True)
    engine.start()
    rounds = serve(engine, lanes, uses, tables, AHEAD[rows], max(shape.experts))
    engine.close()
    each = [[(after - before) / len(uses) for before, after in zip(*pair, strict=True)] for pair in pairwise(rounds[1:])]
    taken, link, in_place = (statistics.median(column) for column in zip(*each, strict=True))
    ms, link_ms = taken * 1e3 / SLOWER, link * 1e3 / SLOWER
    print(f"{ms:.2f} ms, {ms / limit:.2f} x limit; the link is used for {link_ms:.2f} ms; {in_place:.1f} read in place")


if __name__ == "__main__":
    main(*sys.argv[1:])
