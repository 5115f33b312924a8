"""Distilling stand-ins on a trace: factors, or quantised rows' steps, learn to make the routers after them say what they said.

A truncated SVD keeps an expert's matrices near for any input. What a rehearsal needs is less: that on inputs that occur the next
routers choose alike. So the whole rehearsal is trained, backbone and routers held still, and no label is needed but the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from predictor.matrices import FLOAT, Matrices
from predictor.registry import HashPredictor
from predictor.settings import TrainSettings
from predictor.stand_ins import StandIns, again
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import Trace
from predictor.training import order_loss

Route = Callable[[TokenBatch], list[torch.Tensor]]
"""A rehearsal with gradients: per MoE layer the router's logits of real tokens, (tokens, experts)."""


class Distillation:
    """Stand-ins in training (`predictor.training.Learner`)."""

    def __init__(
        self,
        stand_ins: StandIns,
        rehearser: Callable[[StandIns], tuple[Route, HashPredictor]],
        shape: RoutingShape,
        settings: TrainSettings,
    ):
        """
        Args:
            stand_ins: some, on the device that they are trained on.
            rehearser: a rehearsal that reads the very stand-ins it is given, for training and as a predictor.
        """
        self._names: dict[str, torch.nn.Parameter] = {}
        layers = []
        for number, parts in enumerate(stand_ins.layers):
            layer: dict[str, Matrices] = {}
            for part, matrices in parts.items():
                tensors = dict(matrices.tensors)
                for name in [name for name, tensor in tensors.items() if tensor.is_floating_point()]:
                    learned = torch.nn.Parameter(tensors[name].float())
                    self._names[f"{number}.{part}.{name}"] = tensors[name] = learned
                layer[part] = again(stand_ins.method, tensors)
            layers.append(layer)
        self._shape, self._settings = shape, settings
        self._training = replace(stand_ins, layers=tuple(layers))
        self._route, self._predictor = rehearser(self._training)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._names

    def loss(self, batch: Trace) -> torch.Tensor:
        """The sum over the MoE layers that have stand-ins before them: the others can learn nothing."""
        losses = [
            order_loss(logits.float(), truth, self._settings)
            for logits, truth in zip(self._route(batch.tokens), batch.layers, strict=True)
            if logits.requires_grad
        ]
        return torch.stack(losses).sum()

    def predictor(self) -> HashPredictor:
        return self._predictor

    def stand_ins(self) -> StandIns:
        """As they are now, in the dtype that they are stored in."""
        layers = []
        for parts in self._training.layers:
            layers.append({part: again(self._training.method, _stored(m.tensors)) for part, m in parts.items()})
        return replace(self._training, layers=tuple(layers))


def _stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to(FLOAT) if t.is_floating_point() else t for name, t in tensors.items()}
