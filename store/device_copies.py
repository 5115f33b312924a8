"""The copy engine of a GPU: what forwards want of its copy thread (copy_thread.py), with the compute lane free of questions.

A forward does not ask for experts: its kernels follow the pointer table, into a slot or to the host, and count what they found
(`counted`). What it does ask, before a MoE layer, is to be held until the experts that the tables promised are there (`stage`):
the same bytes must not cross the link twice.

A layer may want more experts than the slots can take at once. Then it is computed in parts: as soon as some are there, the tokens
of those are computed (`read`), which makes room for the next, while the link goes on. Reading in place, at nine tenths of the
link's speed and with the copy lane waiting, is left for what no table named.

From `stage` to `read` or `passed` nobody is evicted: the layer's kernels are on their way into the compute lane, and a withdrawal
between the one that reads the entries and the last that reads the slots would come too early for those behind it. (Experts of other
layers could go. But those that the layer has read are the better ones, as a rule, and a moment later they can, too.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from store.arena import Arena
from store.copy_thread import CopyThread
from store.eviction import Policy
from store.lanes import Lanes, Mark
from store.layout import Key
from store.movement import Movement
from store.slots import Slots

IN_PLACE = 0.94
"""The link's rate when kernels read experts where they lie, over that of copies (docs/results.md, the probe): a use that is less
likely costs less if it is read in place, should it come, than a copy for it alone does for certain."""
PART = 8
"""Experts that are worth a part of a layer: its kernels take less time than their copies, and the link has others to bring."""


class DeviceCopyEngine(CopyThread):
    """Moves experts from the registered arena into slots, ahead of the forwards that read them."""

    worth_an_eviction = IN_PLACE
    _words_suffice = True
    """A copy is but a word to the device: any thread may begin one, and the compute lane waits for it without the host."""

    def __init__(self, arena: Arena, slots: Slots, policy: Policy, lanes: Lanes, may_doubt: bool = False):
        """
        Args:
            may_doubt: whoever runs forwards heeds `is_doubted`.
        """
        super().__init__(arena, slots, policy, lanes, may_doubt)
        self._part = max(1, min(PART, slots.count // 8))
        self._staged = -1  # the position that the executor waits for
        self._awaited: set[Key] = set()  # its experts that are not in slots yet
        self._unread: list[Key] = []  # its experts that are, and that no part of it has read
        self._enqueuing = False  # whoever was let go by `stage` puts the layer's kernels into the compute lane
        self._behind: list[tuple[int, list[Key]]] = []  # positions, and experts that they no longer want: see `_catch_up`
        self._spoken: dict[int, int] = {}  # position -> experts that its router has named, until the policy has been told
        self._asked = -1  # the position whose router has spoken last
        self._followed: deque[Mark] = deque()  # where the compute lane waits by itself, as far as not reckoned yet

    def is_ready(self, batch: int) -> bool:
        """Whether all that the tables want for the batch is in slots: its forward need not be held anywhere."""
        if self.is_complete:
            return True
        with self._changed:
            return all(
                self.slots.is_ready(key)
                for layer in range(self._layers)
                for key in self._wanted.get(batch * self._layers + layer, ())
            )

    def stage(self, batch: int, layer: int) -> bool:
        """Waits until the experts that are wanted for a layer are in slots, or cannot come before others have been read.

        Behind `demand` it is enough that all are on their way, and nobody else waits for a copy who may come now, or for room in
        the lane. Then the compute lane waits: when the last has come, the layer begins without a word from the host, which has but
        the next router to wait for. (The withdrawal for a copy that began later would stand behind the layer's kernels, and the
        link would lie idle while they run.)
        A layer that tables held is not left to the compute lane: it would count as read from then on, and its experts would be the
        first to go, with the link waiting for them.

        Returns: whether those that are there should be read first, for others to come in their place. Then `read` must follow, and
            `stage` once more; else `passed`. `finish`, where the forward fails.

        Raises:
            RuntimeError: the copy thread broke.
        """
        position = batch * self._layers + layer
        start = time.perf_counter_ns()
        with self._changed:
            if self._enqueuing:  # a layer that was not enqueued after all
                self._enqueuing = False
                self._proceed()
            self._staged = position
            wanted = [key for key in self._wanted.get(position, ()) if (position, key) not in self._left]
            self._awaited = {key for key in wanted if not self.slots.is_ready(key)}
            self._unread = [key for key in wanted if key not in self._awaited]
            self._changed.wait_for(lambda: self._failure or not self._is_held())
            self._movement.stall_ns += time.perf_counter_ns() - start
            if self._failure:
                raise RuntimeError("copying experts failed") from self._failure
            if self._may_follow():
                self._followed.append(self._lanes.follow([mark for key, mark in self._under_way if key in self._awaited]))
                self._awaited.clear()
            in_parts = bool(self._awaited and self._unread)
            self._awaited.clear()
            self._enqueuing = True
            return in_parts

    def read(self, batch: int, layer: int) -> None:
        """The kernels that read what `stage` has found in slots are in the compute lane: the layer no longer wants those."""
        position = batch * self._layers + layer
        with self._changed:
            self._enqueuing = False
            gone = {*self._unread}
            self._wanted[position] = [key for key in self._wanted[position] if key not in gone]
            self._behind.append((position, self._unread))
            self._unread = []
            self._reconsider(position)  # there will be room for those that were not worth an eviction
        self._proceed()

    def passed(self, batch: int, *layers: int) -> None:
        """The layers' kernels are in the compute lane: whatever is withdrawn from now on, they are not harmed."""
        if self.is_complete:
            return
        with self._changed:
            self._enqueuing = False
            for layer in layers:
                position = batch * self._layers + layer
                self._behind.append((position, self._wanted.pop(position, [])))
        self._proceed()

    def finish(self, batch: int) -> None:
        with self._changed:
            self._enqueuing = False
            self._awaited.clear()
            self._reckon()
            self._catch_up()
            self._spoken = {later: experts for later, experts in self._spoken.items() if later >= (batch + 1) * self._layers}
            super().finish(batch)

    def demand(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        """Wants experts for a layer that is about to run, before all else: its router has named them. `stage` must follow."""
        position = batch * self._layers + layer
        with self._changed:
            self._asked = position
            self._planned.add(batch)  # a plan would come too late; and `finish` takes back what a forward that fails leaves
            keys = [(layer, expert) for expert in experts]
            self._spoken[position] = len(keys)
            self._want_instead(position, keys)
            self._demanded.update((key, position) for key in keys if key not in self.slots)
            self._proceed()
            self._begin_now()

    def expect(self, batch: int, layer: int, experts: Sequence[int]) -> None:
        with self._changed:
            super().expect(batch, layer, experts)
            self._begin_now()

    def counted(self, layer: int, routed: np.ndarray, hits: np.ndarray, reads: np.ndarray, batch: int | None = None) -> None:
        """What a layer's kernels found, told after the batch.

        Args:
            batch: whose table is judged by it; None: it is no more than a part of what the table was about.
            routed: int (experts,): tokens of each expert.
            hits: int (experts,): 1 if it was read from a slot.
            reads: int (experts,): how often its block was read.
        """
        with self._changed:
            used = np.flatnonzero(routed)
            missed = used[hits[used] == 0]
            if not self.is_complete:  # else nobody has to go, ever
                for expert in used.tolist():
                    self._policy.used((layer, expert))
                if batch is not None:
                    self._judge(batch * self._layers + layer, used.tolist(), len(missed))
            self._movement.hits[layer] += len(used) - len(missed)
            self._movement.misses[layer] += len(missed)
            if len(missed):
                self._movement.read_in_place_bytes += int(reads[missed].sum()) * self.slots.block_bytes((layer, 0))

    def take(self) -> Movement:
        with self._changed:
            self._reckon()
            return super().take()

    def _begin_now(self) -> None:
        """Begins what the lane has room for: the copy thread would come late, when the link is idle or the layer enqueued."""
        try:
            while self._words_suffice and self._begin():
                pass
        except BaseException as error:
            self._fail(error)
            raise

    def _is_held(self) -> bool:
        """Whether the layer that is staged has to wait."""
        if self._may_follow():
            return False
        if len(self._unread) >= self._part and not all(key in self.slots for key in self._awaited):
            return False
        return self._is_coming()

    def _reckon(self) -> None:
        """Adds up what the compute lane has waited for copies, as far as it has come."""
        while self._followed and self._followed[0].is_reached():
            begin, end = self._followed.popleft().span()
            self._movement.stall_ns += end - begin

    def _may_follow(self) -> bool:
        """Whether those awaited may be left to the compute lane: all of them are on their way, and nobody else may come now."""
        named = self._words_suffice and self._settled and self._staged == self._asked
        return named and bool(self._awaited) and all(key in self.slots for key in self._awaited)

    def _is_coming(self) -> bool:
        """Whether to wait for those awaited: some are under way, or may still be."""
        if not self._awaited:
            return False
        if any(key in self.slots for key in self._awaited):
            return True
        may_come = not self._at_rest and not self._closed
        return may_come and any((self._staged, key) not in self._set_aside for key in self._awaited)

    def _catch_up(self) -> None:
        """Takes out of the future what has passed. Left to the copy thread, as far as it comes to it: the next layer is waiting."""
        for position, keys in self._behind:
            self._want_no_more(position, keys)
            if position in self._spoken:
                self._policy.reads(position % self._layers, self._spoken.pop(position))
        self._behind.clear()

    def _want_no_more(self, position: int, keys: Collection[Key]) -> None:
        super()._want_no_more(position, keys)
        if self._demanded:
            for key in keys:
                if self._demanded.get(key) == position and key not in self.slots:  # there was no room
                    del self._demanded[key]

    def _leave(self, position: int, key: Key) -> None:
        super()._leave(position, key)
        if position == self._staged and key in self._awaited:
            self._awaited.remove(key)
            if not self._is_held():
                self._changed.notify_all()

    def _victim(self, position: int) -> Key | None:
        return None if self._enqueuing else super()._victim(position)

    def _has_settled(self) -> None:
        if self._may_follow():
            self._changed.notify_all()

    def _came(self, key: Key) -> None:
        if key in self._awaited:
            self._awaited.remove(key)
            self._unread.append(key)
