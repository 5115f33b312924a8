"""Predictors by the name in `predictor.kind`: how each is read from its file, and how the trained ones are written.

To add one: a class with `predict(TokenBatch) -> HashTable`, a loader below, a test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from predictor import stand_ins, traces
from predictor.baselines import Oracle, Random
from predictor.calibration import Calibration
from predictor.errors import PredictorError
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import HashTable, Width
from predictor.nobody import Nobody
from predictor.rehearsal import OnDevice, Rehearsal, Rehearse
from predictor.stand_ins import StandIns
from predictor.token_table import TokenTable
from predictor.tokens import RoutingShape, TokenBatch


class HashPredictor(Protocol):
    """What makes hash tables."""

    def predict(self, tokens: TokenBatch) -> HashTable:
        """The table of one batch; the same for the same batch."""


class Model(Protocol):
    """What a predictor may ask of the model that it predicts for. Handed in: nothing here knows models or memory."""

    def embedding(self) -> torch.Tensor:
        """A copy of the input embeddings, (vocab_size, embedding_dim)."""

    def rehearser(self, stand_ins: StandIns, device: str) -> Rehearse:
        """The model with stand-ins for its experts, on a device as torch writes it."""


@dataclass(frozen=True)
class PredictorSpec:
    """All that is needed to make a predictor, except the model.

    Attributes:
        path: the file that `train` wrote, or that of a rehearsal's stand-ins.
        identity: hash of the model's routers (`Arena.identity`): a predictor of another model is refused.
        top_k, mass, most: see `predictor.hash_table.Width`.
        device: where it computes, as torch writes it.
    """

    kind: str
    path: Path | None
    top_k: int
    shape: RoutingShape
    identity: str
    seed: int = 0
    mass: float | None = None
    most: int | None = None
    device: str = "cpu"

    @property
    def width(self) -> Width:
        return Width(self.top_k, self.mass, self.most)


Loader = Callable[[PredictorSpec, Model], HashPredictor]


def make(spec: PredictorSpec, model: Model) -> HashPredictor:
    """
    Raises:
        PredictorError: no such kind, or a file that is missing, damaged or made for another model.
    """
    if spec.kind not in KINDS:
        raise PredictorError(f"predictor.kind: there is no {spec.kind!r}; known: {', '.join(KINDS)}")
    return KINDS[spec.kind](spec, model)


def check(spec: PredictorSpec) -> None:
    """Looks at a predictor's file without its model.

    Raises:
        PredictorError: see `make`.
    """
    make(spec, _Nothing())


def calibration_of(spec: PredictorSpec) -> Calibration | None:
    """What was found on held-out rows when the predictor was trained; None: nobody has looked.

    Raises:
        PredictorError: see `make`.
    """
    if spec.kind not in TRAINED or spec.path is None:
        return None
    _, metadata = traces.load_checked(spec.path, FILE_KINDS.get(spec.kind, spec.kind), spec.identity)
    return Calibration.from_dict(json.loads(metadata["calibration"])) if "calibration" in metadata else None


class _Nothing:
    """Stands for a model of which nothing will be asked but to be there."""

    def embedding(self) -> torch.Tensor:
        return torch.empty(0)

    def rehearser(self, stand_ins: StandIns, device: str) -> Rehearse:
        return lambda tokens: []


def save_lstm(network: HashFunction, path: Path, shape: RoutingShape, identity: str, calibration: Calibration | None) -> None:
    """Weights are stored as float16, half the size; top-1 on the shipped one moves by less than 0.1 points."""
    tensors = {name: value.to(torch.float16).numpy() for name, value in network.state_dict().items()}
    _save(tensors, path, "lstm", shape, identity, calibration)


def save_token_table(table: TokenTable, path: Path, identity: str, calibration: Calibration | None) -> None:
    tensors = {}
    for layer in range(table.shape.layers):
        tensors[f"experts.{layer}"] = table.experts[layer]
        tensors[f"shares.{layer}"] = table.shares[layer]
        tensors[f"scale.{layer}"] = table.scale[layer]
    _save(tensors, path, "token_table", table.shape, identity, calibration)


def _save(
    tensors: dict[str, np.ndarray], path: Path, kind: str, shape: RoutingShape, identity: str, calibration: Calibration | None
) -> None:
    metadata = {"kind": kind, "identity": identity, "shape": json.dumps(vars(shape))}
    if calibration is not None:
        metadata["calibration"] = json.dumps(calibration.to_dict())
    traces.save_atomically(tensors, path, metadata)


def _load_lstm(spec: PredictorSpec, model: Model) -> HashPredictor:
    tensors, _ = traces.load_checked(_path(spec), "lstm", spec.identity)
    calibration = calibration_of(spec)
    hidden, width = tensors["compress.0.weight"].shape
    network = HashFunction(spec.shape, width, hidden)
    network.load_state_dict({name: torch.from_numpy(value).float() for name, value in tensors.items()})
    return LSTMPredictor(network, spec.shape, model.embedding(), spec.width, calibration, spec.device)


def _load_token_table(spec: PredictorSpec, model: Model) -> HashPredictor:
    tensors, _ = traces.load_checked(_path(spec), "token_table", spec.identity)
    layers = range(spec.shape.layers)
    experts, shares, scale = ([tensors[f"{name}.{layer}"] for layer in layers] for name in ("experts", "shares", "scale"))
    return TokenTable(spec.shape, experts, shares, scale, spec.width)


def _load_rehearsal(spec: PredictorSpec, model: Model) -> HashPredictor:
    made = stand_ins.load(_path(spec), spec.shape.layers, spec.identity)
    rehearse = model.rehearser(made, spec.device)
    name = rehearse.namer() if isinstance(rehearse, OnDevice) else None
    return Rehearsal(rehearse, made.calibration, spec.shape, spec.width, name)


def _load_oracle(spec: PredictorSpec, model: Model) -> HashPredictor:
    return Oracle(traces.load(_path(spec), spec.shape, spec.identity), spec.shape, spec.top_k)


def _make_random(spec: PredictorSpec, model: Model) -> HashPredictor:
    return Random(spec.shape, spec.top_k, spec.seed)


def _make_nobody(spec: PredictorSpec, model: Model) -> HashPredictor:
    return Nobody(spec.shape)


def _path(spec: PredictorSpec) -> Path:
    if spec.path is None:
        raise PredictorError(
            f"predictor.path: a predictor of kind {spec.kind} needs its file; make one with `python runner.py train CONFIG`"
        )
    return spec.path


KINDS: dict[str, Loader] = {
    "lstm": _load_lstm,
    "token_table": _load_token_table,
    "rehearsal": _load_rehearsal,
    "oracle": _load_oracle,
    "random": _make_random,
    "recent": _make_nobody,
    "none": _make_nobody,
}
TRAINED = ("lstm", "token_table", "rehearsal")
SILENT = ("recent", "none")
"""Those that make no tables."""
STEPPING = (*TRAINED, "recent")
"""Those with which something is said of each token that is written (stepping.py); `recent` says it of nothing else."""
BY_TOKEN = ("lstm", "token_table")
"""Of these the ones that are asked themselves (stepping.source_of); with the others it is said by what tokens were routed to."""
FILE_KINDS = {"rehearsal": "stand_ins"}
"""What a predictor's file calls itself, where that is not the predictor's own name."""
