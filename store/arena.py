"""The arena: one named file of shared memory per model and machine, which outlives whoever dies.

On a disk (`store.backing: file`) it is the same file: mapped, so that the kernel keeps of it what fits the RAM, and reads the rest.

A plain file `sida-UID-FINGERPRINT` in the store's directory (/dev/shm unless configured), mapped read-only by everybody but
its builder. Not multiprocessing.shared_memory: its resource tracker unlinks a segment when an attached process is killed.

Life of the file:
  built    under a temporary name (`.building`), its space reserved with posix_fallocate (an error, not SIGBUS, when full),
           published by rename: a file under the final name is whole.
  used     under flock(LOCK_SH), held by everyone who maps it; the kernel drops the lock of a killed process.
  removed  by whoever gets LOCK_EX | LOCK_NB, that is, when nobody uses it. After locking, inode and path are compared, since
           the file may have been unlinked or renamed between open and flock. No counts of pids.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from store.errors import SpaceError
from store.layout import ArenaLayout, align
from store.room import free_bytes

MAGIC = b"SIDA-MOE"
LAYOUT_VERSION = 2
BUILDING = ".building"
PAGE_BYTES = 4096


def arena_path(directory: Path, fingerprint: str) -> Path:
    return directory / f"sida-{os.getuid()}-{fingerprint}"


class Arena:
    """A mapped arena. Views of its memory stay valid after `close`; what close gives up is the lock."""

    def __init__(self, path: Path, fd: int):
        """Maps an open and locked arena file; use `attach`."""
        self.path = path
        self._fd: int | None = fd
        header = _read_header(fd)
        self.layout = ArenaLayout.from_json(header["layout"])
        self.identity: str = header["identity"]
        """Hash of the router weights: tells which predictors belong to this model."""
        mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch cannot mark a tensor read-only; ours never are written
            everything = torch.frombuffer(mapped, dtype=torch.uint8)
        self._data_offset: int = header["data_offset"]
        self.memory = everything[self._data_offset :]
        """All data as uint8, (layout.nbytes,), read-only: a write would end the process."""

    @classmethod
    def attach(cls, path: Path) -> Arena | None:
        """Maps a finished arena and holds its lock; None when there is none."""
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(fd, fcntl.LOCK_SH)  # only somebody about to unlink it holds it exclusively, and not for long
            if _is_still(fd, path):
                return cls(path, fd)
            os.close(fd)

    def block(self, layer: int, expert: int) -> torch.Tensor:
        """The bytes of one expert, uint8 (block bytes,), a read-only view."""
        layout = self.layout.layers[layer]
        offset = layout.expert_offset(expert)
        return self.memory[offset : offset + layout.block.nbytes]

    def read_ahead(self, layer: int, expert: int) -> None:
        """Asks the kernel to bring an expert's pages from the disk; returns before they are there. Nothing to do in /dev/shm."""
        layout = self.layout.layers[layer]
        if self._fd is not None:
            start = self._data_offset + layout.expert_offset(expert)
            os.posix_fadvise(self._fd, start, layout.block.nbytes, os.POSIX_FADV_WILLNEED)

    def backbone(self) -> dict[str, torch.Tensor]:
        """All that is not an expert, by the model's own names, as read-only views."""
        return {part.name: part.view(self.memory) for part in self.layout.backbone}

    def close(self) -> None:
        """Gives up the lock; the memory goes when the last view of it does."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # not left to os.close: the mapping has a duplicate of the descriptor
            os.close(self._fd)
            self._fd = None

    def remove(self) -> bool:
        """Closes, and unlinks the file unless somebody else still uses it; says whether it is gone."""
        self.close()
        return _unlink_if_unused(self.path) is not None


def build(path: Path, layout: ArenaLayout, identity: str, fill: Callable[[torch.Tensor], None], poll_s: float = 0.05) -> Arena:
    """Attaches the arena at `path`, building it first if there is none.

    One builder at a time: the others wait and attach. Whatever ends a builder, the file under the final name is whole or absent.

    Args:
        fill: writes all data into the given tensor, uint8 (layout.nbytes,).

    Raises:
        SpaceError: the directory has no room; nothing is left behind.
    """
    while True:
        arena = Arena.attach(path)
        if arena is not None:
            return arena
        fd = _lock_for_building(path)
        if fd is None:
            time.sleep(poll_s)  # somebody else is at it; not a blocking flock: the builder keeps its lock as a user
            continue
        if path.exists():  # finished by another between our look and our lock
            os.unlink(_building(path))
            os.close(fd)
            continue
        try:
            _write(fd, path, layout, identity, fill)
            os.rename(_building(path), path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_building(path))
            os.close(fd)
            raise
        fcntl.flock(fd, fcntl.LOCK_SH)  # not atomic: `clean` may slip in between, hence the second look
        if _is_still(fd, path):
            return Arena(path, fd)
        os.close(fd)


@dataclass(frozen=True)
class Removed:
    path: Path
    nbytes: int


def clean(directory: Path) -> tuple[list[Removed], list[Path]]:
    """Removes every arena of this user that nobody holds, unfinished ones included; returns those removed and those in use."""
    removed, in_use = [], []
    for path in sorted(directory.glob(f"sida-{os.getuid()}-*")):
        nbytes = _unlink_if_unused(path)
        if nbytes is not None:
            removed.append(Removed(path, nbytes))
        elif path.exists():
            in_use.append(path)
    return removed, in_use


def remove_unfinished(path: Path, patience_s: float) -> None:
    """Removes what a killed builder of the arena at `path` has left, not what is being built.

    Args:
        patience_s: how long to wait for a builder that is about to end.
    """
    deadline, building = time.monotonic() + patience_s, _building(path)
    while building.exists() and _unlink_if_unused(building) is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _building(path: Path) -> Path:
    return path.with_name(path.name + BUILDING)


def _is_still(fd: int, path: Path) -> bool:
    """Whether the open file is the one that the path names now."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _lock_for_building(path: Path) -> int | None:
    """The descriptor of the file to build in, locked by us; None when another builder has it."""
    building = _building(path)
    fd = os.open(building, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if not _is_still(fd, building):
        os.close(fd)
        return None
    return fd


def _write(fd: int, path: Path, layout: ArenaLayout, identity: str, fill: Callable[[torch.Tensor], None]) -> None:
    body = json.dumps({"layout": layout.to_json(), "identity": identity}).encode()
    data_offset = align(len(MAGIC) + 16 + len(body), PAGE_BYTES)
    size = data_offset + layout.nbytes
    os.ftruncate(fd, 0)  # what a killed builder left is not trusted
    free = free_bytes(path.parent)
    if size > free:
        raise SpaceError(
            f"{path.parent}: the arena needs {size} bytes, {free} are free: {size - free} bytes short; "
            "set store.directory to a larger filesystem or run `python runner.py clean`"
        )
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise SpaceError(f"{path.parent}: cannot reserve {size} bytes for the arena: {error.strerror}") from None
    with mmap.mmap(fd, size) as mapped:
        everything = torch.frombuffer(mapped, dtype=torch.uint8)
        try:
            fill(everything[data_offset:])
        finally:
            del everything  # a mapping with views cannot be closed
        mapped[: len(MAGIC) + 16 + len(body)] = (
            MAGIC + LAYOUT_VERSION.to_bytes(8, "little") + len(body).to_bytes(8, "little") + body
        )
        mapped.flush()
    os.fsync(fd)  # costs nothing in /dev/shm; on a disk, what is published must survive a power cut


def _read_header(fd: int) -> dict:
    start = os.pread(fd, len(MAGIC) + 16, 0)
    assert start[: len(MAGIC)] == MAGIC, "an arena is published whole"
    length = int.from_bytes(start[-8:], "little")
    header = json.loads(os.pread(fd, length, len(start)))
    return header | {"data_offset": align(len(start) + length, PAGE_BYTES)}


def _unlink_if_unused(path: Path) -> int | None:
    """Unlinks an arena file that nobody holds; its size, or None when it is in use or gone."""
    with _opened(path) as fd:
        if fd is None:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not _is_still(fd, path):
            return None
        os.unlink(path)
        return os.fstat(fd).st_size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
