"""The copy engine of a GPU that cannot read the arena: every expert that a layer uses has to pass through a slot.

Where registration cannot be had, an expert that is in no slot is nowhere (ring.py). So each layer's router is asked which experts
it has named (`demand`), and the layer is computed in parts until every one of them has been in a slot. Experts that tables name
come ahead of that, as on any GPU. Same answers, slower.

Whoever is named comes: before all that is planned, whatever its slot costs, and whoever has to go for it. So nothing may be
wanted sooner than the layer under way: what was planned for a position before it, and has not run by now, is forgotten. Of
a layer's experts only those go that a part has read. Then there is always somebody to come, or somebody to read, and
nobody waits for ever, be it with one slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from store.arena import Arena
from store.device_copies import DeviceCopyEngine
from store.eviction import Policy
from store.lanes import Lanes
from store.layout import Key
from store.movement import Movement
from store.slots import Slots


class StagedCopyEngine(DeviceCopyEngine):
    """Moves experts into slots ahead of the forwards that read them, and the others before they do. `demand`, then `stage`."""

    worth_an_eviction = 0.0  # nothing can be read in place
    _words_suffice = False  # here the host copies, too

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, lanes: Lanes, on_device: bool = True, may_doubt: bool = False):
        """
        Args:
            on_device: slots are; otherwise they lie in the host's memory, and what is read from them is read over the link.
        """
        self._layer_at = 0  # the position under way
        super().__init__(arena, slots, policy, lanes, may_doubt)
        self._on_device = on_device

    def is_ready(self, batch: int) -> bool:
        """Whether nothing can be missing: the tables may be wrong."""
        return self.is_complete

    def demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        with self._changed:
            self._catch_up()
            self._layer_at = batch * self._layers + layer
            while self._wanted and 0 <= self._now < self._layer_at:
                self._pass(self._now)
            super().demand(batch, layer, experts)

    def stage(self, batch: int, layer: int) -> bool:
        """
        Raises:
            RuntimeError: the copy thread broke, or has been closed, and the layer cannot be computed.
        """
        in_parts = super().stage(batch, layer)
        with self._changed:
            if not in_parts and not all(map(self.slots.is_ready, self._wanted.get(batch * self._layers + layer, ()))):
                raise RuntimeError("an expert that a router named has not come, and cannot be read elsewhere")
        return in_parts

    def counted(self, layer: int, routed: np.ndarray, hits: np.ndarray, reads: np.ndarray, batch: int | None = None) -> None:
        """
        Raises:
            RuntimeError: an expert was in no slot when its turn came, so that the answers are wrong.
        """
        missed = np.flatnonzero((routed > 0) & (hits == 0))
        if len(missed):
            raise RuntimeError(f"MoE layer {layer}: experts {missed.tolist()} were in no slot when they were computed")
        super().counted(layer, routed, hits if self._on_device else np.zeros_like(hits), reads, batch)

    def take(self) -> Movement:
        """Of slots in the host's memory none is resident, and what comes into them has not crossed the link: it is read there."""
        movement = super().take()
        if not self._on_device:
            movement.prefetch_bytes = movement.demand_bytes = movement.resident_peak_bytes = 0
            movement.copy_spans, movement.resident = [], [0] * self._layers
        return movement

    def _want(self, position: int, keys: list[Key]) -> None:
        if not 0 <= position < self._layer_at:
            super()._want(position, keys)

    def _comes(self, key: Key, position: int, victim: Key) -> bool | None:
        return True if position == self._layer_at else super()._comes(key, position, victim)

    def _is_coming(self) -> bool:
        may_come = not self._at_rest and not self._closed
        return bool(self._awaited) and (may_come or any(key in self.slots for key in self._awaited))
