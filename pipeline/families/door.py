"""The one door of transformers: families that hand their experts' work to a registered function, and what stands behind it here.

transformers decorates their experts' class with `use_experts_implementation`, which sets flags (gate or none, bias, transposed,
post-norm) and routes each call through `ALL_EXPERTS_FUNCTIONS`. Weights are 3-D, (experts, ...); here each expert's slice is a part
of its block, and the module keeps only what is not an expert's. What a gate computes, the class itself says (`_apply_gate`).

A family that needs a quirk gets it in this file; there is none so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from pipeline.errors import ModelError
from pipeline.expert_shape import ExpertShape
from pipeline.routing import Experts, MakeExperts, MoELayer, Routing
from predictor.tokens import ENCODER
from store.layout import LayerLayout, torch_dtype

NAME = "sida"
"""Under which the function is registered."""
SERVED = "_sida_experts"
"""The attribute of an experts module that says who computes for it."""
HEARD = "_sida_scores"
"""And the one that hears its router."""
TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "topk", "top_k_experts")
"""How modules and configs call the number of experts per token."""
ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUActivation": "gelu", "GELU": "gelu",
    "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
}  # fmt: skip
"""Classes of transformers that kernels compute as well, by their name there."""


def _experts_forward(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers calls in place of an experts module's forward.

    Args:
        hidden: (tokens, d_model).
        index, weights: (tokens, top_k).
    """
    experts: Experts = getattr(module, SERVED)
    flat = hidden.reshape(-1, hidden.shape[-1])
    index, weights = index.reshape(len(flat), -1), weights.reshape(len(flat), -1)
    scores = getattr(module, HEARD).take(len(flat))
    return experts(flat, lambda: Routing(index, weights, index, scores)).reshape(hidden.shape)


class RouterScores:
    """What a layer's router said of all experts, heard beside the door: traces want more than the few that were chosen."""

    def __init__(self, experts: int):
        self._experts = experts
        self._scores: torch.Tensor | None = None

    def hear(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: the first of the outputs that has a score for each expert."""
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (self._experts,):
                self._scores = value.reshape(-1, self._experts)
                return

    def take(self, tokens: int) -> torch.Tensor | None:
        """(tokens, experts), if there is one for each; once."""
        scores, self._scores = self._scores, None
        return scores if scores is not None and len(scores) == tokens else None


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)


class Door:
    """See `pipeline.families.adapters.Kind`."""

    def find(self, model: PreTrainedModel, name: str, module: nn.Module) -> MoELayer | None:
        if not hasattr(module, "_is_expert_parallel") or not hasattr(module, "has_gate"):
            return None
        if any(f"{name}.{part}" in model.all_tied_weights_keys for part in _parts(module)):
            raise ModelError(f"{model.name_or_path}: two stacks of {type(model).__name__} share their experts, which is not served")
        shapes = {part: tuple(tensor.shape[1:]) for part, tensor in _parts(module).items()}
        count = next(iter(_parts(module).values())).shape[0]
        experts = tuple({part: f"{name}.{part}[{e}]" for part in shapes} for e in range(count))
        return MoELayer(name, experts, shapes, ENCODER, _top_k(model, name), name.rpartition(".")[0])

    def serve(self, model: PreTrainedModel, layer: MoELayer, make: MakeExperts, number: int) -> None:
        module: Any = model.get_submodule(layer.name)
        for part in layer.shapes:
            setattr(module, part, None)
        scores = RouterScores(len(layer.experts))
        setattr(module, HEARD, scores)
        for beside in model.get_submodule(layer.router).children():
            if beside is not module and any(p.shape[:1] == (len(layer.experts),) for p in beside.parameters()):
                beside.register_forward_hook(scores.hear)
        setattr(module, SERVED, make(number, layer.stream, DoorExpert(module)))
        if module.config._experts_implementation != NAME:
            module.config._experts_implementation = NAME


class DoorExpert:
    """One expert of a family behind the door (pipeline.routing.Expert), computed as transformers' grouped matmul does it."""

    def __init__(self, module: Any):
        self._module = module
        self._up = "gate_up_proj" if module.has_gate else "up_proj"

    def __call__(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        module = self._module
        inner = self._linear(weights, self._up, tokens.to(weights[self._up].dtype))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = self._linear(weights, "down_proj", inner.to(weights["down_proj"].dtype))
        return module.post_expert_norm(output) if module.has_post_expert_norm else output

    def _linear(self, weights: dict[str, torch.Tensor], part: str, rows: torch.Tensor) -> torch.Tensor:
        weight = weights[part]
        return nn.functional.linear(rows, weight.T if self._module.is_transposed else weight, weights.get(f"{part}_bias"))

    def shape(self, layout: LayerLayout) -> ExpertShape:
        module = self._module
        if module.has_post_expert_norm:
            raise ModelError(f"{type(module).__name__}: no GPU kernel has its norm after each expert; write `device: cpu`")
        parts = {part.name: part for part in layout.block.parts}
        down = parts["down_proj"]
        d_ff, d_model = down.shape if module.is_transposed else reversed(down.shape)
        if not module.has_gate:
            activation = ACTIVATIONS.get(type(module.act_fn).__name__, module.act_fn)
        elif type(module)._apply_gate is _default_apply_gate:
            activation = ACTIVATIONS.get(type(module.act_fn).__name__, module._apply_gate)
        else:
            activation = module._apply_gate
        bias = parts.get(f"{self._up}_bias"), parts.get("down_proj_bias")
        return ExpertShape(
            layout.experts,
            d_model,
            d_ff,
            torch_dtype(down.dtype),
            up=parts[self._up].offset,
            down=down.offset,
            up_bias=bias[0].offset if bias[0] else None,
            down_bias=bias[1].offset if bias[1] else None,
            gated=module.has_gate,
            transposed=module.is_transposed,
            activation=activation,
        )


def stacked(model: PreTrainedModel) -> dict[str, int]:
    """The 3-D parameters of all modules behind the door: name -> number of experts."""
    names: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate"):
            names |= {f"{name}.{part}": tensor.shape[0] for part, tensor in _parts(module).items()}
    return names


def _parts(module: Any) -> dict[str, torch.Tensor]:
    """An experts module's own tensors that have a slice per expert."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, f"{up}_bias", "down_proj", "down_proj_bias"]
    return {name: tensor for name in names if (tensor := getattr(module, name, None)) is not None}


def _top_k(model: PreTrainedModel, name: str) -> int:
    """Asked of the modules beside the experts, then of the config."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for holder in (*parent.children(), parent, model.get_submodule(name).config, model.config.get_text_config()):
        for key in TOP_K:
            value = getattr(holder, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise ModelError(f"{type(model).__name__}: neither {name}'s neighbours nor the config say how many experts a token gets")
