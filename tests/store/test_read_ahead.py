"""An arena on a disk: evicted pages come back, by being touched and ahead of that, and what is read is right.

Where a directory's pages cannot be evicted there is nothing to test.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from store import arena as arenas
from store.arena import Arena
from store.eviction import POLICIES
from store.layout import ArenaLayout
from store.read_ahead import AHEAD, ReadAheadEngine
from store.slots import Slots
from tests.store.pages import PAGE, cached, cached_pages, evict

LAYERS, EXPERTS, BLOCK = 3, 16, 16 * PAGE


def content(layer: int, expert: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer * EXPERTS + expert)
    return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """Of 3 MoE layers of 16 experts, 64 KiB each, on the disk of the test's directory."""
    layout = ArenaLayout.of([(EXPERTS, {"block": ((BLOCK,), "uint8")})] * LAYERS, {})

    def fill(memory: torch.Tensor) -> None:
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                start = layout.layers[layer].expert_offset(expert)
                memory[start : start + BLOCK] = content(layer, expert)

    made = arenas.build(tmp_path / "arena", layout, "identity", fill)
    evict(made)
    if cached(made) > 0.1:
        pytest.skip(f"the filesystem of {tmp_path} keeps its pages in RAM")
    return made


def engine_of(arena: Arena, slots: int, background: bool) -> ReadAheadEngine:
    return ReadAheadEngine(arena, Slots(arena, slots, torch.device("cpu")), POLICIES["lookahead"](), background)


def eventually(condition) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_what_is_evicted_is_read_again_and_is_right(arena):
    for layer, expert in ((0, 0), (1, 7), (2, 15)):
        evict(arena)  # touching one may have brought its neighbours
        assert not any(cached_pages(arena, layer, expert))
        assert torch.equal(arena.block(layer, expert), content(layer, expert))
        assert all(cached_pages(arena, layer, expert))


def test_an_expert_is_read_ahead_without_being_touched(arena):
    arena.read_ahead(1, 3)
    assert eventually(lambda: all(cached_pages(arena, 1, 3)))
    assert not any(cached_pages(arena, 1, 5))


@pytest.mark.parametrize("background", [False, True])
def test_planned_experts_come_into_ram_and_no_more_than_the_reach(arena, background):
    """Without slots, so that nobody copies, and what comes is read ahead."""
    asked: list[tuple[int, int]] = []
    read_ahead = arena.read_ahead
    arena.read_ahead = lambda *key: (asked.append(key), read_ahead(*key))
    engine = engine_of(arena, 0, background)
    reach = int(LAYERS * EXPERTS * AHEAD)
    named = [[(expert, 1.0) for expert in range(EXPERTS)] for _ in range(LAYERS)]
    engine.plan(0, named)
    first = [(0, expert) for expert in range(reach)]
    assert eventually(lambda: all(all(cached_pages(arena, *key)) for key in first))
    time.sleep(0.05)
    assert asked == first
    assert not any(any(cached_pages(arena, layer, expert)) for layer in (1, 2) for expert in range(EXPERTS))
    with engine.reading(0, 0, range(EXPERTS)) as blocks:  # the layer is reached: the next may come
        assert all(torch.equal(block["block"], content(0, expert)) for expert, block in blocks)
    assert eventually(lambda: asked == first + [(1, expert) for expert in range(reach)])
    assert eventually(lambda: all(all(cached_pages(arena, 1, expert)) for expert in range(reach)))
    engine.close()


def test_what_is_unlikely_or_past_is_not_read(arena):
    engine = engine_of(arena, 0, background=False)
    engine.plan(0, [[(0, 1.0), (1, 0.4)], [], []])
    assert eventually(lambda: all(cached_pages(arena, 0, 0)))
    assert not any(cached_pages(arena, 0, 1))
    engine.finish(4)
    engine.plan(3, [[(5, 1.0)], [], []])
    assert not any(cached_pages(arena, 0, 5))
    engine.close()


@pytest.mark.parametrize("background", [False, True])
def test_copies_and_reads_are_right_while_two_thirds_of_the_pages_are_gone(arena, background):
    """Before every layer everything is evicted once more than a third is in RAM, as in a machine that has no room for more."""
    engine = engine_of(arena, 6, background)
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randperm(EXPERTS, generator=generator)[:5].tolist() for _ in range(LAYERS)] for _ in range(40)]
    evictions = 0
    for number, batch in enumerate(batches):
        for ahead in range(number, min(number + 4, len(batches))):
            engine.plan(ahead, [[(expert, 1.0) for expert in layer] for layer in batches[ahead]])
        for layer, experts in enumerate(batch):
            if cached(arena) > 1 / 3:
                evict(arena)
                evictions += 1
            with engine.reading(number, layer, experts) as blocks:
                for at, block in blocks:
                    assert torch.equal(block["block"], content(layer, experts[at]))
        engine.finish(number)
    moved = engine.take()
    assert evictions > 5
    assert sum(moved.hits) > 0 and sum(moved.misses) > 0
    engine.close()


def test_for_tables_that_are_not_heeded_nothing_is_read(arena, monkeypatch):
    engine = engine_of(arena, 4, False)
    with monkeypatch.context() as doubted:
        doubted.setattr(ReadAheadEngine, "_heeds", False)
        engine.plan(0, [[(expert, 1.0) for expert in range(8)]] * LAYERS)
        assert not engine._to_read
    engine.plan(1, [[(expert, 1.0) for expert in range(8)]] * LAYERS)
    assert engine._to_read or any(cached_pages(arena, 0, 0))
    engine.close()


def test_in_memory_reading_ahead_does_nothing(tmp_path):
    layout = ArenaLayout.of([(2, {"block": ((PAGE,), "uint8")})], {})
    made = arenas.build(tmp_path / "arena", layout, "identity", lambda memory: memory.fill_(7))
    made.read_ahead(0, 1)
    made.close()
    made.read_ahead(0, 1)
    assert made.block(0, 1).eq(7).all()
