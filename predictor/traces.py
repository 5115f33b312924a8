"""Traces: what the routers decided, for real tokens only, aligned with the token ids by construction.

The paper's code collects labels with forward hooks and flushes them inside the forward, which gives 5 of 6 layers the labels of
another batch. Here a trace is a return value: one forward returns its tokens and its routing together, and both lie
row after row in the same order.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from predictor.errors import PredictorError
from predictor.tokens import RoutingShape, TokenBatch

TOP_T = 30
"""Router probabilities kept per token: those that truncated distillation learns from (SiDA-MoE, section 3.3)."""


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's decisions.

    Attributes:
        top: int16 (tokens, T): the T most probable experts, best first; the router's own choice is the first top_k.
        probabilities: float16 (tokens, T): the router's softmax for them.
        weight: float16 (tokens,): the sum of the weights that the router gives its top_k experts, the scaling factor to learn.
    """

    top: np.ndarray
    probabilities: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Trace:
    """The routing of a batch, or of a data set after `join`."""

    tokens: TokenBatch
    layers: tuple[LayerTrace, ...]


def join(traces: list[Trace]) -> Trace:
    """One trace of all rows, in the order given."""
    first = traces[0]
    streams = tuple(tuple(row for trace in traces for row in trace.tokens.streams[s]) for s in range(len(first.tokens.streams)))
    fields = ("top", "probabilities", "weight")
    layers = tuple(
        LayerTrace(*(np.concatenate([getattr(trace.layers[i], name) for trace in traces]) for name in fields))
        for i in range(len(first.layers))
    )
    return Trace(TokenBatch(streams), layers)


def select(trace: Trace, rows: np.ndarray, shape: RoutingShape) -> Trace:
    """The trace of some rows, int64 (rows,), in that order."""
    streams = tuple(tuple(all_rows[i] for i in rows) for all_rows in trace.tokens.streams)
    picks = []
    for lengths in trace.tokens.lengths:
        ends = np.cumsum(lengths)
        picks.append(np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in rows]))
    layers = tuple(
        LayerTrace(layer.top[pick], layer.probabilities[pick], layer.weight[pick])
        for layer, pick in ((layer, picks[stream]) for layer, stream in zip(trace.layers, shape.streams, strict=True))
    )
    return Trace(TokenBatch(streams), layers)


def save(trace: Trace, path: Path, shape: RoutingShape, identity: str) -> None:
    """Writes a trace as safetensors, beside the path and then renamed."""
    tensors = {}
    for s, lengths in enumerate(trace.tokens.lengths):
        tensors[f"lengths.{s}"] = lengths
        tensors[f"ids.{s}"] = trace.tokens.flat(s).astype(np.int32)
    for i, layer in enumerate(trace.layers):
        tensors |= {f"top.{i}": layer.top, f"probabilities.{i}": layer.probabilities, f"weight.{i}": layer.weight}
    metadata = {"kind": "trace", "identity": identity, "shape": json.dumps(vars(shape))}
    save_atomically(tensors, path, metadata)


def load(path: Path, shape: RoutingShape, identity: str | None) -> Trace:
    """Reads a trace of this very model.

    Args:
        identity: of the model's routers; None: a model whose weights were not read, only its shape is compared.

    Raises:
        PredictorError: no such file, damaged, or recorded from another model.
    """
    tensors, metadata = load_checked(path, "trace", identity)
    theirs, ours = json.loads(metadata["shape"]), json.loads(json.dumps(vars(shape)))
    if theirs != ours:
        key = next(key for key in ours if theirs.get(key) != ours[key])
        raise PredictorError(
            f"{path}: recorded from another model: its {key} is {theirs.get(key)}, this model's is {ours[key]}; "
            "record one with `python runner.py train CONFIG predictor.kind=oracle predictor.path=FILE`"
        )
    streams = []
    for s in range(1 + max(shape.streams)):
        ends = np.cumsum(tensors[f"lengths.{s}"])[:-1]
        streams.append(tuple(np.split(tensors[f"ids.{s}"].astype(np.int64), ends)))
    layers = tuple(
        LayerTrace(tensors[f"top.{i}"], tensors[f"probabilities.{i}"], tensors[f"weight.{i}"]) for i in range(shape.layers)
    )
    return Trace(TokenBatch(tuple(streams)), layers)


def save_atomically(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Safetensors, written beside the path and renamed: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def is_own(path: Path) -> bool:
    """Whether a file that is there is one that `save_atomically` wrote, be it a trace or a predictor's."""
    try:
        with safe_open(path, "np") as f:
            return "kind" in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_checked(path: Path, kind: str, identity: str | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file that `save_atomically` wrote.

    Args:
        identity: None: not compared.

    Raises:
        PredictorError: no such file, damaged, of another kind, or of a model with other routers.
    """
    if not path.is_file():
        raise PredictorError(f"{path}: no such file; make it with `python runner.py train CONFIG`")
    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
            _check_kind(path, metadata.get("kind"), kind)  # before a tensor is read: a model's bfloat16 is nothing to numpy
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (a safe_open is not a dict)
    except SafetensorError as error:
        raise PredictorError(f"{path}: truncated or not a safetensors file ({error})") from None
    if identity is not None and metadata.get("identity") != identity:
        raise PredictorError(
            f"{path}: made for another model (its routers are {metadata.get('identity')}, this model's are {identity}); "
            "train one for this model with `python runner.py train CONFIG`"
        )
    return tensors, metadata


def _check_kind(path: Path, found: str | None, wanted: str) -> None:
    if found is None:
        what, instead = (
            ("trace", "") if wanted == "trace" else ("predictor's file", ", or none: predictor.kind=rehearsal predictor.path=null")
        )
        raise PredictorError(
            f"{path}: not a {what}: `python runner.py train CONFIG` did not write it; name one that it wrote{instead}"
        )
    if found != wanted:
        raise PredictorError(f"{path}: holds a {found}, the config asks for a {wanted}; set predictor.kind or predictor.path")


def file_kind(path: Path) -> str | None:
    """What a file of `save_atomically` says that it is; None: there is no such file, or it does not say."""
    return _metadata(path).get("kind")


def identity_of(path: Path) -> str | None:
    """The identity of the routers that such a file was made for; None as in `file_kind`."""
    return _metadata(path).get("identity")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="np") as f:
            return f.metadata() or {}
    except (OSError, SafetensorError):
        return {}
