"""A model's weights by name, for those who want the same model in plain transformers without an arena."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.models import ModelSpec
from store.layout import torch_dtype


def named_tensors(spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by the model's own name, one after the other, in the dtype and with the numbers that the model's arena has.

    A tensor that the config ties to another is left out. A layer's experts that transformers has in one tensor come in one.

    Raises:
        CheckpointError: one cannot be read.
    """
    weights, placement = spec.source.open(), spec.placement

    def empty(stored: str, dtype: str, *experts: int) -> torch.Tensor:
        info = weights.info(stored)
        return torch.empty(*experts, *info.shape, dtype=torch_dtype(dtype) if info.dtype.is_floating_point else info.dtype)

    for name, stored in placement.backbone.items():
        tensor = empty(stored, placement.kept.get(name, spec.dtype))
        weights.read_into(stored, tensor)
        yield name, tensor
    for layer in placement.experts:
        for part, first in layer[0].items():
            if first.endswith("[0]"):
                tensor = empty(first, spec.dtype, len(layer))
                for expert, names in zip(tensor, layer, strict=True):
                    weights.read_into(names[part], expert)
                yield first.removesuffix("[0]"), tensor
                continue
            for names in layer:
                tensor = empty(names[part], spec.dtype)
                weights.read_into(names[part], tensor)
                yield names[part], tensor
