"""Stand-ins: a small approximation of every expert, under a budget in bytes, for a rehearsal to run instead.

None is made for the last MoE layer: no router comes after it that its experts could mislead.

A file of them is safetensors, `LAYER.PART.TENSOR`, and says in its metadata whose they are, how they were made, and, once `train`
has judged them, how sure a rehearsal with them may be (`predictor.calibration`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from predictor import traces
from predictor.calibration import Calibration
from predictor.errors import PredictorError
from predictor.matrices import FLOAT, LowRank, Matrices, Quantised, Whole

BITS = {"2bit": 2, "4bit": 4}
METHODS = ("none", "svd", *BITS)
"""`predictor.stand_ins.kind`."""
AT_ONCE = 32
"""Experts whose stand-ins are made together: on a device, what that takes there beside all else is bounded."""
Shapes = Mapping[str, tuple[int, ...]]
"""By the name of a part, the shape of one expert's tensor."""


@dataclass(frozen=True)
class StandIns:
    """Of one model.

    Attributes:
        layers: per MoE layer by the name of a part; a layer without any has no stand-ins, and its experts add nothing.
        calibration: None: nobody has judged them yet.
    """

    method: str
    layers: tuple[dict[str, Matrices], ...]
    calibration: Calibration | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.itemsize for parts in self.layers for m in parts.values() for t in m.tensors.values())

    @property
    def rank(self) -> int | None:
        """Of all matrices; None: these are not of low rank."""
        ranks = [m.tensors["up"].shape[2] for parts in self.layers for m in parts.values() if isinstance(m, LowRank)]
        return max(ranks, default=None)

    def to(self, device: torch.device) -> StandIns:
        """The same there."""
        layers = []
        for parts in self.layers:
            moved = {part: {name: t.to(device) for name, t in m.tensors.items()} for part, m in parts.items()}
            layers.append({part: again(self.method, tensors) for part, tensors in moved.items()})
        return StandIns(self.method, tuple(layers), self.calibration)


@dataclass(frozen=True)
class Plan:
    """What there is to make, before any weight is read.

    Attributes:
        size: rank, or bits.
    """

    method: str
    size: int
    nbytes: int


def plan(method: str, budget_bytes: int, experts: tuple[int, ...], shapes: list[Shapes]) -> Plan:
    """The best stand-ins that a budget allows; all of a model's matrices get the same rank.

    Args:
        experts, shapes: of every MoE layer.

    Raises:
        PredictorError: the budget is too small for any, or rows do not come to whole bytes.
    """
    matrices = [(n, s) for n, layer in list(zip(experts, shapes, strict=True))[:-1] for s in layer.values()]
    small = sum(n * s[0] * FLOAT.itemsize for n, s in matrices if len(s) == 1)
    large = [(n, (s[0], s[1])) for n, s in matrices if len(s) == 2]
    if method == "none" or not matrices:
        return Plan(method, 0, 0)
    if method == "svd":
        rank = (budget_bytes - small) // sum(LowRank.nbytes(s, n, 1) for n, s in large)
        rank, least = min(rank, max(min(s) for _, s in large)), 1
        nbytes = small + sum(LowRank.nbytes(s, n, max(rank, least)) for n, s in large)
    else:
        rank = least = BITS[method]
        odd = next((s[1] for _, s in large if s[1] * rank % 8), None)
        if odd is not None:
            raise PredictorError(
                f"predictor.stand_ins.kind: {method} packs rows into bytes, and one of {odd} does not fit; write svd"
            )
        nbytes = small + sum(Quantised.nbytes(s, n, rank) for n, s in large)
    if rank < least or nbytes > budget_bytes:
        hint = "raise it" if method == "svd" else "raise it, or write predictor.stand_ins.kind=svd, which takes what there is"
        raise PredictorError(f"predictor.stand_ins.budget: {method} needs {nbytes} bytes, the budget is {budget_bytes}; {hint}")
    return Plan(method, rank, nbytes)


def make(
    wanted: Plan,
    experts: tuple[int, ...],
    shapes: list[Shapes],
    read: Callable[[int, str, slice], torch.Tensor],
    progress: Callable[[], object] = lambda: None,
) -> StandIns:
    """
    Args:
        experts, shapes: of every MoE layer.
        read: gives one part of some experts of a MoE layer, (experts, *shape), where stand-ins are to be computed.
        progress: called after each part.
    """
    layers: list[dict[str, Matrices]] = []
    for layer, parts in enumerate(shapes):
        made: dict[str, Matrices] = {}
        if wanted.method != "none" and layer < len(shapes) - 1:
            for part, shape in parts.items():
                some = [_one(wanted, read(layer, part, slice(at, at + AT_ONCE)), shape) for at in range(0, experts[layer], AT_ONCE)]
                whole = {name: torch.cat([one.tensors[name].cpu() for one in some]) for name in some[0].tensors}
                made[part] = again(wanted.method, whole)
                progress()
        layers.append(made)
    return StandIns(wanted.method, tuple(layers))


def _one(wanted: Plan, whole: torch.Tensor, shape: tuple[int, ...]) -> Matrices:
    if len(shape) == 1:
        return Whole.make(whole)
    return LowRank.make(whole, wanted.size) if wanted.method == "svd" else Quantised.make(whole, wanted.size)


def save(stand_ins: StandIns, path: Path, identity: str) -> None:
    """
    Args:
        identity: whose experts these stand for; a reader with another is refused.
    """
    tensors = {
        f"{layer}.{part}.{name}": tensor.cpu().numpy()
        for layer, parts in enumerate(stand_ins.layers)
        for part, matrices in parts.items()
        for name, tensor in matrices.tensors.items()
    }
    metadata = {"kind": "stand_ins", "identity": identity, "method": stand_ins.method, "layers": str(len(stand_ins.layers))}
    if stand_ins.calibration is not None:
        metadata["calibration"] = json.dumps(stand_ins.calibration.to_dict())
    traces.save_atomically(tensors, path, metadata)


def load(path: Path, layers: int, identity: str) -> StandIns:
    """
    Raises:
        PredictorError: no such file, damaged, or made from another model.
    """
    tensors, metadata = traces.load_checked(path, "stand_ins", identity)
    if metadata["layers"] != str(layers):
        raise PredictorError(f"{path}: stand-ins for {metadata['layers']} MoE layers, the model has {layers}; make new ones")
    found: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(layers)]
    for key, tensor in tensors.items():
        layer, rest = key.split(".", 1)
        part, name = rest.rsplit(".", 1)
        found[int(layer)].setdefault(part, {})[name] = torch.from_numpy(tensor)
    calibration = Calibration.from_dict(json.loads(metadata["calibration"])) if "calibration" in metadata else None
    method = metadata["method"]
    made = tuple({part: again(method, named) for part, named in parts.items()} for parts in found)
    return StandIns(method, made, calibration)


def again(method: str, tensors: dict[str, torch.Tensor]) -> Matrices:
    """From what was stored."""
    if "whole" in tensors:
        return Whole(tensors)
    return LowRank(tensors) if method == "svd" else Quantised(tensors, BITS[method])
