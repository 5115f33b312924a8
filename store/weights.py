"""What the store asks of a model's weights, wherever they come from: files (checkpoint.py) or a seed (random_weights.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, before it is read.

    Attributes:
        file: what messages name: the file that holds the tensor, or the one that asks for it.
        dtype: as stored; `read_into` converts.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """Tensors by name. Several threads may read at once."""

    fingerprint: str
    """Changes with whatever an arena of these weights depends on, but for its layout."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def info(self, name: str) -> TensorInfo:
        """
        Raises:
            CheckpointError: there is no such tensor.
        """

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """One tensor into `out`, contiguous and of the tensor's own shape, in `out`'s dtype.

        Raises:
            CheckpointError: it cannot be read, or is not what was asked for.
        """

    def sample(self) -> str:
        """A hash that is equal for copies of the weights, different after any training."""


class Source(Protocol):
    """How any process of the machine opens a model's weights: small and picklable. Its str() is what messages call the model."""

    def open(self) -> Weights: ...
