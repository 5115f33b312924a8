"""What no system with this link and these kernels can beat: the fewest expert moves that a budget allows, and the time they take.

A cache with perfect foresight (Belady's MIN, with the choice not to keep an expert at all) still moves what does not fit; the
link moves it no faster than it moves anything; and a model whose experts are all on the device has its own time. The larger of
the two is the limit. A layer's experts may run in any order, so those that are there run first: whoever comes may have the slot of
any of them, and a layer moves what is not there when it begins.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import torch

from store import cuda
from store.layout import Key

NEVER = 2**62


def fewest_moves(uses: Sequence[Sequence[Key]], slots: int, rounds: int = 2) -> int:
    """Moves that a cache of `slots` experts needs for a sequence of MoE layers that comes again and again, per time that it comes.

    Args:
        uses: the experts that each layer of each batch reads, each once, in the order of execution.
        rounds: the sequence is repeated so often, and the moves of the last time are counted, in a cache that is warm.
    """
    if slots == 0:
        return sum(map(len, uses))
    return sum(fewest_moves_each(list(uses) * rounds, slots)[-len(uses) :]) if uses else 0


def fewest_moves_each(uses: Sequence[Sequence[Key]], slots: int) -> list[int]:
    """The same, of each layer of a sequence that comes once, in a cache that is empty before.

    Args:
        slots: at least 1.
    """
    sequence = [key for layer in uses for key in layer]
    later: dict[Key, int] = defaultdict(lambda: NEVER)
    next_use = [0] * len(sequence)
    for at in range(len(sequence) - 1, -1, -1):
        next_use[at] = later[sequence[at]]
        later[sequence[at]] = at
    farthest: list[tuple[int, Key]] = []  # a heap of (minus the next use, expert); stale where `resident` says otherwise
    resident: dict[Key, int] = {}
    each, at = [], 0
    for layer in uses:
        moves = 0
        for key in layer:
            moves += key not in resident
            resident[key] = next_use[at]
            heapq.heappush(farthest, (-next_use[at], key))
            at += 1
        while len(resident) > slots:
            use, victim = heapq.heappop(farthest)
            if resident.get(victim) == -use:
                del resident[victim]
        each.append(moves)
    return each


def link_bytes_per_second(memory: torch.Tensor, nbytes: int, device: torch.device, seconds: float = 0.5) -> float:
    """The speed of the link, measured: copies of `nbytes`, one behind the other; the best of several goes.

    Args:
        memory: uint8 (bytes,), on the host, not registered.
    """
    torch.cuda.init()
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    cuda.register(memory.data_ptr(), memory.numel(), device.index or 0)
    try:
        stream, count = torch.cuda.Stream(device), max(1, min(64, memory.numel() // nbytes))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        best = spent = 0.0
        while spent < seconds:
            begin.record(stream)
            for i in range(count):
                cuda.copy_to_device(target.data_ptr(), memory.data_ptr() + i * nbytes, nbytes, stream.cuda_stream)
            end.record(stream)
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
            spent += took
            best = max(best, count * nbytes / took)
    finally:
        cuda.unregister(memory.data_ptr())
    return best
