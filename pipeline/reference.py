"""A model's weights by name, for those who want the same model in plain transformers without an arena."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.models import ModelSpec
from store.layout import torch_dtype


def named_tensors(spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by the model's own name, one after the other, in the dtype and with the numbers that the model's arena has.

    A tensor that the config ties to another is left out.

    Raises:
        CheckpointError: one cannot be read.
    """
    weights, placement = spec.source.open(), spec.placement
    experts = {name: name for layer in placement.experts for expert in layer for name in expert.values()}
    for name, stored in (placement.backbone | experts).items():
        info = weights.info(stored)
        tensor = torch.empty(info.shape, dtype=torch_dtype(spec.dtype) if info.dtype.is_floating_point else info.dtype)
        weights.read_into(stored, tensor)
        yield name, tensor
