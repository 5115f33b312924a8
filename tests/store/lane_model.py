"""A device without a device: two lanes, a pointer table and slots, as far as the order of events goes (store/lanes.py).

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

Layer = tuple[int, int]
"""One run of a MoE layer: (batch, layer)."""


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
    """The point after so many fills."""

    def __init__(self, lanes: SimulatedLanes, number: int):
        self.lanes, self.number = lanes, number

    def is_reached(self) -> bool:
        return self.lanes.has_reached(self.number)

    def wait(self) -> None:
        assert self.is_reached(), "waits for a mark, and nobody steps"

    def span(self) -> tuple[int, int]:
        return self.number, self.number


class SimulatedLanes:
    """Implements store.lanes.Lanes, and takes the kernels of forwards.

    Attributes:
        memory: per slot what it holds.
        entries: the pointer table, of those whose entry points to a slot: expert -> slot.
        queues: what the lanes have still to do.
        computed: operations that the compute lane has done.
        filled: marks that the copy lane has reached.
        used, found: of every layer that was given or has begun to run, the experts it uses, and those it reads from slots.
    """

    def __init__(self, slots: int):
        self.memory: list[Key | None] = [RUBBISH] * slots
        self.entries: dict[Key, int] = {}
        self.queues: dict[str, deque[tuple]] = {"compute": deque(), "copy": deque()}
        self.computed = self.given = self.filled = 0
        self.used: dict[Layer, tuple[Key, ...]] = {}
        self.found: dict[Layer, frozenset[Key]] = {}
        self._snapshots: dict[Layer, tuple[tuple[Key, int], ...]] = {}
        self._read: dict[Layer, tuple[tuple[Key, int], ...]] = {}  # by the first matmul

    def state(self) -> tuple:
        """All that what follows depends on, and `found`."""
        copying = tuple(
            ("wait", max(0, operation[1] - self.computed)) if operation[0] == "wait" else operation
            for operation in self.queues["copy"]
        )
        return (
            *(tuple(self.memory), frozenset(self.entries.items()), tuple(self.queues["compute"]), copying),
            *(frozenset(places.items()) for places in (self.found, self._snapshots, self._read)),
        )

    # What is given to the lanes.

    def fill(self, key: Key, slot: int) -> SimulatedMark:
        self.queues["copy"] += [("begin", key, slot), ("end", key, slot), ("store", key, slot), ("mark",)]
        self.given += 1
        return SimulatedMark(self, self.given)

    def withdraw(self, key: Key) -> None:
        self.queues["compute"].append(("withdraw", key))
        self.queues["copy"].append(("wait", self.point()))

    def point(self) -> int:
        """Where the compute lane is when it has done all that it was given."""
        return self.computed + len(self.queues["compute"])

    def snapshot(self, layer: Layer, experts: Collection[int], expected: Collection[Key] = ()) -> None:
        """A layer's first kernel: reads the entries of the experts that it uses, `expected` among them from slots."""
        self.used[layer] = tuple((layer[1], expert) for expert in experts)
        self.queues["compute"].append(("snapshot", layer, tuple(expected)))

    def first(self, layer: Layer) -> None:
        """A layer's first matmul."""
        self.queues["compute"].append(("first", layer))

    def second(self, layer: Layer) -> None:
        """A layer's second matmul."""
        self.queues["compute"].append(("second", layer))

    # Steps.

    def has_reached(self, mark: int) -> bool:
        return self.filled >= mark

    def has_run(self, layer: Layer) -> bool:
        return layer in self.found and layer not in self._snapshots

    def can_step(self, lane: str) -> bool:
        queue = self.queues[lane]
        return bool(queue) and (queue[0][0] != "wait" or queue[0][1] <= self.computed)

    def step(self, lane: str) -> None:
        """The next operation of a lane."""
        what, *details = self.queues[lane].popleft()
        self.computed += lane == "compute"
        getattr(self, f"_do_{what}")(*details)
        self.check()

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
        assert point <= self.computed

    def _do_withdraw(self, key: Key) -> None:
        self.entries.pop(key, None)

    def _do_snapshot(self, layer: Layer, expected: Collection[Key]) -> None:
        places = self._snapshots[layer] = self._places(self.used[layer])
        self.found[layer] = frozenset(key for key, place in places if place != HOST)
        assert self.found[layer].issuperset(expected), "read in place though it was in a slot when the layer was enqueued"

    def _do_first(self, layer: Layer) -> None:
        self._read[layer] = self._snapshots[layer]
        self._check_places(self._read[layer])

    def _do_second(self, layer: Layer) -> None:
        places = self._seen_by_second(self._snapshots.pop(layer))
        self._check_places(places)
        assert places == self._read.pop(layer), "a layer's matmuls read an expert in different places"

    def _seen_by_second(self, snapshot: tuple[tuple[Key, int], ...]) -> tuple[tuple[Key, int], ...]:
        return snapshot

    def _places(self, keys: Sequence[Key]) -> tuple[tuple[Key, int], ...]:
        return tuple((key, self.entries.get(key, HOST)) for key in keys)

    def _check_places(self, places: Sequence[tuple[Key, int]]) -> None:
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
            point = self.point()
            self.changed.wait_for(lambda: self.computed >= point or self.broken)
            if self.broken:
                raise self.broken

    def let(self, *keys: Key) -> None:
        """No longer holds them back."""
        with self.changed:
            self.held.difference_update(keys)
            self.changed.notify_all()

    def fill(self, key: Key, slot: int) -> LiveMark:
        with self.changed:
            self.filling.append(key)
            number = super().fill(key, slot).number
            self.changed.notify_all()
        return LiveMark(self, number)

    def withdraw(self, key: Key) -> None:
        with self.changed:
            super().withdraw(key)
            self.changed.notify_all()

    def snapshot(self, layer: Layer, experts: Collection[int], expected: Collection[Key] = ()) -> None:
        with self.changed:
            super().snapshot(layer, experts, expected)
            self.changed.notify_all()

    def first(self, layer: Layer) -> None:
        with self.changed:
            super().first(layer)
            self.changed.notify_all()

    def second(self, layer: Layer) -> None:
        with self.changed:
            super().second(layer)
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
