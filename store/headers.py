"""What is known of weights before any is read: names, shapes and dtypes, in a checkpoint's place where only bytes are counted.

Of a checkpoint that lies elsewhere there is no more to be had; of one that lies here a plan wants no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, Self

from store.errors import CheckpointError
from store.weights import TensorInfo


class Headers:
    """Weights (store.weights) without values; small, picklable, and so their own Source."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], fingerprint: str | None = None):
        """
        Args:
            name: what messages call the model.
            fingerprint: of the weights that these are the headers of, where that is known.
        """
        self._name, self.tensors = name, dict(tensors)
        self.directory = Path(name)
        parts = sorted((key, info.shape, str(info.dtype)) for key, info in tensors.items())
        self.fingerprint = fingerprint or hashlib.sha256(repr(parts).encode()).hexdigest()

    def open(self) -> Self:
        return self

    def __str__(self) -> str:
        return self._name

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self._name}: has no tensor {name}")
        return self.tensors[name]

    def read(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self._name}: only its headers were read; tensor {name} has no values here")

    def read_into(self, name: str, *where: object, **how: object) -> NoReturn:
        self.read(name)

    def sample(self) -> str:
        return self.fingerprint
