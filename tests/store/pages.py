"""Which pages of an arena's file are in RAM, asked of the kernel (mincore), and how to lose them."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

from store.arena import Arena

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
DONTNEED = 4
TRIES = 100


def cached_pages(arena: Arena, layer: int = 0, expert: int = 0, whole: bool = False) -> list[bool]:
    """Of one block, or of the whole arena, which pages are in RAM."""
    view = arena.memory if whole else arena.block(layer, expert)
    pages = -(-view.numel() // PAGE)
    found = (ctypes.c_ubyte * pages)()
    assert LIBC.mincore(ctypes.c_void_p(view.data_ptr()), ctypes.c_size_t(view.numel()), found) == 0, os.strerror(
        ctypes.get_errno()
    )
    return [bool(page & 1) for page in found]


def cached(arena: Arena) -> float:
    """The share of the arena that is in RAM."""
    pages = cached_pages(arena, whole=True)
    return sum(pages) / len(pages)


def evict(arena: Arena) -> None:
    """Takes every page of the file from this process and then from the page cache: what the kernel does for want of RAM.

    Again while some are there: the kernel keeps a page that it is just reading or writing. A filesystem in RAM keeps all.
    """
    fd = os.open(arena.path, os.O_RDONLY)
    try:
        for _ in range(TRIES):
            os.fsync(fd)
            assert LIBC.madvise(ctypes.c_void_p(arena.memory.data_ptr()), ctypes.c_size_t(arena.memory.numel()), DONTNEED) == 0
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached(arena):
                return
            time.sleep(0.01)
    finally:
        os.close(fd)
