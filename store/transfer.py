"""An arena from one machine to another, in chunks: for a machine that cannot see the checkpoint.

Knows bytes and checksums; who carries the chunks is the caller's. Every chunk is summed where it lies and again where it has come.
CRC-32 is enough for accidents, and quick; for a hash a fast network would have to wait.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from store.arena import Arena, build
from store.errors import TransferError
from store.layout import ArenaLayout

CHUNK_BYTES = 16 * 2**20
AT_ONCE = 4
"""Chunks on their way: Ray's objects hold no more of them at either end."""
TRIES = 3
"""Of one chunk that comes damaged."""


@dataclass(frozen=True)
class Chunk:
    """A part of an arena's data.

    Attributes:
        data: uint8 (bytes,).
        checksum: of `data`, where it was read.
    """

    data: np.ndarray
    checksum: int


@dataclass(frozen=True)
class Contents:
    """What there is to fetch."""

    layout: dict[str, Any]
    """`ArenaLayout.to_json`."""
    identity: str
    chunks: int


def contents(arena: Arena, chunk_bytes: int = CHUNK_BYTES) -> Contents:
    return Contents(arena.layout.to_json(), arena.identity, -(-arena.layout.nbytes // chunk_bytes))


def cut(arena: Arena, index: int, chunk_bytes: int = CHUNK_BYTES) -> Chunk:
    """One chunk, a view of the arena."""
    data = arena.memory[index * chunk_bytes : (index + 1) * chunk_bytes].numpy()
    return Chunk(data, _checksum(data))


def receive(
    path: Path,
    given: Contents,
    ask: Callable[[int], Callable[[], Chunk]],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Arena:
    """Builds the arena at `path` from chunks, or attaches the one that another process built meanwhile.

    Args:
        ask: asks for a chunk by its number, and returns what waits for it; `AT_ONCE` are asked for before the first is waited for.
        progress: called with the number of bytes just placed; what it raises ends the transfer.

    Raises:
        TransferError: a chunk came damaged again and again, or not whole; nothing is left behind.
        SpaceError: see `arena.build`.
    """
    layout = ArenaLayout.from_json(given.layout)

    def fill(memory: torch.Tensor) -> None:
        asked: deque[Callable[[], Chunk]] = deque()
        place = 0
        for index in range(given.chunks):
            while len(asked) < AT_ONCE and index + len(asked) < given.chunks:
                asked.append(ask(index + len(asked)))
            data = _whole(index, asked.popleft(), ask)
            if place + len(data) <= len(memory):
                memory[place : place + len(data)].numpy()[:] = data
            place += len(data)
            progress(len(data))
        if place != len(memory):
            raise TransferError(f"{path}: {place} bytes came from the other machine, the arena has {len(memory)}")

    return build(path, layout, given.identity, fill)


def _whole(index: int, answer: Callable[[], Chunk], ask: Callable[[int], Callable[[], Chunk]]) -> np.ndarray:
    """A chunk's data, asked for again if it has come damaged."""
    for _ in range(TRIES):
        chunk = answer()
        if _checksum(chunk.data) == chunk.checksum:
            return chunk.data
        answer = ask(index)
    raise TransferError(f"chunk {index} of the arena came damaged {TRIES} times: its checksum is not the one that was sent with it")


def _checksum(data: np.ndarray) -> int:
    return zlib.crc32(data.data)
