"""The ExpertStore actor: keeps the arena of one model on one machine, for whoever on it executes.

No weight passes through it or through Ray's object store: it answers with the arena's path, and executors map the file.
A restarted ExpertStore finds the arena it had, finished or not, in its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from store.arena import Arena
from store.load import Placement, load
from store.weights import Source


@dataclass(frozen=True)
class ArenaInfo:
    """What the driver tells the executors and the user."""

    path: Path
    nbytes: int
    identity: str
    warm_start: bool
    seconds: float


class ExpertStore:
    """Run as a Ray actor; plain calls work too."""

    def __init__(self, path: Path, source: Source, placement: Placement):
        """Attaches the arena at `path` if it is there: a restarted actor needs no weights."""
        start = time.perf_counter()
        self._path, self._source, self._placement = path, source, placement
        self._arena = Arena.attach(path)
        self._warm_start = self._arena is not None
        self._seconds = time.perf_counter() - start
        self._placed_bytes = 0
        self._progress: Callable[[int], object] = lambda nbytes: None
        self._opening = threading.Lock()
        self._closing = False

    def open(self, progress: Callable[[int], object] = lambda nbytes: None) -> ArenaInfo:
        """Builds the arena from the model's weights unless it is there.

        Args:
            progress: called with the number of bytes just placed; another process asks `placed_bytes` instead.

        Raises:
            CheckpointError, SpaceError: see `load`.
        """
        with self._opening:
            if self._arena is None:
                start = time.perf_counter()
                self._progress = progress
                self._arena = load(self._path, self._source.open(), self._placement, self._count_placed)
                self._seconds = time.perf_counter() - start
        return ArenaInfo(self._path, self._arena.layout.nbytes, self._arena.identity, self._warm_start, self._seconds)

    def placed_bytes(self) -> int:
        """Bytes placed so far by a build under way, for a progress bar."""
        return self._placed_bytes

    def close(self, keep: bool, patience_s: float = 0.0) -> bool:
        """Gives the arena up and, unless `keep` or another process uses it, removes it; says whether it is gone.

        Args:
            patience_s: how long to wait for processes that use it but are about to end.
        """
        self._closing = True
        with self._opening:  # a build under way gives up at the next expert, and leaves nothing behind
            arena, self._arena = self._arena, None
            self._closing = False
        if arena is None:
            return False
        arena.close()
        if keep:
            return False
        deadline = time.monotonic() + patience_s
        while not (gone := arena.remove()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def _count_placed(self, nbytes: int) -> None:
        self._placed_bytes += nbytes
        self._progress(nbytes)
        if self._closing:
            raise InterruptedError("closed while the arena was being built")
