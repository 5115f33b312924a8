"""Three processes for all tests of a session that need ranks: starting them takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pipeline.parallel.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with World(3) as world:
        yield world
