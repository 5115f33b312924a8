"""A run whose Ray has been killed with it removes its arena itself, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.run import _removed_without_ray
from store import arena as arenas
from store.layout import ArenaLayout


def left_by(path: Path) -> Any:
    """A run's Prepared, as far as it is asked; at `path` an arena that nobody uses, and what a killed builder has left."""
    layout = ArenaLayout.of([(2, {"block": ((64,), "uint8")})], {})
    arenas.build(path, layout, "identity", lambda memory: memory.fill_(7)).close()
    (path.parent / (path.name + arenas.BUILDING)).write_bytes(b"half")
    config = SimpleNamespace(store=SimpleNamespace(keep=False))
    return SimpleNamespace(arena=path, model=SimpleNamespace(source=None, placement=None), config=config)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_ends_early_removes_an_arena_only_once_it_has_a_store(arena_dir, begun):
    path = arenas.arena_path(arena_dir, "fingerprint")
    with pytest.raises(KeyboardInterrupt), _removed_without_ray(left_by(path)) as told:
        if begun:
            told.set()
        raise KeyboardInterrupt
    assert any(arena_dir.iterdir()) != begun
