"""What malloc does with memory that a batch has given back.

glibc returns it to the system: beyond 128 KiB at first, later beyond twice the largest block that the process has given back, up to
64 MiB. How often a batch then takes page faults to get the same memory again differs from process to process and from round to
round, whatever is computed: 0 to 2,000 per batch of 50 ms, at 2 us each.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 2**30
"""Of what is free, so much may stay with each thread's heaps."""
LARGEST_BYTES = 32 * 2**20
"""Larger blocks come from the system and go back to it, each for itself; glibc takes no higher limit."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """The next batch finds it where the last one left it. For all of the process; nothing happens where malloc is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
