"""What a trace would move: the same schedule and the same policies as a run's, without a byte, a model or a thread.

Its input is a history: per batch and MoE layer the experts that were used, and what tables said of it beforehand. It knows no
tokens. Copies take no time and are made at plan time, as by a CopyEngine with `background=False`: the two agree on every hit and
move.

With tables (`simulate`), or without, where each layer's experts are copied when its router names them (`simulate_on_demand`), or as
in Towards MoE Deployment, where a layer's experts run one after the other and each may take the slot of one that has run
(`simulate_one_by_one`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from store.eviction import POLICIES, Policy
from store.just_in_time import JustInTime
from store.layout import ArenaLayout
from store.movement import Movement
from store.slots import Slots

Uses = Sequence[Sequence[Sequence[int]]]
"""Batch -> MoE layer -> experts that it uses, each once."""

Tables = Sequence[Sequence[Sequence[tuple[int, float]]]]
"""Batch -> MoE layer -> (expert, probability that it is needed), likeliest first: `HashTable.uses`."""


@dataclass(frozen=True)
class Moves:
    """What a history cost, in all.

    Attributes:
        hits: (batch, MoE layer, expert) uses whose expert was in a slot.
        misses: those read in place.
        copies: experts copied into slots.
        nbytes: of copies and reads in place.
    """

    hits: int
    misses: int
    copies: int
    nbytes: int

    @property
    def uses(self) -> int:
        return self.hits + self.misses

    @property
    def moves(self) -> int:
        """Experts that crossed the link."""
        return self.copies + self.misses

    @classmethod
    def of(cls, movements: Sequence[Movement]) -> Moves:
        return cls(
            sum(sum(m.hits) for m in movements),
            sum(sum(m.misses) for m in movements),
            sum(experts for m in movements for _, _, experts in m.copy_spans),
            sum(m.prefetch_bytes + m.demand_bytes + m.read_in_place_bytes for m in movements),
        )


def layout_of(experts: Sequence[int], block_bytes: int = 256) -> ArenaLayout:
    """MoE layers of so many equal experts: for histories whose model is not at hand."""
    return ArenaLayout.of([(count, {"block": ((block_bytes,), "uint8")}) for count in experts], {})


class Simulation(JustInTime):
    """A copy engine whose copies are done as soon as they are decided."""

    def __init__(self, layout: ArenaLayout, slots: int, policy: Policy):
        arena: Any = SimpleNamespace(layout=layout)  # of which a schedule wants nothing else
        super().__init__(arena, Slots(arena, slots, torch.device("meta")), policy)

    def read(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        """A MoE layer's forward."""
        readings = self._begin_reading(batch, layer, experts)
        pinned = {*readings.held, *readings.kept}
        for key in readings.kept:
            self.slots.complete(key)
        for heir, holder in readings.heirs.items():
            if self._inherits(heir, holder):
                self.slots.complete(heir)
                pinned ^= {heir, holder}
        for key in pinned:
            self.slots.unpin(key)
        self._proceed()

    def demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        """Wants a layer's experts now, as its router names them."""
        self._planned.add(batch)
        self._want(batch * self._layers + layer, [(layer, expert) for expert in experts])
        self._proceed()

    def _proceed(self) -> None:
        while (copy := self._next_copy()) is not None:
            key, _ = copy
            self.slots.complete(key)
            self._movement.copied(0, 0, self.slots.block_bytes(key))


def simulate(layout: ArenaLayout, slots: int, policy: str, uses: Uses, tables: Tables, lookahead: int) -> list[Movement]:
    """Per batch what moved since the one before.

    Args:
        policy: a name in POLICIES.
        tables: as many as batches in `uses`.
        lookahead: a batch runs when the tables of so many behind it are queued.
    """
    simulation = Simulation(layout, slots, POLICIES[policy]())
    moved = []
    for planned in range(len(uses) + lookahead):
        if planned < len(uses):
            simulation.plan(planned, tables[planned])
        if (batch := planned - lookahead) >= 0:
            for layer, experts in enumerate(uses[batch]):
                simulation.read(batch, layer, experts)
            simulation.finish(batch)
            moved.append(simulation.take())
    return moved


def simulate_on_demand(layout: ArenaLayout, slots: int, policy: str, uses: Uses) -> list[Movement]:
    """Per batch what moved. No tables: a layer's missing experts are copied before they run, those for which there is room."""
    simulation = Simulation(layout, slots, POLICIES[policy]())
    moved = []
    for batch, layers in enumerate(uses):
        for layer, experts in enumerate(layers):
            simulation.demand(batch, layer, experts)
            simulation.read(batch, layer, experts)
        simulation.finish(batch)
        moved.append(simulation.take())
    return moved


def simulate_one_by_one(layout: ArenaLayout, slots: int, policy: str, runs: Sequence[Sequence[int]]) -> list[Movement]:
    """Per run what moved, of one MoE layer with slots of its own.

    Args:
        layout: has one layer.
        runs: per batch the experts that the layer uses, in the order in which they run.
    """
    chosen = POLICIES[policy]()
    simulation = Simulation(layout, slots, chosen)
    moved, first = [], 0
    for experts in runs:
        for at, expert in enumerate(experts):  # the router has spoken: the policy knows whom the batch uses
            chosen.wanted((0, expert), first + at)
        for at, expert in enumerate(experts):
            simulation.demand(first + at, 0, [expert])
            simulation.read(first + at, 0, [expert])
        first += len(experts)
        simulation.finish(first - 1)
        moved.append(simulation.take())
    return moved
