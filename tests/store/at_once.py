"""The copy engine of a GPU whose copies end as soon as they are decided, and forwards over it: for counting what moves."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from store.device_copies import DeviceCopyEngine
from store.eviction import POLICIES
from store.lanes import Mark
from store.layout import Key
from store.simulator import Moves, Tables, Uses, layout_of
from store.slots import Slots


class Reached:
    """A mark (store.lanes.Mark)."""

    def wait(self) -> None:
        pass

    def is_reached(self) -> bool:
        return True

    def span(self) -> tuple[int, int]:
        return 0, 0


class LanesAtOnce:
    """See store.lanes.Lanes."""

    def fill(self, key: Key, slot: int) -> Reached:
        return Reached()

    def withdraw(self, key: Key) -> None:
        pass

    def follow(self, fills: Sequence[Mark]) -> Reached:
        return Reached()


class AtOnce(DeviceCopyEngine):
    """Without a thread."""

    def __init__(self, experts: Sequence[int], slots: int, policy: str, may_doubt: bool):
        arena: Any = SimpleNamespace(layout=layout_of(experts))
        super().__init__(arena, Slots(arena, slots, torch.device("meta")), POLICIES[policy](), LanesAtOnce(), may_doubt)
        self._sizes = experts

    def _proceed(self) -> None:
        with self._changed:
            while self._begin() or self._under_way:
                self._land()
            self._at_rest = True

    def run(self, batch: int, layers: Sequence[Sequence[int]], asks: bool) -> None:
        """A forward that uses these experts, and what its kernels have counted."""
        found = []
        for layer, experts in enumerate(layers):
            if asks:
                self.demand(batch, layer, experts)
            there: set[int] = set()
            in_parts = True
            while in_parts:
                in_parts = self.stage(batch, layer)
                there.update(expert for expert in experts if self.slots.is_ready((layer, expert)))
                (self.read if in_parts else self.passed)(batch, layer)
            found.append(there)
        self.finish(batch)
        for layer, (experts, there) in enumerate(zip(layers, found, strict=True)):
            routed, hits = np.zeros((2, self._sizes[layer]), dtype=np.int32)
            routed[list(experts)], hits[list(there)] = 1, 1
            self.counted(layer, routed, hits, routed, batch)


def play(
    experts: Sequence[int], slots: int, policy: str, uses: Uses, tables: Tables | None, lookahead: int = 4, may_doubt: bool = True
) -> tuple[list[int], list[bool]]:
    """
    Args:
        tables: None: routers are always asked.

    Returns: of each batch how many experts crossed the link since the one before, and whether its routers were asked.
    """
    engine, moved, asked = AtOnce(experts, slots, policy, may_doubt), [], []
    ahead = lookahead if tables is not None else 0
    for planned in range(len(uses) + ahead):
        if tables is not None and planned < len(uses):
            engine.plan(planned, tables[planned])
        if (batch := planned - ahead) >= 0:
            asked.append(tables is None or engine.is_doubted(batch))
            engine.run(batch, uses[batch], asked[-1])
            moved.append(Moves.of([engine.take()]).moves)
    return moved, asked
