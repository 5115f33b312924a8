"""Whole transformers models beside an arena: what this project is compared with, on the same weights.

A model's parameters are strided views of the arena, or of one copy of it on the device: several systems fit one machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.batch_result import BatchStats
from pipeline.data import Batch
from pipeline.families.door import stacked
from pipeline.models import ModelSpec
from pipeline.tasks.registry import Task
from pipeline.weights.empty import assign, on_meta
from store.layout import ArenaLayout, torch_dtype


@dataclass
class Pass:
    """One time through the batches.

    Attributes:
        outputs: per batch the task's, (batch, ...).
        batch_ms: per batch, from the answer before, or from the beginning, to its own.
        stats: of this project's own systems.
    """

    seconds: float
    outputs: list[np.ndarray]
    batch_ms: list[float]
    stats: list[BatchStats] = field(default_factory=list)


def numbers(results: list[dict]) -> np.ndarray:
    """What can be compared in results: scores or log probabilities, (batch, ...)."""
    return np.array([row.get("scores", row.get("logprob")) for row in results], dtype=np.float64)


def whole_model(
    spec: ModelSpec, layout: ArenaLayout, memory: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model as transformers has it.

    Args:
        memory: an arena's data, uint8 (layout.nbytes,), wherever it lies; views of it become the parameters.
        device: where they go if they are not there.
        dtype: another one, which takes a copy.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    weights = {part.name: moved(part.view(memory)) for part in layout.backbone}
    model = on_meta(spec.pretrained_config(), spec.architecture, str(spec.source), torch_dtype(spec.dtype))
    in_one, known = stacked(model), model.state_dict().keys()
    for layer, experts in zip(layout.layers, spec.placement.experts, strict=True):
        for part in layer.block.parts:
            name = experts[0][part.name].removesuffix("[0]")
            if name in in_one:  # a 3-D parameter: every expert's part, a block apart
                first = part.view(memory[layer.offset : layer.offset + layer.block.nbytes])
                strides = (layer.block.nbytes // first.itemsize, *first.stride())
                weights[name] = moved(first.as_strided((layer.experts, *first.shape), strides))
        for expert, names in enumerate(experts):
            start = layer.expert_offset(expert)
            views = layer.block.views(memory[start : start + layer.block.nbytes])
            weights |= {names[part]: moved(view) for part, view in views.items() if names[part] in known}
    assign(model, weights, device)
    return model


class Transformers:
    """transformers' own forward, batch after batch."""

    def __init__(self, model: PreTrainedModel, task: Task, device: torch.device):
        """
        Args:
            device: where inputs go; the weights may be elsewhere, if something moves them when they are needed.
        """
        self._model, self._task, self._device = model, task, device

    @torch.inference_mode()
    def run(self, batches: list[Batch]) -> Pass:
        outputs, times = [], []
        start = time.perf_counter()
        for batch in batches:
            began = time.perf_counter()
            inputs = self._task.inputs(batch, lambda longest: longest)
            result = self._task.forward(self._model, {name: tensor.to(self._device) for name, tensor in inputs.items()})
            outputs.append(result.float().cpu().numpy())
            times.append((time.perf_counter() - began) * 1e3)
        return Pass(time.perf_counter() - start, outputs, times)

    def close(self) -> None:
        del self._model
