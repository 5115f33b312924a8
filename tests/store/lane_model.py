"""A device without a device: two lanes, a pointer table and slots, as far as the order of events goes (store/lanes.py).

A layer runs in any number of parts, each of which computes those experts that it finds in slots and no part before it has
computed; the last computes all that are left (pipeline/gpu/grouping.py).

Bytes are not moved: a slot holds an expert, by name, or rubbish. Every operation of a lane is one step, and whoever drives the
model decides which lane steps next; whatever a step reads is checked where it is read, and the table after every step.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from store.layout import ArenaLayout, Key

HOST = -1
"""In the place of a slot's number: the expert's block in the arena, which is always right."""

RUBBISH = None
"""What a slot holds before the first copy into it, and while one runs."""

AWAITED = {"wait": "compute", "follow": "copy"}
"""Operations that wait, and for which lane."""

Layer = tuple[int, int]
"""One run of a MoE layer: (batch, layer)."""

Places = tuple[tuple[Key, int], ...]
"""Where experts are read: (expert, slot or HOST)."""


def make_arena(layers: Sequence[tuple[int, int]]) -> Any:
    """An arena without a file, and of zeros: layers of (experts, block bytes)."""
    layout = ArenaLayout.of([(experts, {"w": ((nbytes,), "uint8")}) for experts, nbytes in layers], {})
    blocks = [torch.zeros(nbytes, dtype=torch.uint8) for _, nbytes in layers]
    return SimpleNamespace(layout=layout, block=lambda layer, expert: blocks[layer])


def twin(original: Any) -> Any:
    """A copy of an object whose state is in containers, and in lists within them; all else is shared."""
    copied = object.__new__(type(original))
    copied.__dict__.update(original.__dict__)
    for name, value in original.__dict__.items():
        kind = type(value)
        if kind in _CONTAINERS:
            value = copied.__dict__[name] = value.copy()
            if kind is dict or kind is defaultdict:
                for key, item in value.items():
                    if type(item) in _CONTAINERS:
                        value[key] = item.copy()
    return copied


_CONTAINERS = {list, dict, set, deque, Counter, defaultdict}


class SimulatedMark:
    """A point of a lane: after so many operations."""

    def __init__(self, lanes: SimulatedLanes, point: int, lane: str = "copy"):
        self.lanes, self.point, self.lane = lanes, point, lane

    def on(self, lanes: SimulatedLanes) -> SimulatedMark:
        """The same point of a twin's."""
        return SimulatedMark(lanes, self.point, self.lane)

    def is_reached(self) -> bool:
        return self.lanes.has_reached(self.lane, self.point)

    def wait(self) -> None:
        assert self.is_reached(), "waits for a mark, and nobody steps"

    def span(self) -> tuple[int, int]:
        return self.point, self.point


class SimulatedLanes:
    """Implements store.lanes.Lanes, and takes the kernels of forwards.

    Attributes:
        memory: per slot what it holds.
        entries: the pointer table, of those whose entry points to a slot: expert -> slot.
        queues: what the lanes have still to do.
        done: operations that each lane has done.
        filled: marks of fills that have been reached.
        used, found: of every layer that was given or has begun to run, the experts it uses, and those it reads from slots.
    """

    mark = SimulatedMark

    def __init__(self, slots: int):
        self.memory: list[Key | None] = [RUBBISH] * slots
        self.entries: dict[Key, int] = {}
        self.queues: dict[str, deque[tuple]] = {"compute": deque(), "copy": deque()}
        self.done = Counter(dict.fromkeys(self.queues, 0))
        self.filled = 0
        self.used: dict[Layer, tuple[Key, ...]] = {}
        self.found: dict[Layer, frozenset[Key]] = {}
        self._served: dict[Layer, frozenset[Key]] = {}  # of a layer that runs, what its snapshots took
        self._computed: dict[Layer, frozenset[Key]] = {}  # and its matmuls have computed
        self._snapshots: dict[Layer, Places] = {}
        self._read: dict[Layer, Places] = {}  # by the first matmul

    def state(self) -> tuple:
        """All that what follows depends on, and `found`."""
        computed = self.done["compute"]
        copying = tuple(
            ("wait", max(0, operation[1] - computed)) if operation[0] == "wait" else operation for operation in self.queues["copy"]
        )
        copied = self.done["copy"]
        computing = tuple(
            ("follow", max(0, operation[1] - copied)) if operation[0] == "follow" else operation
            for operation in self.queues["compute"]
        )
        running = (self.found, self._served, self._computed, self._snapshots, self._read)
        return (
            *(tuple(self.memory), frozenset(self.entries.items()), computing, copying),
            *(frozenset(layers.items()) for layers in running),
        )

    # What is given to the lanes.

    def fill(self, key: Key, slot: int) -> SimulatedMark:
        self.queues["copy"] += [("begin", key, slot), ("end", key, slot), ("store", key, slot), ("mark",)]
        return self.mark(self, self.point("copy"))

    def withdraw(self, key: Key) -> None:
        self.queues["compute"].append(("withdraw", key))
        self.queues["copy"].append(("wait", self.point("compute")))

    def follow(self, fills: Sequence[SimulatedMark]) -> SimulatedMark:  # type: ignore[override]
        if fills:
            self.queues["compute"].append(("follow", max(mark.point for mark in fills)))
            self._end_waits()
        return self.mark(self, self.point("compute"), "compute")

    def point(self, lane: str) -> int:
        """Where a lane is when it has done all that it was given."""
        return self.done[lane] + len(self.queues[lane])

    def snapshot(self, layer: Layer, experts: Collection[int], expected: Collection[Key] = (), last: bool = True) -> None:
        """A part's first kernel: reads the entries of the experts that the layer uses, `expected` among them from slots.

        Args:
            last: it takes all that have not been computed; else those of them that are in slots.
        """
        self.used[layer] = tuple((layer[1], expert) for expert in experts)
        self.queues["compute"].append(("snapshot", layer, tuple(expected), last))

    def first(self, layer: Layer) -> None:
        """A part's first matmul."""
        self.queues["compute"].append(("first", layer))

    def second(self, layer: Layer, last: bool = True) -> None:
        """A part's second matmul, and behind the last one the layer is over."""
        self.queues["compute"].append(("second", layer, last))

    # Steps.

    def has_reached(self, lane: str, point: int) -> bool:
        return self.done[lane] >= point

    def has_run(self, layer: Layer) -> bool:
        return layer in self.found and layer not in self._served

    def can_step(self, lane: str) -> bool:
        queue = self.queues[lane]
        awaited = AWAITED.get(queue[0][0]) if queue else None
        return bool(queue) and (awaited is None or self.has_reached(awaited, queue[0][1]))

    def step(self, lane: str) -> None:
        """The next operation of a lane, and all waits that end with it: whether they are steps of their own makes no difference."""
        what, *details = self.queues[lane].popleft()
        self.done[lane] += 1
        getattr(self, f"_do_{what}")(*details)
        self._end_waits()
        self.check()

    def _end_waits(self) -> None:
        for lane, queue in self.queues.items():
            while queue and queue[0][0] in AWAITED and self.can_step(lane):
                queue.popleft()
                self.done[lane] += 1

    def check(self) -> None:
        for key, slot in self.entries.items():
            assert self.memory[slot] == key, f"the entry of {key} points to {self.memory[slot] or 'rubbish'}"

    def _do_begin(self, key: Key, slot: int) -> None:
        self.memory[slot] = RUBBISH

    def _do_end(self, key: Key, slot: int) -> None:
        self.memory[slot] = key

    def _do_store(self, key: Key, slot: int) -> None:
        self.entries[key] = slot

    def _do_mark(self) -> None:
        self.filled += 1

    def _do_wait(self, point: int) -> None:
        pass

    def _do_withdraw(self, key: Key) -> None:
        self.entries.pop(key, None)

    def _do_snapshot(self, layer: Layer, expected: Collection[Key], last: bool) -> None:
        places = self._places(self._left(layer))
        taken = self._snapshots[layer] = places if last else tuple((key, place) for key, place in places if place != HOST)
        self._served[layer] = self._served.get(layer, frozenset()).union(key for key, _ in taken)
        self.found[layer] = self.found.get(layer, frozenset()).union(key for key, place in taken if place != HOST)
        assert self.found[layer].issuperset(expected), "read in place though it was in a slot when the layer was enqueued"

    def _do_first(self, layer: Layer) -> None:
        self._read[layer] = self._snapshots[layer]
        self._check_places(self._read[layer])

    def _do_second(self, layer: Layer, last: bool) -> None:
        places = self._seen_by_second(self._snapshots.pop(layer))
        self._check_places(places)
        assert places == self._read.pop(layer), "a layer's matmuls read an expert in different places"
        before, now = self._computed.pop(layer, frozenset()), frozenset(key for key, _ in places)
        assert not before & now, "an expert was computed twice"
        if last:
            assert before | now == set(self.used[layer]), "an expert was not computed"
            del self._served[layer]
        else:
            self._computed[layer] = before | now

    def _left(self, layer: Layer) -> tuple[Key, ...]:
        """The experts that no part has taken."""
        served = self._served.get(layer, frozenset())
        return tuple(key for key in self.used[layer] if key not in served)

    def _seen_by_second(self, snapshot: Places) -> Places:
        return snapshot

    def _places(self, keys: Sequence[Key]) -> Places:
        return tuple((key, self.entries.get(key, HOST)) for key in keys)

    def _check_places(self, places: Places) -> None:
        for key, place in places:
            assert place == HOST or self.memory[place] == key, f"{self.memory[place] or 'rubbish'} was read for {key}"


class LiveMark(SimulatedMark):
    """Blocks, as the real one does."""

    lanes: LiveLanes

    def wait(self) -> None:
        with self.lanes.changed:
            self.lanes.changed.wait_for(lambda: self.is_reached() or self.lanes.broken)

    def span(self) -> tuple[int, int]:
        now = time.time_ns()
        return now, now


class LiveLanes(SimulatedLanes):
    """The same, driven by a thread of its own, at random and with small pauses. Fills can be held back by hand.

    Attributes:
        filling: the experts of all fills, in the order in which they were given.
        held: experts whose copy does not begin.
        broken: what a check found; the lanes stand still from then on.
    """

    mark = LiveMark

    def __init__(self, slots: int, seed: int = 0, pauses_s: Sequence[float] = (0,)):
        super().__init__(slots)
        self.changed = threading.Condition()
        self.filling: list[Key] = []
        self.held: set[Key] = set()
        self.broken: AssertionError | None = None
        self._rng, self._pauses_s = random.Random(seed), pauses_s
        self._ended = False
        self._thread = threading.Thread(target=self._drive, name="device", daemon=True)
        self._thread.start()

    def end(self) -> None:
        with self.changed:
            self._ended = True
            self.changed.notify_all()
        self._thread.join()

    def synchronize(self) -> None:
        """Waits until the compute lane has done all that it was given by now."""
        with self.changed:
            point = self.point("compute")
            self.changed.wait_for(lambda: self.has_reached("compute", point) or self.broken)
            if self.broken:
                raise self.broken

    def let(self, *keys: Key) -> None:
        """No longer holds them back."""
        with self.changed:
            self.held.difference_update(keys)
            self.changed.notify_all()

    def fill(self, key: Key, slot: int) -> SimulatedMark:
        with self.changed:
            self.filling.append(key)
            mark = super().fill(key, slot)
            self.changed.notify_all()
        return mark

    def withdraw(self, key: Key) -> None:
        with self.changed:
            super().withdraw(key)
            self.changed.notify_all()

    def follow(self, fills: Sequence[SimulatedMark]) -> SimulatedMark:  # type: ignore[override]
        with self.changed:
            mark = super().follow(fills)
            self.changed.notify_all()
        return mark

    def snapshot(self, layer: Layer, experts: Collection[int], expected: Collection[Key] = (), last: bool = True) -> None:
        with self.changed:
            super().snapshot(layer, experts, expected, last)
            self.changed.notify_all()

    def first(self, layer: Layer) -> None:
        with self.changed:
            super().first(layer)
            self.changed.notify_all()

    def second(self, layer: Layer, last: bool = True) -> None:
        with self.changed:
            super().second(layer, last)
            self.changed.notify_all()

    def can_step(self, lane: str) -> bool:
        queue = self.queues[lane]
        return super().can_step(lane) and not (queue[0][0] == "begin" and queue[0][1] in self.held)

    def _drive(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self._ended or any(map(self.can_step, self.queues)))
                    if self._ended:
                        return
                    self.step(self._rng.choice([lane for lane in self.queues if self.can_step(lane)]))
                    self.changed.notify_all()
                if pause_s := self._rng.choice(self._pauses_s):
                    time.sleep(pause_s)
        except AssertionError as error:
            with self.changed:
                self.broken = error
                self.changed.notify_all()
