"""The schedule of a device whose routers can be asked: tables are heeded, or, while they do worse than none would, only judged.

doubt.py knows when; here is what it means. A batch that is planned in doubt wants nobody ahead, and its routers are to be asked
(`is_doubted`, of whoever runs it). So are those of a batch that runs in doubt, planned when it may have been.
"""

from __future__ import annotations

from collections.abc import Sequence

from store.arena import Arena
from store.doubt import Doubt
from store.eviction import Policy
from store.schedule import Schedule
from store.slots import Slots


class JudgedSchedule(Schedule):
    """A Schedule that may doubt. Whoever builds on it says what moves: `_has_come`, `_judge`."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, may_doubt: bool):
        super().__init__(arena, slots, policy)
        self._doubt = Doubt(slots.count, type(policy)) if may_doubt else None
        self._unheeded: set[int] = set()  # batches whose tables are only judged

    @property
    def _heeds(self) -> bool:
        return self._doubt is None or not self._doubt.asks

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        if self._heeds:
            super().plan(batch, uses)
            return
        with self._changed:
            if batch not in self._planned and batch > self._last_finished:
                self._planned.add(batch)
                self._unheeded.add(batch)
                self._said.update((batch * self._layers + layer, experts) for layer, experts in enumerate(uses))

    def is_doubted(self, batch: int) -> bool:
        """Whether what a batch's routers name should be wanted (`demand`), layer by layer."""
        return self._doubt is not None and (self._doubt.asks or batch in self._unheeded)

    def finish(self, batch: int) -> None:
        with self._changed:
            super().finish(batch)
            if self._doubt is not None:
                self._doubt.finished()
            self._unheeded = {later for later in self._unheeded if later > batch}

    def _has_come(self) -> None:
        """A copy has ended."""
        if self._doubt is not None:
            self._doubt.copied()

    def _judge(self, position: int, used: list[int], missed: int) -> None:
        """A layer's routers have spoken: it has read these experts, so many of them in place."""
        layer, said = position % self._layers, self._said.get(position)
        if said is not None and self._doubt is not None:
            self._doubt.heard(layer, used, {expert for expert, _ in self._trust.worth(layer, said)}, missed)
        self._learn(position, used)
