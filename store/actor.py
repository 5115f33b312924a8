"""The ExpertStore actor: keeps the arena of one model on one machine, for whoever on it executes.

It answers with the arena's path, and executors map the file. Weights pass through Ray's object store in one case: a machine that
cannot see the checkpoint has the arena sent by another's ExpertStore, once. A restarted ExpertStore finds the arena it had,
finished or not, in its place.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from store.arena import Arena
from store.errors import CheckpointError
from store.load import Placement, load
from store.transfer import Chunk, Contents, contents, cut, receive
from store.weights import Source, Weights

LOG = logging.getLogger(__name__)
DIRECTORY = "SIDA_STORE_DIRECTORY"
"""In the environment of a machine's `ray start`: where its arena lies, instead of where the driver's does."""


@dataclass(frozen=True)
class ArenaInfo:
    """What the driver tells the executors and the user."""

    path: Path
    nbytes: int
    identity: str
    warm_start: bool
    seconds: float
    came_by: str = "checkpoint"
    """"checkpoint": from the model's weights, now or by an earlier run; "transfer": from another machine."""
    pid: int = field(default_factory=os.getpid)
    """Of the store's process."""


class ExpertStore:
    """Run as a Ray actor; plain calls work too."""

    def __init__(self, path: Path, source: Source, placement: Placement, elsewhere: bool = False):
        """Attaches the arena at `path` if it is there: a restarted actor needs no weights.

        Args:
            elsewhere: on another machine than the driver's, which may have its own directory for arenas (`DIRECTORY`).
        """
        start = time.perf_counter()
        if elsewhere and os.environ.get(DIRECTORY):
            path = Path(os.environ[DIRECTORY]) / path.name
        self._path, self._source, self._placement = path, source, placement
        self._arena = Arena.attach(path)
        self._warm_start = self._arena is not None
        self._seconds = time.perf_counter() - start
        self._placed_bytes = 0
        self._came_by = "checkpoint"
        self._progress: Callable[[int], object] = lambda nbytes: None
        self._opening = threading.Lock()
        self._closing = False

    def open(self, progress: Callable[[int], object] = lambda nbytes: None, sender: Any = None) -> ArenaInfo:
        """Builds the arena from the model's weights unless it is there.

        Args:
            progress: called with the number of bytes just placed; another process asks `placed_bytes` instead.
            sender: the ExpertStore actor of another machine, which has the arena: asked for it if the weights cannot be seen here.

        Raises:
            CheckpointError, SpaceError: see `load`.
            TransferError: see `receive`.
        """
        with self._opening:
            if self._arena is None:
                start = time.perf_counter()
                self._progress = progress
                weights = self._source.open() if sender is None else self._visible()
                if weights is not None:
                    self._arena = load(self._path, weights, self._placement, self._count_placed)
                else:
                    self._arena = self._received(sender)
                    self._came_by = "transfer"
                self._seconds = time.perf_counter() - start
                LOG.info("ExpertStore: %s by %s in %.1f s", self._path, self._came_by, self._seconds)
        return ArenaInfo(
            self._path, self._arena.layout.nbytes, self._arena.identity, self._warm_start, self._seconds, self._came_by
        )

    def contents(self) -> Contents:
        """For another machine's ExpertStore; so is `chunk`. After `open`."""
        assert self._arena is not None
        return contents(self._arena)

    def chunk(self, index: int) -> Chunk:
        assert self._arena is not None
        return cut(self._arena, index)

    def pid(self) -> int:
        """The process id: another one says that this actor has been restarted."""
        return os.getpid()

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

    def _visible(self) -> Weights | None:
        """The weights, if this machine sees the same files: a copy with other times may be another model's."""
        try:
            weights = self._source.open()
        except (CheckpointError, OSError):
            return None
        return weights if self._placement.arena_path(weights, self._path.parent) == self._path else None

    def _received(self, sender: Any) -> Arena:
        import ray  # only an actor has somebody to ask

        def ask(index: int) -> Callable[[], Chunk]:
            chunk = sender.chunk.remote(index)
            return lambda: ray.get(chunk)

        return receive(self._path, ray.get(sender.contents.remote()), ask, self._count_placed)

    def _count_placed(self, nbytes: int) -> None:
        self._placed_bytes += nbytes
        self._progress(nbytes)
        if self._closing:
            raise InterruptedError("closed while the arena was being built")
