"""What the links of several GPUs of one machine carry at once, and one alone: copies out of an arena, by an actor for each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
import torch

from pipeline.actors import result, start_actor
from store import cuda
from store.arena import Arena

LINK_S = 2.0
AT_ONCE = 16
"""Copies that a link is given before the first of them is waited for."""


class Link:
    """An actor that keeps one GPU's link busy with copies out of the arena."""

    def __init__(self, path: Path, nbytes: int):
        """
        Args:
            nbytes: of one copy.
        """
        arena = Arena.attach(path)
        assert arena is not None, "the store keeps it"
        self._arena, self._nbytes = arena, nbytes
        self._target = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
        cuda.register(arena.memory.data_ptr(), arena.memory.numel(), 0)

    def ready(self) -> None:
        """Answers once the arena is registered."""

    def rate(self, start: float, seconds: float) -> float:
        """Bytes per second from `start` (time.time()) for so long: all links that are to be busy at once are given the same."""
        stream, source, copied = torch.cuda.Stream(), self._arena.memory, 0
        places = source.numel() // self._nbytes
        time.sleep(max(0.0, start - time.time()))
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(AT_ONCE):
                place = source.data_ptr() + copied // self._nbytes % places * self._nbytes
                cuda.copy_to_device(self._target.data_ptr(), place, self._nbytes, stream.cuda_stream)
                copied += self._nbytes
            stream.synchronize()
        return copied / (time.perf_counter() - began)

    def close(self) -> None:
        cuda.unregister(self._arena.memory.data_ptr())
        self._arena.close()


def links(arena: Path, nbytes: int, count: int) -> dict[str, Any]:
    """GB/s of the first link alone, and of all at once."""
    actors = [start_actor(Link, arena, nbytes, num_gpus=1) for _ in range(count)]
    try:
        result([actor.ready.remote() for actor in actors])
        alone = result(actors[0].rate.remote(time.time(), LINK_S))
        start = time.time() + 0.5
        together = result([actor.rate.remote(start, LINK_S) for actor in actors])
        result([actor.close.remote() for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
    return {
        "alone_gb_per_s": round(alone / 1e9, 2),
        "together_gb_per_s": [round(rate / 1e9, 2) for rate in together],
        "ratio": round(sum(together) / alone, 3),
    }
