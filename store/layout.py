"""Where the bytes of an expert lie: one contiguous, aligned block per expert, all its tensors one after the other.

Knows shapes, dtypes and offsets; nothing of files (arena.py), devices (slots.py) or models. A block has the same layout in
the arena and in a slot, so that moving an expert is one copy of `BlockLayout.nbytes` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGNMENT = 256
"""Bytes. Every block and every tensor in it starts at a multiple: what GPU loads and DMA want."""

Key = tuple[int, int]
"""An expert: (MoE layer, expert)."""


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """The smallest multiple of `to` that is at least `nbytes`."""
    return -(-nbytes // to) * to


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as "float32"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


@dataclass(frozen=True)
class Part:
    """One tensor inside a block (or inside the arena's backbone section)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Bytes from the start of the block (of the arena's data, for backbone tensors)."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """This tensor as a view of `memory`, a uint8 tensor that starts where the block starts."""
        flat = memory[self.offset : self.offset + self.nbytes]
        return flat.view(torch_dtype(self.dtype)).view(self.shape)


def place(tensors: Mapping[str, tuple[tuple[int, ...], str]], start: int = 0) -> tuple[tuple[Part, ...], int]:
    """Lays tensors, name -> (shape, dtype), one after the other from byte `start`; returns them and the aligned end."""
    parts, offset = [], start
    for name, (shape, dtype) in tensors.items():
        part = Part(name, tuple(shape), dtype, offset)
        parts.append(part)
        offset = align(offset + part.nbytes)
    return tuple(parts), offset


@dataclass(frozen=True)
class BlockLayout:
    """The block of one expert; every expert of a MoE layer has the same."""

    parts: tuple[Part, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> BlockLayout:
        return cls(*place(tensors))

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The expert's tensors by name, as views of `block`: uint8, (nbytes,)."""
        return {part.name: part.view(block) for part in self.parts}


@dataclass(frozen=True)
class LayerLayout:
    """The blocks of one MoE layer, back to back from byte `offset` of the arena's data.

    Attributes:
        blocks: as many as experts; fewer where a stand-in of a model (pipeline/plan/trial.py) has experts share their bytes.
    """

    block: BlockLayout
    experts: int
    offset: int
    blocks: int

    def expert_offset(self, expert: int) -> int:
        return self.offset + expert % self.blocks * self.block.nbytes

    @property
    def end(self) -> int:
        return self.offset + self.blocks * self.block.nbytes


@dataclass(frozen=True)
class ArenaLayout:
    """All of an arena's data: the experts, MoE layer by MoE layer, then the backbone's tensors."""

    layers: tuple[LayerLayout, ...]
    backbone: tuple[Part, ...]
    nbytes: int

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all experts, alignment included."""
        return sum(layer.experts * layer.block.nbytes for layer in self.layers)

    @cached_property
    def backbone_bytes(self) -> int:
        return sum(part.nbytes for part in self.backbone)

    @cached_property
    def slot_bytes(self) -> int:
        """A slot holds the largest block, so that any expert fits any slot."""
        return max(layer.block.nbytes for layer in self.layers)

    @classmethod
    def of(
        cls,
        experts: list[tuple[int, Mapping[str, tuple[tuple[int, ...], str]]]],
        backbone: Mapping[str, tuple[tuple[int, ...], str]],
        most_blocks: int | None = None,
    ) -> ArenaLayout:
        """Lays out MoE layers, each (number of experts, tensors of one expert), and then the backbone's tensors.

        Args:
            most_blocks: of a layer; more experts than these share them.
        """
        layers, offset = [], 0
        for count, tensors in experts:
            layer = LayerLayout(BlockLayout.of(tensors), count, offset, min(count, most_blocks or count))
            layers.append(layer)
            offset = layer.end
        parts, end = place(backbone, offset)
        return cls(tuple(layers), parts, end)

    def to_json(self) -> dict:
        def part(p: Part) -> list:
            return [p.name, list(p.shape), p.dtype, p.offset]

        return {
            "layers": [[[part(p) for p in x.block.parts], x.block.nbytes, x.experts, x.offset, x.blocks] for x in self.layers],
            "backbone": [part(p) for p in self.backbone],
            "nbytes": self.nbytes,
        }

    @classmethod
    def from_json(cls, data: dict) -> ArenaLayout:
        def part(p: list) -> Part:
            return Part(p[0], tuple(p[1]), p[2], p[3])

        layers = tuple(
            LayerLayout(BlockLayout(tuple(part(p) for p in parts), nbytes), experts, offset, blocks)
            for parts, nbytes, experts, offset, blocks in data["layers"]
        )
        return cls(layers, tuple(part(p) for p in data["backbone"]), data["nbytes"])
