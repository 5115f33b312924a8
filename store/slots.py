"""The device side of the store: equal slots under a byte budget, who is in them, and where each expert is to be read.

Bookkeeping with one allocation under it: no threads, no copies (copies.py has both), no choice of whom to evict (eviction.py).
A slot is empty, being filled, or ready; a slot that is not empty may be pinned by a forward that reads it.
"""

from __future__ import annotations

from collections import Counter

import torch

from store.arena import Arena
from store.errors import SpaceError
from store.layout import Key


def parse_budget(budget: str, expert_bytes: int, slot_bytes: int, free: int, key: str = "store.budget") -> int:
    """How many slots a budget such as "2GiB", "20%", "0" or "auto" buys, rounded down to whole slots; see `parse_bytes`.

    Raises:
        SpaceError: also for a number without a unit that is less than one slot: nobody means 5 bytes.
    """
    nbytes = parse_bytes(budget, expert_bytes, free, key)
    bare = _bare_number(budget)
    if 0 < bare < slot_bytes:
        share = f"{100 * bare if bare < 1 else bare:g}%"
        meant = f'"{share}" or "{bare:g}GB"' if bare <= 100 else 'a share such as "20%" or a size such as "2GiB"'
        raise SpaceError(f"{key}: {budget!r} is {bare:g} bytes, less than one expert's {slot_bytes}; write {meant}")
    return nbytes // slot_bytes


def _bare_number(budget: str) -> float:
    """What a budget without a unit says; 0: it has one."""
    try:
        return float(budget)
    except ValueError:
        return 0.0


def parse_bytes(budget: str, expert_bytes: int, free: int, key: str) -> int:
    """The bytes of a budget such as "2GiB", "20%", "0" or "auto".

    Args:
        expert_bytes: bytes of all experts: what a percentage is of, and the most that is ever taken.
        free: bytes free on the device for experts; `auto` takes nine tenths of them.
        key: of the config, for messages.

    Raises:
        SpaceError: not a budget, negative, over 100%, or more than is free.
    """
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    hint = 'write a size such as "2GiB", a share such as "20%", "0" or "auto"'
    text = budget.strip()
    try:
        if text == "auto":
            nbytes = free * 9 // 10
        elif text.endswith("%"):
            share = float(text[:-1])
            if not 0 <= share <= 100:
                raise SpaceError(f"{key}: {budget!r} is not between 0% and 100%")
            nbytes = round(expert_bytes * share / 100)
        else:
            unit = next((u for u in units if text.endswith(u)), "")
            nbytes = round(float(text.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError) as error:
        if isinstance(error, SpaceError):
            raise
        raise SpaceError(f"{key}: {budget!r} is not a budget; {hint}") from None
    if nbytes < 0:
        raise SpaceError(f"{key}: {budget!r} is negative; {hint}")
    if nbytes > free:
        raise SpaceError(f"{key}: {budget!r} is {nbytes} bytes, {free} are free on the device: {nbytes - free} bytes short")
    return min(nbytes, expert_bytes)


def pinned(nbytes: int) -> torch.Tensor:
    """Host memory that a GPU can read: uint8 (nbytes,).

    Raises:
        SpaceError: it cannot be had.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise SpaceError(f"CUDA cannot pin {nbytes} bytes of host memory: {str(error).splitlines()[0]}") from None


class Slots:
    """`count` slots of the arena's `slot_bytes`, allocated once: on the device, or in pinned host memory, which a GPU can read.

    Attributes:
        resident_bytes: block bytes of the experts in slots, those being filled included.
        resident_peak_bytes: the most that this ever was; never above the budget, often below it.
    """

    def __init__(self, arena: Arena, count: int, device: torch.device | None):
        """
        Args:
            device: None: the host, pinned.

        Raises:
            SpaceError: no pinned memory can be had.
        """
        self._arena = arena
        self._layers = arena.layout.layers
        slot_bytes = arena.layout.slot_bytes
        nbytes = count * slot_bytes
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device) if device is not None else pinned(nbytes)
        self._slots = [self.memory[i * slot_bytes : (i + 1) * slot_bytes] for i in range(count)]
        self._free = list(range(count - 1, -1, -1))
        self._slot_of: dict[Key, int] = {}
        self._ready: set[Key] = set()
        self._resident: Counter[int] = Counter()
        self._pins: Counter[Key] = Counter()
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # (slot or -1 - expert, layer) -> tensors
        self.resident_bytes = 0
        self.resident_peak_bytes = 0

    @property
    def count(self) -> int:
        return len(self._slots)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def __contains__(self, key: Key) -> bool:
        """Whether the expert has a slot, be it still being filled."""
        return key in self._slot_of

    def is_ready(self, key: Key) -> bool:
        return key in self._ready

    def is_evictable(self, key: Key) -> bool:
        return key in self._ready and not self._pins[key]

    @property
    def ready_count(self) -> int:
        return len(self._ready)

    def resident(self) -> Counter[int]:
        """Ready experts per MoE layer."""
        return self._resident.copy()

    def admit(self, key: Key) -> torch.Tensor:
        """Gives the expert a free slot; returns the bytes to fill, uint8 (block bytes,). `complete` must follow."""
        assert key not in self._slot_of and self._free
        self._slot_of[key] = self._free.pop()
        self.resident_bytes += self.block_bytes(key)
        self.resident_peak_bytes = max(self.resident_peak_bytes, self.resident_bytes)
        return self.room(key)

    def complete(self, key: Key) -> None:
        """The expert's copy has ended: it may be read from its slot."""
        assert key in self._slot_of and key not in self._ready
        self._ready.add(key)
        self._resident[key[0]] += 1

    def room(self, key: Key) -> torch.Tensor:
        """The bytes of the slot that the expert has, uint8 (block bytes,)."""
        memory, nbytes = self._slots[self._slot_of[key]], self.block_bytes(key)
        return memory if nbytes == self._arena.layout.slot_bytes else memory[:nbytes]  # a slice takes longer than all else here

    def evict(self, key: Key) -> None:
        """Frees the slot. Nothing is copied back: experts are read-only."""
        assert self.is_evictable(key)
        self._ready.remove(key)
        self._resident[key[0]] -= 1
        self._free.append(self._slot_of.pop(key))
        self.resident_bytes -= self.block_bytes(key)

    def pin(self, key: Key) -> None:
        """Keeps an expert in its slot until `unpin`; it may still be being filled."""
        assert key in self._slot_of
        self._pins[key] += 1

    def unpin(self, key: Key) -> None:
        self._pins[key] -= 1
        assert self._pins[key] >= 0

    def slot_of(self, key: Key) -> int:
        """The number of the slot that the expert has."""
        return self._slot_of[key]

    def address(self, slot: int) -> int:
        """Where a slot's memory begins."""
        return self._slots[slot].data_ptr()

    def block_bytes(self, key: Key) -> int:
        return self._layers[key[0]].block.nbytes

    def weights(self, key: Key, in_slot: bool) -> dict[str, torch.Tensor]:
        """The pointer table: the expert's tensors, in its slot or in the arena.

        The views are made once per place and kept: a forward asks for hundreds.

        Args:
            in_slot: read the slot; the caller has pinned it, and it is ready.
        """
        layer, expert = key
        assert not in_slot or (key in self._ready and self._pins[key])
        place = self._slot_of[key] if in_slot else -1 - expert
        views = self._views.get((place, layer))
        if views is None:
            block = self._slots[place] if in_slot else self._arena.block(layer, expert)
            views = self._views[place, layer] = self._layers[layer].block.views(block)
        return views
