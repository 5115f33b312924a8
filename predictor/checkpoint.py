"""Where a training stands after an epoch, on disk: a killed one is taken up there, and nobody reads half of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from predictor import traces
from predictor.errors import PredictorError

Parameters = dict[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Epoch:
    """What came of an epoch.

    Attributes:
        loss: the mean of its steps.
        top1, top3: on the rows that choose the epoch, over all MoE layers.
    """

    loss: float
    top1: float
    top3: float


@dataclass(frozen=True)
class State:
    """What a training goes on from, beside parameters and optimizer.

    Attributes:
        history: of the epochs so far.
        best: the parameters after the best of them.
    """

    history: list[Epoch]
    best: dict[str, torch.Tensor]


class Checkpoint:
    """The file of one training."""

    def __init__(self, path: Path, identity: str):
        """
        Args:
            identity: of model, data and settings; the state of another training is not taken up.
        """
        self._path, self._identity = path, identity

    def save(self, state: State, parameters: Parameters, optimizer: torch.optim.AdamW) -> None:
        tensors: dict[str, np.ndarray] = {}
        for name, parameter in parameters.items():
            moments = optimizer.state[parameter]
            kept = {"now": parameter, "best": state.best[name], "first": moments["exp_avg"], "second": moments["exp_avg_sq"]}
            tensors |= {f"{what}.{name}": tensor.detach().cpu().numpy() for what, tensor in kept.items()}
        steps = int(optimizer.state[next(iter(parameters.values()))]["step"])
        history = json.dumps([asdict(epoch) for epoch in state.history])
        traces.save_atomically(
            tensors, self._path, {"kind": "training", "identity": self._identity, "history": history, "steps": str(steps)}
        )

    def load(self, parameters: Parameters, optimizer: torch.optim.AdamW) -> State | None:
        """Puts parameters and optimizer where they were; None, and nothing changed: there is no such training to take up."""
        try:
            tensors, metadata = traces.load_checked(self._path, "training", self._identity)
        except PredictorError:
            return None  # another's, or none: a new training overwrites it
        kept = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[f"now.{name}"])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(metadata["steps"])),
                    "exp_avg": kept[f"first.{name}"].to(parameter.device),
                    "exp_avg_sq": kept[f"second.{name}"].to(parameter.device),
                }
        best = {name: kept[f"best.{name}"].to(parameter.device) for name, parameter in parameters.items()}
        return State([Epoch(**epoch) for epoch in json.loads(metadata["history"])], best)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
