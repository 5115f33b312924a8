"""From what the user calls a model to a directory of safetensors: a local directory, or a hub id that is downloaded once.

A checkpoint that has only pickled weights (.bin) is converted once, through torch.load(weights_only=True), which runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, NotASafetensorsRepoError
from safetensors.torch import save_file

from pipeline.errors import ModelError
from pipeline.progress import bar
from store.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint
from store.headers import Headers
from store.weights import TensorInfo

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
SMALL_FILES = ["*.json", "*.model", "*.txt"]
NOT_WANTED = ["*/*", "consolidated*"]
"""Some publishers put the same weights there once more, for another program."""


def local_checkpoint(model: str) -> Path:
    """The directory of a model's config.json, tokenizer and safetensors; downloads and converts if it has to.

    Raises:
        ModelError: neither a directory with a model nor a model of the hub, or the hub cannot be reached.
    """
    directory = Path(model) if _is_local(model) else _download(model, ["*.safetensors", "pytorch_model*.bin"])
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: holds no config.json")
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return directory
    if _is_pickled(directory):
        return _converted(directory)
    raise ModelError(f"{directory}: holds no weights: neither {SINGLE}, {INDEX} nor {PICKLED}")


def headers(model: str) -> tuple[Path, Headers]:
    """The directory of a model's config.json and tokenizer, and the headers of its weights; no weight is downloaded or read.

    Raises:
        ModelError: as `local_checkpoint`, or the weights are pickled, whose headers are within them.
        CheckpointError: a damaged header.
    """
    local = _is_local(model)
    directory = Path(model) if local else _download(model, [])
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: holds no config.json")
    if _has_all(directory):
        checkpoint = Checkpoint(directory)
        return directory, Headers(str(directory), checkpoint.tensors, checkpoint.fingerprint)
    if not local:
        return directory, _headers_of_the_hub(model)
    if _is_pickled(directory):
        converted = _cached(directory)
        if not (converted / INDEX).exists():
            raise ModelError(f"{directory}: its weights are pickled, and have no headers to plan with; `run` converts them once")
        checkpoint = Checkpoint(converted)
        return converted, Headers(str(directory), checkpoint.tensors, checkpoint.fingerprint)
    return directory, Headers(str(directory), Checkpoint(directory).tensors)  # raises, and names what is not there


def local_tokenizer(name: str) -> Path:
    """The directory of a tokenizer's files; downloads no weights.

    Raises:
        ModelError: neither a directory nor a model of the hub, or the hub cannot be reached.
    """
    return Path(name) if _is_local(name) else _download(name, [])


def _is_local(name: str) -> bool:
    """Whether it is a directory here; else it is a hub id.

    Raises:
        ModelError: it is no directory, and cannot be a hub id.
    """
    if Path(name).is_dir():
        return True
    if name.count("/") > 1 or name.startswith((".", "/")) or Path(name.split("/")[0]).is_dir():
        raise ModelError(f"{name}: no such directory")
    return False


def _download(model: str, weights: list[str]) -> Path:
    """A hub's model: its small files, and those of the first pattern of `weights` that it has files of."""
    try:
        directory = Path(snapshot_download(model, allow_patterns=[*SMALL_FILES, *weights[:1]], ignore_patterns=NOT_WANTED))
        if weights and not any(directory.glob(weights[0])):
            directory = Path(snapshot_download(model, allow_patterns=[*SMALL_FILES, *weights[1:]], ignore_patterns=NOT_WANTED))
        return directory
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = _first_line(error)
        if isinstance(error, LocalEntryNotFoundError):  # raised once nobody has answered
            reason = f"the hub cannot be reached ({reason})"
        raise ModelError(f"{model}: neither a directory here nor a model that the hub gives: {reason}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _has_all(directory: Path) -> bool:
    """Whether every file that its index names, or the only one, is there: of a download the index may come alone."""
    if (directory / INDEX).exists():
        try:
            names = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return True  # Checkpoint says what is wrong with it
        return all((directory / name).exists() for name in names)
    return (directory / SINGLE).exists()


def _headers_of_the_hub(model: str) -> Headers:
    """The first bytes of each of its safetensors files."""
    try:
        found = get_safetensors_metadata(model)
    except NotASafetensorsRepoError:
        raise ModelError(f"{model}: the hub has no safetensors of it, and pickled weights have no headers to plan with") from None
    except Exception as error:  # where nobody answers, one of the HTTP library's, and which library that is changes
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(f"{model}: the hub does not give the headers of its weights: {reason}") from None
    tensors = {}
    for file, header in found.files_metadata.items():
        for name, info in header.tensors.items():
            if info.dtype not in DTYPES:
                raise ModelError(f"{model}: {file}: tensor {name} has dtype {info.dtype}, which is not served")
            tensors[name] = TensorInfo(Path(model) / file, tuple(info.shape), DTYPES[info.dtype])
    return Headers(model, tensors)


def _is_pickled(directory: Path) -> bool:
    return (directory / PICKLED).exists() or (directory / PICKLED_INDEX).exists()


def _cached(directory: Path) -> Path:
    """Where the safetensors of a directory of pickled weights go: a place in the user's cache, named by what it holds."""
    identity = repr([(s, (directory / s).stat().st_size, (directory / s).stat().st_mtime_ns) for s in _shards(directory)])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sida-moe"
    return cache / hashlib.sha256((str(directory.resolve()) + identity).encode()).hexdigest()[:16]


def _converted(directory: Path) -> Path:
    """A directory with the same model in safetensors, in the user's cache; made on the first call."""
    shards, target = _shards(directory), _cached(directory)
    if (target / INDEX).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    with bar("converting .bin", len(shards), unit="file") as shown:
        for shard in shards:
            tensors = _read_pickled(directory / shard)
            name = Path(shard).with_suffix(".safetensors").name
            beside = target / f".{name}.{os.getpid()}"
            save_file({key: value.clone().contiguous() for key, value in tensors.items()}, beside)  # clone: no shared storage
            os.replace(beside, target / name)
            weight_map |= dict.fromkeys(tensors, name)
            shown.update()
    for file in directory.iterdir():
        if file.suffix in (".json", ".model", ".txt") and file.name != PICKLED_INDEX:
            (target / file.name).write_bytes(file.read_bytes())
    beside = target / f".index.{os.getpid()}"
    beside.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.replace(beside, target / INDEX)  # last: its presence says that all is there
    return target


def _shards(directory: Path) -> list[str]:
    """The .bin files of a directory."""
    index = directory / PICKLED_INDEX
    if not index.exists():
        return [PICKLED]
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of shards ({error})") from None
    for shard in shards:
        if not (directory / shard).is_file():
            raise ModelError(f"{index}: names the shard {shard}, which is not there")
    return shards


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .bin file; whatever else is in it is not run.

    Raises:
        ModelError: damaged, or holds anything but named tensors.
    """
    try:
        # before torch 1.6 they were no zip archives, and only those can be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything; torch's own text tells how to run a malicious one
        raise ModelError(
            f"{file}: damaged, or holds more than tensors, which is not run ({type(error).__name__}); get the model as safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelError(f"{file}: holds something else than tensors by name; get the model as safetensors")
    return tensors
