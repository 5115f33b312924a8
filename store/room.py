"""How much room there is for an arena: on a filesystem, and in RAM."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes(directory: Path) -> int:
    """Bytes that an arena in `directory` may take: free there and, as /dev/shm is RAM, available in memory."""
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    if os.path.realpath(directory).startswith("/dev/shm"):
        free = min(free, available_memory())
    return free


def available_memory() -> int:
    """Bytes of RAM that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
