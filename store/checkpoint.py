"""Safetensors in: tensors by name, from one file or from shards with an index, read straight into the memory given.

Parses the headers itself, for two reasons: a truncated file, a missing shard or a wrong offset is named before a byte is
read, and `read_into` can `preadv` a tensor to its final place, so that loading needs no memory of its own.
Knows nothing of experts or models; load.py decides what goes where.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from store.errors import CheckpointError
from store.weights import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100 * 2**20  # the format's own limit; a longer one is a file of another kind
SAMPLE_BYTES = 256
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """Where one tensor lies on disk."""

    offset: int
    """Bytes from the start of the file."""


def read_header(file: Path) -> tuple[dict[str, StoredTensor], bytes]:
    """The tensors of one safetensors file and its raw header.

    Raises:
        CheckpointError: the file is missing, truncated, or not of this format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            raw = f.read(length) if size >= 8 and length <= min(size, HEADER_LIMIT) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    if size < 8 or len(raw) < length:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); download it again")
    try:
        header = json.loads(raw)
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name} has dtype {entry['dtype']}, which is not served; known: {', '.join(DTYPES)}"
                )
            info = StoredTensor(file, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + begin)
            if end - begin != info.nbytes:
                raise CheckpointError(f"{file}: tensor {name} has {end - begin} bytes, its shape needs {info.nbytes}")
            if 8 + length + end > size:
                short = 8 + length + end - size
                raise CheckpointError(f"{file}: truncated: tensor {name} ends {short} bytes past the end; get it again")
            tensors[name] = info
        with safe_open(file, framework="pt"):  # negative offsets, overlaps and the like: the format's own library is the judge
            pass
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its header is damaged ({error}); download it again") from None
    return tensors, raw


@dataclass(frozen=True)
class CheckpointSource:
    """How to open a checkpoint, wherever (store.weights.Source)."""

    directory: Path
    """Absolute: who opens it may work in another directory."""

    def open(self) -> Checkpoint:
        return Checkpoint(self.directory)

    def __str__(self) -> str:
        return str(self.directory)


class Checkpoint:
    """A directory in Hugging Face's safetensors format, as Weights (store.weights)."""

    def __init__(self, directory: Path):
        """Reads headers only.

        Raises:
            CheckpointError: nothing there, an index that names a missing shard or tensor, or a damaged file.
        """
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        digest = hashlib.sha256()
        for file in self._files():
            tensors, header = read_header(file)
            self.tensors.update(tensors)
            stat = file.stat()
            digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode() + header)
        self.fingerprint = digest.hexdigest()
        """Changes with any shard's name, size, time or header."""
        missing = sorted(self._index.keys() - self.tensors.keys())
        if missing:
            raise CheckpointError(f"{directory / INDEX}: names tensor {missing[0]}, which no shard holds")

    @cached_property
    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.exists():
            return {}
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not an index of shards ({error})") from None

    def _files(self) -> list[Path]:
        if self._index:
            files = [self.directory / name for name in sorted(set(self._index.values()))]
            for file in files:
                if not file.exists():
                    raise CheckpointError(f"{self.directory / INDEX}: names the shard {file.name}, which is not there")
            return files
        if not (self.directory / SINGLE).exists():
            raise CheckpointError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}")
        return [self.directory / SINGLE]

    def info(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: has no tensor {name}")
        return self.tensors[name]

    def read_into(self, name: str, out: torch.Tensor, row: int | None = None, finite: bool = True) -> None:
        """Reads one tensor into `out`, contiguous and of the tensor's own shape, converting to `out`'s dtype.

        Args:
            row: read only this index of the first dimension; `out` then has the shape of the others.
            finite: refuse NaN and infinite values.

        Raises:
            CheckpointError: the shapes differ, the file ends early, or a value is NaN or infinite.
        """
        info = self.info(name) if row is None else _row(self.info(name), row)
        if tuple(out.shape) != info.shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(out.shape)}"
            )
        if out.dtype == info.dtype:
            _read_exactly(info, name, out)
        else:
            raw = torch.empty(info.shape, dtype=info.dtype)
            _read_exactly(info, name, raw)
            out.copy_(raw)
        if finite and out.is_floating_point() and out.numel() and out.dtype.itemsize > 1:  # torch compares no 8-bit floats
            low, high = torch.aminmax(out)  # NaN spreads into both; no temporary of the tensor's size
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise CheckpointError(
                    f"{info.file}: tensor {name} holds NaN or infinite weights (as {out.dtype}); the checkpoint is damaged"
                )

    def sample(self) -> str:
        """Hash of a few bytes of every tensor: equal for copies of the files, different after any training."""
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name}{info.shape}{info.dtype}".encode())
            with info.file.open("rb", buffering=0) as f:
                middle = info.offset + max(0, info.nbytes - SAMPLE_BYTES) // 2
                digest.update(os.pread(f.fileno(), min(SAMPLE_BYTES, info.nbytes), middle))
        return digest.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype."""
        info = self.info(name)
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out


def _row(info: StoredTensor, row: int) -> StoredTensor:
    """One index of a tensor's first dimension, as a tensor of its own."""
    nbytes = info.nbytes // info.shape[0]
    return StoredTensor(info.file, info.shape[1:], info.dtype, info.offset + row * nbytes)


def _read_exactly(info: StoredTensor, name: str, out: torch.Tensor) -> None:
    buffer = memoryview(out.view(-1).view(torch.uint8).numpy().data) if out.numel() else memoryview(b"")
    with info.file.open("rb", buffering=0) as f:
        done = 0
        while done < info.nbytes:
            count = os.preadv(f.fileno(), [buffer[done:]], info.offset + done)
            if count == 0:
                raise CheckpointError(f"{info.file}: ends inside tensor {name}; was it changed while being read?")
            done += count
