"""A batch's tensors in one piece of memory, so that one copy brings a GPU all that its forward wants to know.

Token ids and masks, and, where a hash table decides, the experts and their weights of every MoE layer: some thirty small tensors,
of which each would take its own padding, its own pinned memory and its own copy. `Packing` says where each of them lies, the same
on both sides; equal packings can use one another's memory, and one recorded graph.

Knows no stream and no graph. Whoever copies a `Packed` keeps it until the copy has ended: the memory of one that is gone is given
to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import numpy as np
import torch

from pipeline.inputs import Inputs
from predictor.hash_table import HashTable
from store.slots import pinned

Tables = list[tuple[torch.Tensor, torch.Tensor]]
"""Per MoE layer the experts of every token and their scaling factors (pipeline.gpu.layers.DeviceForward.tables)."""

ALIGNMENT = 256
"""Bytes, as torch's own allocations have it at least: Triton compiles a kernel anew for an address that is less round."""


@dataclass(frozen=True)
class Layer:
    """What a hash table says of one MoE layer: of every token of a stream, padding included, so many experts."""

    stream: int
    tokens: int
    width: int

    def stride(self, itemsize: int) -> int:
        """Bytes from its tensor to that of the next layer."""
        return _aligned(self.tokens * self.width * itemsize)


@dataclass(frozen=True)
class Packing:
    """Where everything lies: the inputs, the experts of every MoE layer, their weights, one behind the other.

    Attributes:
        inputs: name, shape, dtype.
        layers: of the hash table; None: routers decide.
        dtype: of the weights.
    """

    inputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    layers: tuple[Layer, ...] | None
    dtype: torch.dtype

    def views(self, memory: torch.Tensor) -> tuple[Inputs, Tables | None]:
        """The tensors in a piece of memory, uint8 (nbytes,), wherever it is; weights (tokens, width), experts int64 likewise."""

        def tensor(start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)

        starts, experts, weights = self._starts
        inputs = {name: tensor(start, shape, dtype) for start, (name, shape, dtype) in zip(starts, self.inputs, strict=True)}
        if self.layers is None:
            return inputs, None
        tables = []
        for layer in self.layers:
            shape = (layer.tokens, layer.width)
            tables.append((tensor(experts, shape, torch.int64), tensor(weights, shape, self.dtype)))
            experts, weights = experts + layer.stride(8), weights + layer.stride(self.dtype.itemsize)
        return inputs, tables

    @cached_property
    def nbytes(self) -> int:
        _, _, weights = self._starts
        return weights + sum(layer.stride(self.dtype.itemsize) for layer in self.layers or ())

    @cached_property
    def _starts(self) -> tuple[list[int], int, int]:
        """The first byte of each input, of all experts, of all weights."""
        starts, end = [], 0
        for _, shape, dtype in self.inputs:
            starts.append(end)
            end += _aligned(prod(shape) * dtype.itemsize)
        return starts, end, end + sum(layer.stride(8) for layer in self.layers or ())

    def write(self, memory: torch.Tensor, inputs: Inputs, table: HashTable | None, real: Sequence[np.ndarray]) -> None:
        """Fills a piece of the host's memory; padding has no expert (-1) and no weight.

        Args:
            inputs, table: as `of` has seen them.
            real: per stream where in the padded tensors the table's tokens are.
        """
        starts, experts, weights = self._starts
        raw = memory.numpy()
        for start, tensor in zip(starts, inputs.values(), strict=True):
            raw[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
        if table is None:
            return
        named = raw[experts:weights].view(np.int64)
        named.fill(-1)
        self._spread(named, 8, table.experts, real)
        scaling = np.zeros((self.nbytes - weights) // self.dtype.itemsize, dtype=np.float32)  # numpy has no bfloat16
        self._spread(scaling, self.dtype.itemsize, table.scaling, real)
        memory[weights : self.nbytes].view(self.dtype).copy_(torch.from_numpy(scaling))

    def _spread(self, room: np.ndarray, itemsize: int, parts: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> None:
        """Each layer's part to its places, neighbours that are alike at once.

        Args:
            room: one number for every `itemsize` bytes of the memory.
            parts: per MoE layer (real tokens, width).
        """
        assert self.layers is not None
        at = first = 0
        for layer, alike in groupby(self.layers):
            count, stride = len([*alike]), layer.stride(itemsize) // itemsize
            strides = (stride * room.itemsize, layer.width * room.itemsize, room.itemsize)
            places = np.ndarray((count, layer.tokens, layer.width), room.dtype, room[at:].data, strides=strides)
            places[:, real[layer.stream]] = np.concatenate(parts[first : first + count]).reshape(count, -1, layer.width)
            at, first = at + count * stride, first + count


@dataclass(frozen=True)
class Packed:
    """A batch's tensors in pinned memory: from other memory a copy would wait for all that the GPU has been given before.

    Attributes:
        memory: uint8 (packing.nbytes,).
    """

    packing: Packing
    memory: torch.Tensor

    @classmethod
    def of(
        cls, inputs: Inputs, table: HashTable | None, real: Sequence[np.ndarray], tokens: Sequence[int], streams: Sequence[int],
        dtype: torch.dtype
    ) -> Packed:  # fmt: skip
        """
        Args:
            table: decides; of the real tokens.
            real: per stream where the real tokens are.
            tokens: per stream, padding included.
            streams: of each MoE layer its stream.
            dtype: of the model, and so of the weights.

        Raises:
            SpaceError: no pinned memory can be had.
        """
        layers = None
        if table is not None:
            layers = tuple(
                Layer(stream, tokens[stream], experts.shape[1]) for stream, experts in zip(streams, table.experts, strict=True)
            )
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        packing = Packing(shapes, layers, dtype)
        memory = pinned(packing.nbytes)  # torch keeps what is given back, and gives it again
        packing.write(memory, inputs, table, real)
        return cls(packing, memory)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
