"""Who is evicted: policies order the resident experts from the first to go to the last.

A policy knows keys and what happened to them, and no tensor, slot or device. It only proposes an order: the copy engine
(copies.py) never takes an expert that the queued hash tables want sooner than the one to be admitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from store.layout import Key


class Policy(Protocol):
    """Told what happens to every resident expert; asked who should go first."""

    def admitted(self, key: Key) -> None:
        """A copy of `key` into a slot has begun."""

    def used(self, key: Key) -> None:
        """A forward has read `key` from its slot."""

    def evicted(self, key: Key) -> None:
        """`key` has lost its slot."""

    def order(self) -> Iterator[Key]:
        """The resident experts, first to go first. Not to be changed while iterating."""


class FIFO:
    """First in, first out: the paper's choice (SiDA-MoE, section 3.4)."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}  # a dict keeps the order of insertion

    def admitted(self, key: Key) -> None:
        self._keys[key] = None

    def used(self, key: Key) -> None:
        pass

    def evicted(self, key: Key) -> None:
        del self._keys[key]

    def order(self) -> Iterator[Key]:
        return iter(self._keys)


class LRU(FIFO):
    """Least recently used first; admission counts as a use."""

    def used(self, key: Key) -> None:
        del self._keys[key]
        self._keys[key] = None


POLICIES: dict[str, type[Policy]] = {"fifo": FIFO, "lru": LRU}
"""By the name in `store.policy`."""
