"""An arena from one machine to another: byte for byte, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from store import transfer
from store.arena import Arena, build
from store.errors import SpaceError, TransferError
from store.layout import ArenaLayout
from store.transfer import Chunk, contents, cut, receive

LAYOUT = ArenaLayout.of([(4, {"w": ((10, 10), "float32")}), (2, {"w": ((3,), "float32")})], {"norm": ((7,), "float32")})


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """Of random bytes."""

    def fill(memory: torch.Tensor) -> None:
        memory[:] = torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    return build(tmp_path / "here" / "sida-0-x", LAYOUT, "routers", fill)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there" / "sida-0-x"


def asker(arena: Arena, chunk_bytes: int, damage=lambda index, attempt, chunk: chunk):
    """ask, and the list of what was asked and what was waited for."""
    log: list[tuple[str, int]] = []

    def ask(index: int):
        attempt = log.count(("ask", index))
        log.append(("ask", index))

        def wait() -> Chunk:
            log.append(("wait", index))
            return damage(index, attempt, cut(arena, index, chunk_bytes))

        return wait

    return ask, log


@pytest.mark.parametrize("chunk_bytes", [1, 100, 512, LAYOUT.nbytes - 1, LAYOUT.nbytes, 10**6])
def test_an_arena_comes_byte_for_byte(arena, there, chunk_bytes):
    ask, _ = asker(arena, chunk_bytes)
    placed: list[int] = []
    came = receive(there, contents(arena, chunk_bytes), ask, placed.append)
    assert torch.equal(came.memory, arena.memory)
    assert (came.layout, came.identity) == (arena.layout, arena.identity)
    assert sum(placed) == LAYOUT.nbytes
    assert there.read_bytes() == arena.path.read_bytes()


def test_a_few_chunks_are_on_their_way_at_once_and_no_more(arena, there):
    ask, log = asker(arena, 100)
    receive(there, contents(arena, 100), ask)
    assert sorted(n for what, n in log if what == "ask") == list(range(contents(arena, 100).chunks))
    under_way = 0
    most = 0
    for what, _ in log:
        under_way += 1 if what == "ask" else -1
        most = max(most, under_way)
    assert most == transfer.AT_ONCE and under_way == 0


def flipped(chunk: Chunk) -> Chunk:
    data = chunk.data.copy()
    data[len(data) // 2] ^= 1
    return replace(chunk, data=data)


def test_a_chunk_that_comes_damaged_is_asked_for_again(arena, there):
    ask, log = asker(arena, 500, lambda index, attempt, chunk: flipped(chunk) if index == 2 and attempt == 0 else chunk)
    came = receive(there, contents(arena, 500), ask)
    assert torch.equal(came.memory, arena.memory)
    assert log.count(("ask", 2)) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda i, a, c: flipped(c) if i == 1 else c, lambda i, a, c: replace(c, data=c.data[:-1]) if i == 1 else c],
    ids=["a bit", "a byte missing"],
)
def test_one_that_always_comes_damaged_leaves_nothing(arena, there, damage):
    ask, _ = asker(arena, 500, damage)
    with pytest.raises(TransferError, match=r"chunk 1 .* damaged 3 times"):
        receive(there, contents(arena, 500), ask)
    assert list(there.parent.iterdir()) == []


@pytest.mark.parametrize("chunks", [1, 9])
def test_chunks_that_do_not_make_the_whole_are_refused(arena, there, chunks):
    ask, _ = asker(arena, 500)
    with pytest.raises(TransferError, match="bytes came"):
        receive(there, replace(contents(arena, 500), chunks=chunks), lambda index: ask(index % 4))
    assert list(there.parent.iterdir()) == []


def test_what_is_there_already_is_not_fetched(arena, there):
    ask, log = asker(arena, 500)
    receive(there, contents(arena, 500), ask).close()
    before = len(log)
    receive(there, contents(arena, 500), ask)
    assert len(log) == before


def test_no_room_is_said_before_a_chunk_is_asked_for(arena, there, monkeypatch):
    monkeypatch.setattr("store.arena.free_bytes", lambda directory: 10)
    ask, log = asker(arena, 500)
    with pytest.raises(SpaceError, match="short"):
        receive(there, contents(arena, 500), ask)
    assert log == [] and list(there.parent.iterdir()) == []


def test_a_sender_gone_in_the_middle_leaves_nothing(arena, there):
    def gone(index: int, attempt: int, chunk: Chunk) -> Chunk:
        if index == 2:
            raise ConnectionError("the other machine has gone")
        return chunk

    ask, _ = asker(arena, 500, gone)
    with pytest.raises(ConnectionError):
        receive(there, contents(arena, 500), ask)
    assert list(there.parent.iterdir()) == []
