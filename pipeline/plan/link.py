"""How fast an expert comes from where the arena lies to where slots are, measured on scratch memory of the same kind."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

import torch

from pipeline.bench.limit import link_bytes_per_second
from store.room import free_bytes

SCRATCH_BYTES = 2**27
"""More than a processor's cache holds."""


def measure(directory: Path, block_bytes: int, device: str, seconds: float = 0.3) -> float | None:
    """Bytes per second, of copies of one block after the other; None: there is no room for a few blocks.

    Args:
        directory: `store.directory`: the scratch file is made there, without a name, and gone afterwards.
        device: on a GPU the file is registered first, as an arena is.
    """
    count = min(max(4, SCRATCH_BYTES // block_bytes), free_bytes(directory) // 2 // block_bytes)
    if count < 4:
        return None
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, count * block_bytes)
        mapped = mmap.mmap(file.fileno(), count * block_bytes)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        memory.fill_(1)
        if device != "cpu":
            return link_bytes_per_second(memory, block_bytes, torch.device(device), seconds)
        return _copies(memory.view(count, block_bytes), seconds)


def _copies(blocks: torch.Tensor, seconds: float) -> float:
    """The best of several goes over all blocks, uint8 (blocks, block bytes), in one thread as the copy engine has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        slot = torch.empty_like(blocks[0])
        best = spent = 0.0
        while spent < seconds:
            start = time.perf_counter()
            for block in blocks:
                slot.copy_(block)
            took = time.perf_counter() - start
            spent += took
            best = max(best, blocks.numel() / took)
        return best
    finally:
        torch.set_num_threads(threads)
