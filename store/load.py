"""From a model's weights to an arena: every expert's tensors straight into its block, the backbone's into their section.

Knows which tensor goes to which block because the caller says so in a `Placement`; what those names mean, only the caller knows.
Nothing is held twice: a tensor of the arena's dtype is read in place, another passes through a buffer of its own size. A thread per
core reads: one alone would be kept waiting, by the pages of the file and of the arena or by the making of random weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from store import arena
from store.arena import Arena
from store.layout import ArenaLayout, Part
from store.weights import Weights

MAX_READERS = 16
"""Each may hold a buffer of a tensor's size."""


@dataclass(frozen=True)
class Placement:
    """Which tensors of a model's weights an arena holds, and in which dtype.

    Attributes:
        experts: [MoE layer][expert][part of the expert, e.g. "wi"] -> the tensor's name in the weights.
        backbone: the model's own name of a tensor -> its name in the weights.
        dtype: the dtype of all floating-point tensors in the arena, e.g. "float32".
        routers: names of the tensors whose hash identifies the model to predictors.
        kept: backbone tensors of another floating-point dtype, by the model's own name: a router's bias, for one.
    """

    experts: tuple[tuple[dict[str, str], ...], ...]
    backbone: dict[str, str]
    dtype: str
    routers: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)

    def layout(self, weights: Weights) -> ArenaLayout:
        """Where everything will lie; reads no weights.

        Raises:
            CheckpointError: a tensor is not among the weights.
        """

        def tensor(stored: str, name: str = "") -> tuple[tuple[int, ...], str]:
            info = weights.info(stored)
            dtype = self.kept.get(name, self.dtype)
            return info.shape, dtype if info.dtype.is_floating_point else str(info.dtype).removeprefix("torch.")

        return ArenaLayout.of(
            [
                (len(layer), {part: tensor(name) for part, name in layer[0].items()})  # all experts of a layer are alike
                for layer in self.experts
            ],
            {name: tensor(source, name) for name, source in self.backbone.items()},
        )

    def arena_path(self, weights: Weights, directory: Path) -> Path:
        """Where the arena of these weights is, or will be: named by layout version, layout, dtype and the weights' fingerprint."""
        parts = (arena.LAYOUT_VERSION, self.layout(weights).to_json(), self.dtype, weights.fingerprint)
        return arena.arena_path(directory, hashlib.sha256(repr(parts).encode()).hexdigest()[:16])


def routers_identity(weights: Weights, placement: Placement) -> str:
    """Hash of the router weights, as stored: equal for a copy of the model, different after any training of it."""
    digest = hashlib.sha256()
    for name in sorted(placement.routers):
        tensor = weights.read(name)
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load(path: Path, weights: Weights, placement: Placement, progress: Callable[[int], None] = lambda nbytes: None) -> Arena:
    """Brings a model's weights into a new arena at `path`, or attaches the one that another process built meanwhile.

    Args:
        progress: called, in the caller's thread, with the number of bytes just placed; what it raises ends the loading.

    Raises:
        CheckpointError, SpaceError: see `Weights.read_into` and `arena.build`; nothing is left behind.
    """
    layout = placement.layout(weights)

    def fill(memory: torch.Tensor) -> None:
        def place_expert(index: int, expert: int) -> int:
            layer = layout.layers[index]
            start = layer.expert_offset(expert)
            for part, view in layer.block.views(memory[start : start + layer.block.nbytes]).items():
                weights.read_into(placement.experts[index][expert][part], view)
            return layer.block.nbytes

        def place_tensor(tensor: Part) -> int:
            weights.read_into(placement.backbone[tensor.name], tensor.view(memory))
            return tensor.nbytes

        steps: list[Callable[[], int]] = []
        for index, experts in enumerate(placement.experts):
            steps += [partial(place_expert, index, expert) for expert in range(len(experts))]
        steps += [partial(place_tensor, tensor) for tensor in layout.backbone]
        _in_parallel(steps, progress)

    return arena.build(path, layout, routers_identity(weights, placement), fill)


def _in_parallel(steps: list[Callable[[], int]], done: Callable[[int], None]) -> None:
    """Runs all steps on the cores that this process may use; tells each one's result, in order. The first error ends it.

    When this returns or raises no step is running: their memory may be unmapped.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take this over: each would otherwise start as many again for its own operators
    try:
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_READERS)) as pool:
            try:
                for future in [pool.submit(step) for step in steps]:
                    done(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that have begun
                raise
    finally:
        torch.set_num_threads(before)
