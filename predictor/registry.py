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

from predictor import traces
from predictor.baselines import Oracle, Random
from predictor.errors import PredictorError
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import HashTable
from predictor.nobody import Nobody
from predictor.token_table import TokenTable
from predictor.tokens import RoutingShape, TokenBatch


class HashPredictor(Protocol):
    """What makes hash tables."""

    def predict(self, tokens: TokenBatch) -> HashTable:
        """The table of one batch; the same for the same batch."""


@dataclass(frozen=True)
class PredictorSpec:
    """All that is needed to make a predictor, except the model's embeddings.

    Attributes:
        identity: hash of the model's routers (`Arena.identity`): a predictor of another model is refused.
        top_k: experts per token and MoE layer in the tables.
    """

    kind: str
    path: Path | None
    top_k: int
    shape: RoutingShape
    identity: str
    seed: int = 0


Loader = Callable[[PredictorSpec, Callable[[], torch.Tensor]], HashPredictor]


def make(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
    """
    Args:
        embedding: gives the model's input embeddings, (vocab_size, embedding_dim); called only by predictors that need them.

    Raises:
        PredictorError: no such kind, or a file that is missing, damaged or made for another model.
    """
    if spec.kind not in KINDS:
        raise PredictorError(f"predictor.kind: there is no {spec.kind!r}; known: {', '.join(KINDS)}")
    return KINDS[spec.kind](spec, embedding)


def save_lstm(network: HashFunction, path: Path, shape: RoutingShape, identity: str, metrics: dict) -> None:
    """Weights are stored as float16, half the size; top-1 on the shipped one moves by less than 0.1 points."""
    tensors = {name: value.to(torch.float16).numpy() for name, value in network.state_dict().items()}
    _save(tensors, path, "lstm", shape, identity, metrics)


def save_token_table(table: TokenTable, path: Path, identity: str, metrics: dict) -> None:
    tensors = {}
    for layer in range(table.shape.layers):
        tensors[f"experts.{layer}"] = table.experts[layer]
        tensors[f"shares.{layer}"] = table.shares[layer]
        tensors[f"scale.{layer}"] = table.scale[layer]
    _save(tensors, path, "token_table", table.shape, identity, metrics)


def _save(tensors: dict[str, np.ndarray], path: Path, kind: str, shape: RoutingShape, identity: str, metrics: dict) -> None:
    metadata = {"kind": kind, "identity": identity, "shape": json.dumps(vars(shape)), "metrics": json.dumps(metrics)}
    traces.save_atomically(tensors, path, metadata)


def _load_lstm(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
    tensors, _ = traces.load_checked(_path(spec), "lstm", spec.identity)
    hidden, width = tensors["compress.0.weight"].shape
    network = HashFunction(spec.shape, width, hidden)
    network.load_state_dict({name: torch.from_numpy(value).float() for name, value in tensors.items()})
    return LSTMPredictor(network, spec.shape, embedding(), spec.top_k)


def _load_token_table(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
    tensors, _ = traces.load_checked(_path(spec), "token_table", spec.identity)
    layers = range(spec.shape.layers)
    experts, shares, scale = ([tensors[f"{name}.{layer}"] for layer in layers] for name in ("experts", "shares", "scale"))
    return TokenTable(spec.shape, experts, shares, scale, spec.top_k)


def _load_oracle(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
    return Oracle(traces.load(_path(spec), spec.shape, spec.identity), spec.shape, spec.top_k)


def _make_random(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
    return Random(spec.shape, spec.top_k, spec.seed)


def _make_nobody(spec: PredictorSpec, embedding: Callable[[], torch.Tensor]) -> HashPredictor:
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
    "oracle": _load_oracle,
    "random": _make_random,
    "none": _make_nobody,
}
