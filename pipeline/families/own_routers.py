"""The two families with one module per expert, Switch Transformers and NLLB-MoE: a small adapter each.

Their MoE module is replaced by `RoutedMoE`, which keeps its router. Both routers have a capacity, so that which tokens are dropped
depends on the batch: the model's own router is asked, always on the whole padded batch.

NLLB-MoE: the experts' forward of transformers 5.23 takes the router's mask, zeros and ones, for the numbers of experts, so that
only experts 0 and 1 are ever used. Here a token goes to the experts that its router chose, as in transformers 4 and in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from pipeline.errors import ModelError
from pipeline.expert_shape import ExpertShape
from pipeline.routing import Experts, MakeExperts, MoELayer, Routing
from predictor.tokens import DECODER, ENCODER
from store.layout import LayerLayout, torch_dtype

Route = Callable[..., Routing]
"""From a router, hidden states (batch, tokens, d_model) and what else the model passes to its MoE module."""


class RoutedMoE(nn.Module):
    """A MoE layer whose router is the model's own, and whose experts are elsewhere."""

    def __init__(self, router: nn.Module, route: Route, experts: Experts):
        super().__init__()
        self.router = router
        self._route, self._experts = route, experts

    def forward(self, hidden: torch.Tensor, *more: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, d_model) -> the same; zero for padding and for tokens that the router drops."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._experts(flat, lambda: self._route(self.router, hidden, *more)).reshape(hidden.shape)


class TwoLinears:
    """An ungated expert with ReLU (pipeline.routing.Expert)."""

    def __init__(self, up: str, down: str):
        """
        Args:
            up, down: the parts' names; `up.bias` and `down.bias` are looked for as well.
        """
        self._up, self._down = up, down

    def __call__(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(tokens, weights[self._up], weights.get(f"{self._up}.bias")).relu()
        return nn.functional.linear(inner, weights[self._down], weights.get(f"{self._down}.bias"))

    def shape(self, layout: LayerLayout) -> ExpertShape:
        parts = {part.name: part for part in layout.block.parts}
        up, down = parts[self._up], parts[self._down]
        bias = parts.get(f"{self._up}.bias"), parts.get(f"{self._down}.bias")
        return ExpertShape(
            layout.experts,
            up.shape[1],
            up.shape[0],
            torch_dtype(up.dtype),
            up=up.offset,
            down=down.offset,
            up_bias=bias[0].offset if bias[0] else None,
            down_bias=bias[1].offset if bias[1] else None,
        )


class Switch:
    """Switch Transformers: top-1 router with a capacity per sequence; experts without bias (pipeline.families.adapters.Kind)."""

    def find(self, model: PreTrainedModel, name: str, module: nn.Module) -> MoELayer | None:
        if not isinstance(module, SwitchTransformersSparseMLP):
            return None
        if model.config.dense_act_fn != "relu":
            raise _other_activation(model, "dense_act_fn", model.config.dense_act_fn)
        return _layer(model, name, r"experts\.expert_(\d+)\.((?:wi|wo))\.weight", top_k=1)

    def serve(self, model: PreTrainedModel, layer: MoELayer, make: MakeExperts, number: int) -> None:
        experts = make(number, layer.stream, TwoLinears("wi", "wo"))
        model.set_submodule(layer.name, RoutedMoE(model.get_submodule(layer.router), route_switch, experts))


class NLLB:
    """NLLB-MoE: top-2 router with a capacity per batch; experts with bias (pipeline.families.adapters.Kind)."""

    def find(self, model: PreTrainedModel, name: str, module: nn.Module) -> MoELayer | None:
        if not isinstance(module, NllbMoeSparseMLP):
            return None
        if model.config.activation_function != "relu":
            raise _other_activation(model, "activation_function", model.config.activation_function)
        return _layer(model, name, r"experts\.expert_(\d+)\.(fc[12](?:\.bias)?)(?:\.weight)?", top_k=2)

    def serve(self, model: PreTrainedModel, layer: MoELayer, make: MakeExperts, number: int) -> None:
        scale = 1.0 - model.config.moe_token_dropout  # as the model scales its experts' outputs outside training
        experts = make(number, layer.stream, TwoLinears("fc1", "fc2"))
        model.set_submodule(layer.name, RoutedMoE(model.get_submodule(layer.router), partial(route_nllb, scale), experts))


def route_switch(router: nn.Module, hidden: torch.Tensor) -> Routing:
    one_hot, weights, logits = router(hidden)
    experts = torch.where(one_hot.any(dim=-1), one_hot.argmax(dim=-1), -1)  # all zero: over capacity
    # As the router chooses: after rounding to the activations' dtype, which makes ties that the logits do not have.
    chosen = logits.softmax(dim=-1, dtype=router.dtype).to(hidden.dtype).argmax(dim=-1)
    return Routing(experts.reshape(-1, 1), weights.reshape(-1, 1), chosen.reshape(-1, 1), logits.reshape(-1, logits.shape[-1]))


def route_nllb(scale: float, router: nn.Module, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Routing:
    _, weights, logits = router(hidden.reshape(-1, hidden.shape[-1]), padding_mask)  # (tokens, experts) both
    first = logits.softmax(dim=-1, dtype=router.dtype).to(hidden.dtype).argmax(dim=-1, keepdim=True)
    second = logits.scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
    chosen = torch.cat([first, second], dim=1)
    kept = weights.gather(1, chosen)
    return Routing(torch.where(kept != 0, chosen, -1), kept * scale, chosen, logits)  # a weight of zero: over capacity


def _layer(model: PreTrainedModel, name: str, pattern: str, top_k: int) -> MoELayer:
    """The layer whose tensors' names match `pattern`: the expert's number, the part."""
    experts: dict[int, dict[str, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, value in model.get_submodule(name).state_dict().items():
        match = re.fullmatch(pattern, tensor)
        if match:
            experts.setdefault(int(match[1]), {})[match[2]] = f"{name}.{tensor}"
            shapes[match[2]] = tuple(value.shape)
    in_decoder = "decoder" in name.split(".")
    ordered = tuple(experts[number] for number in sorted(experts))
    return MoELayer(name, ordered, shapes, DECODER if in_decoder else ENCODER, top_k, f"{name}.router")


def _other_activation(model: PreTrainedModel, key: str, found: str) -> ModelError:
    return ModelError(f"{model.name_or_path}: {key} is {found!r}; only experts with 'relu' are served")
