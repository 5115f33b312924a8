"""From a checkpoint to an arena: every expert's tensors straight into its block, the backbone's into their section.

Knows which tensor goes to which block because the caller says so in a `Placement`; what those names mean, only the caller knows.
Nothing is held twice: a tensor of the arena's dtype is read in place, another passes through a buffer of its own size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from store import arena
from store.arena import Arena
from store.checkpoint import Checkpoint
from store.layout import ArenaLayout


@dataclass(frozen=True)
class Placement:
    """Which tensors of a checkpoint an arena holds, and in which dtype.

    Attributes:
        experts: [MoE layer][expert][part of the expert, e.g. "wi"] -> the tensor's name in the checkpoint.
        backbone: the model's own name of a tensor -> its name in the checkpoint.
        dtype: the dtype of all floating-point tensors in the arena, e.g. "float32".
        routers: names of the tensors whose hash identifies the model to predictors.
    """

    experts: tuple[tuple[dict[str, str], ...], ...]
    backbone: dict[str, str]
    dtype: str
    routers: tuple[str, ...]

    def layout(self, checkpoint: Checkpoint) -> ArenaLayout:
        """Where everything will lie; reads no weights.

        Raises:
            CheckpointError: a tensor is not in the checkpoint.
        """

        def tensor(name: str) -> tuple[tuple[int, ...], str]:
            info = checkpoint.info(name)
            return info.shape, self.dtype if info.dtype.is_floating_point else str(info.dtype).removeprefix("torch.")

        return ArenaLayout.of(
            [
                (len(layer), {part: tensor(name) for part, name in layer[0].items()})  # all experts of a layer are alike
                for layer in self.experts
            ],
            {name: tensor(source) for name, source in self.backbone.items()},
        )

    def arena_path(self, checkpoint: Checkpoint, directory: Path) -> Path:
        """Where this checkpoint's arena is, or will be: named by layout version, layout, dtype and every shard's identity."""
        parts = (arena.LAYOUT_VERSION, self.layout(checkpoint).to_json(), self.dtype, checkpoint.fingerprint)
        return arena.arena_path(directory, hashlib.sha256(repr(parts).encode()).hexdigest()[:16])


def routers_identity(checkpoint: Checkpoint, placement: Placement) -> str:
    """Hash of the router weights, as stored: equal for a copy of the model, different after any training of it."""
    digest = hashlib.sha256()
    for name in sorted(placement.routers):
        tensor = checkpoint.read(name)
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load(path: Path, checkpoint: Checkpoint, placement: Placement, progress: Callable[[int], None] = lambda nbytes: None) -> Arena:
    """Streams a checkpoint into a new arena at `path`, or attaches the one that another process built meanwhile.

    Args:
        progress: called with the number of bytes just placed.

    Raises:
        CheckpointError, SpaceError: see `Checkpoint.read_into` and `arena.build`; nothing is left behind.
    """
    layout = placement.layout(checkpoint)

    def fill(memory: torch.Tensor) -> None:
        for layer, experts in zip(layout.layers, placement.experts, strict=True):
            for expert, names in enumerate(experts):
                start = layer.expert_offset(expert)
                for part, view in layer.block.views(memory[start : start + layer.block.nbytes]).items():
                    checkpoint.read_into(names[part], view)
                progress(layer.block.nbytes)
        for tensor in layout.backbone:
            checkpoint.read_into(placement.backbone[tensor.name], tensor.view(memory))
            progress(tensor.nbytes)

    return arena.build(path, layout, routers_identity(checkpoint, placement), fill)
