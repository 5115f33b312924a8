"""Random weights from a seed, in a checkpoint's place: made where they are wanted, never on a disk.

A number is a quantile of the normal distribution, looked up by 16 random bits. Every tensor has a generator of its own, seeded by
seed and name, whose bits numpy keeps the same for ever (PCG64); and the quantiles are rounded more coarsely than two machines'
logarithms differ. So a seed and a name give the same bytes in any order, thread, process and machine. torch's normal_ gives
others with AVX2 than without it, and is slower.
Knows no model: whoever calls says how every tensor is spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Self

import numpy as np
import torch

from store.errors import CheckpointError
from store.weights import TensorInfo

FORMAT = 1
"""To be raised by whoever changes the numbers that a seed gives."""
QUANTILES = 2**16
CHUNK = 2**18
"""Numbers at once: their bits and indices stay in the cache. A multiple of 4, so that where a chunk ends changes nothing."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RandomTensor:
    """How one tensor is spread: normal around `mean`; all `mean` where `std` is 0."""

    shape: tuple[int, ...]
    mean: float
    std: float


class RandomWeights:
    """Weights (store.weights) that are made as they are read; small, picklable, and so their own Source."""

    def __init__(self, file: Path, tensors: Mapping[str, RandomTensor], dtype: torch.dtype, seed: int):
        """
        Args:
            file: the model's config, for messages.
            dtype: what the tensors count as stored in: another dtype has the same numbers, rounded to this one first.
        """
        self._file, self._spread, self._dtype, self._seed = file, dict(tensors), dtype, seed
        self.tensors = {name: TensorInfo(file, tensor.shape, dtype) for name, tensor in tensors.items()}
        parts = (FORMAT, seed, dtype, sorted((name, t.shape, t.mean, t.std) for name, t in tensors.items()))
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        """Changes with the seed, the dtype, and any tensor's name, shape and spread."""

    def open(self) -> Self:
        return self

    def __str__(self) -> str:
        return str(self._file)

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self._file}: its model has no tensor {name}")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype that it counts as stored in."""
        out = torch.empty(self.info(name).shape, dtype=self._dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Makes one tensor in `out`: of a floating dtype, contiguous, of the tensor's shape."""
        spread = self._spread[name]
        assert tuple(out.shape) == spread.shape, name
        if not spread.std:
            out.fill_(spread.mean)
            return
        table = _table(spread.mean, spread.std, self._dtype, out.dtype)
        generator = np.random.PCG64(int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest(), "little"))
        flat = out.view(-1).view(BITS[out.dtype.itemsize]).numpy()
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            words = generator.random_raw(-(-len(part) // 4))  # uint64: four numbers each
            indices = words.astype("<u8", copy=False).view("<u2")[: len(part)]
            np.take(table, indices, out=part, mode="wrap")  # no index is out of range; the default mode would buffer `part`

    def sample(self) -> str:
        return self.fingerprint


@cache
def _table(mean: float, std: float, stored: torch.dtype, dtype: torch.dtype) -> np.ndarray:
    """The bits of every number that such a tensor can hold: integers of the dtype's size, (QUANTILES,)."""
    values = torch.from_numpy((mean + std * _quantiles()).astype(np.float32)).to(stored).to(dtype)
    return values.view(BITS[dtype.itemsize]).numpy()


@cache
def _quantiles() -> np.ndarray:
    """Of the standard normal distribution, in equal steps, up to 4.3; float64 (QUANTILES,), ascending and symmetric."""
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / QUANTILES) for i in range(QUANTILES // 2)]
    rounded = np.round(np.array(upper) * QUANTILES) / QUANTILES  # multiples of 2**-16: no logarithm's last bit decides
    return np.concatenate([-rounded[::-1], rounded])
