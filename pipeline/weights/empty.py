"""A transformers model that has shapes and no values, and how it gets them: weights from an arena, buffers from its own code."""

from __future__ import annotations

import copy
import threading

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions, meta_device_safe_creation_ops
from transformers.modeling_utils import local_torch_dtype

from pipeline.errors import ModelError
from pipeline.tasks.classifier import SwitchTransformersForSequenceClassification

OWN_ARCHITECTURES: dict[str, type[PreTrainedModel]] = {
    "SwitchTransformersForSequenceClassification": SwitchTransformersForSequenceClassification
}

_ALONE = threading.RLock()
"""What a model is made under holds for the whole process: torch's default dtype, functions that transformers replaces meanwhile."""


def on_meta(config: transformers.PretrainedConfig, architecture: str, file: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers, or one of ours, on the meta device, each parameter of the dtype that it has when loaded as `dtype`.

    Args:
        file: the config's, for messages.

    Raises:
        ModelError: no architecture of that name and of the config's family, or sizes that do not fit each other.
    """
    cls = OWN_ARCHITECTURES.get(architecture) or getattr(transformers, architecture, None)
    if cls is None or getattr(cls, "config_class", None) is not type(config):
        raise ModelError(f"{file}: architectures names {architecture!r}, which is no {config.model_type} of transformers")
    with _ALONE, local_torch_dtype(dtype, cls.__name__), torch.device("meta"), meta_device_safe_creation_ops():
        try:
            model: PreTrainedModel = cls(copy.deepcopy(config))
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, IndexError) as error:
            raise ModelError(f"{file}: {architecture} cannot be made of it: {' '.join(str(error).split())}") from None
    return model


def kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The floating-point tensors of a model's state that stay of another dtype than `dtype`, as transformers loads them."""
    plan = model._get_dtype_plan(dtype)
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            planned = next((plan[part] for part in plan if part in name), tensor.dtype)
            if planned != dtype:
                kept[name] = planned
    return kept


def assign(model: PreTrainedModel, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Gives a model from `on_meta` its values, by the model's own names, as they are; and puts it into eval mode.

    Args:
        device: where buffers go that no checkpoint has, such as rotary frequencies.
    """
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    untied = {name: tensor for name, tensor in weights.items() if name in model.all_tied_weights_keys}
    model.load_state_dict(untied, strict=False, assign=True)  # tied by the config, stored with values of their own
    with _ALONE:
        _make_buffers(model, device)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"{left[0]} has no value: describe() should have refused the checkpoint"
    model.eval().requires_grad_(False)


@torch.no_grad()
@guard_torch_init_functions()
def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that are not stored get their values where transformers gives them: in the `_init_weights` of the nearest model."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # so that nothing of it is made anew

    def visit(module: nn.Module, nearest: PreTrainedModel) -> None:
        nearest = module if isinstance(module, PreTrainedModel) else nearest
        for child in module.children():
            visit(child, nearest)
        empty = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if empty:
            nearest._init_weights(module)
        for name in empty:  # made on the CPU wherever they go: another device's powers differ in their last bits
            module._buffers[name] = module.get_buffer(name).to(device)

    visit(model, model)
