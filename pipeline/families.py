"""Model families: what has to be known of one to serve it, in one small class each.

A family says which modules of the transformers model are MoE layers, how a checkpoint names the experts' tensors, how its own
router is asked, and what one expert computes. Nothing here knows slots, budgets or batches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from pipeline.errors import ModelError
from pipeline.expert_shape import ExpertShape
from predictor.tokens import DECODER, ENCODER
from store.layout import LayerLayout


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: the module's name in the model, e.g. "encoder.block.1.layer.1.mlp".
        experts: [expert][part] -> the tensor's name in the model and in its checkpoints.
        stream: which tokens it routes (predictor.tokens).
    """

    name: str
    experts: tuple[dict[str, str], ...]
    stream: int


@dataclass(frozen=True)
class Routing:
    """A router's answer for all tokens of a padded batch, row after row.

    Attributes:
        experts: int64 (tokens, top_k); -1 where the router drops the token.
        weights: (tokens, top_k), multiplied with the expert's output.
        chosen: int64 (tokens, top_k): the same before any capacity; never -1.
        logits: (tokens, experts), before any capacity.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    logits: torch.Tensor


class Family(Protocol):
    """A model family."""

    top_k: int

    def moe_layers(self, model: PreTrainedModel) -> list[MoELayer]:
        """In the order of the forward."""

    def route(self, router: nn.Module, hidden: torch.Tensor) -> Routing:
        """Asks the model's own router, capacity included. hidden: (batch, tokens, d_model)."""

    def apply(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """One expert's output: (tokens, d_model) -> (tokens, d_model)."""

    def expert_shape(self, layer: LayerLayout) -> ExpertShape:
        """The same for the kernels of a GPU: where in a block what lies."""


class Switch:
    """Switch Transformers: top-1 router with a capacity per sequence; ungated ReLU experts without bias."""

    top_k = 1
    _expert = re.compile(r"(?P<layer>.+)\.experts\.expert_(?P<expert>\d+)\.(?P<part>wi|wo)\.weight")

    def moe_layers(self, model: PreTrainedModel) -> list[MoELayer]:
        if model.config.dense_act_fn != "relu":
            file = model.name_or_path
            raise ModelError(f"{file}: dense_act_fn is {model.config.dense_act_fn!r}; only experts with 'relu' are served")
        layers = []
        for name, module in model.named_modules():
            if isinstance(module, SwitchTransformersSparseMLP):
                experts: list[dict[str, str]] = [{} for _ in range(len(module.experts))]
                for tensor in module.state_dict():
                    match = self._expert.fullmatch(f"{name}.{tensor}")
                    if match:
                        experts[int(match["expert"])][match["part"]] = f"{name}.{tensor}"
                stream = DECODER if name.startswith("decoder.") else ENCODER
                layers.append(MoELayer(name, tuple(experts), stream))
        return sorted(layers, key=lambda layer: layer.stream)  # stable: the encoder runs before the decoder

    def route(self, router: nn.Module, hidden: torch.Tensor) -> Routing:
        one_hot, weights, logits = router(hidden)
        experts = torch.where(one_hot.any(dim=-1), one_hot.argmax(dim=-1), -1)  # all zero: over capacity
        # As the router chooses: after rounding to the activations' dtype, which makes ties that the logits do not have.
        chosen = logits.softmax(dim=-1, dtype=router.dtype).to(hidden.dtype).argmax(dim=-1)
        return Routing(experts.reshape(-1, 1), weights.reshape(-1, 1), chosen.reshape(-1, 1), logits.reshape(-1, logits.shape[-1]))

    def apply(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(tokens, weights["wi"]).relu(), weights["wo"])

    def expert_shape(self, layer: LayerLayout) -> ExpertShape:
        wi, wo = layer.block.part("wi"), layer.block.part("wo")
        d_ff, d_model = wi.shape
        return ExpertShape(layer.experts, d_model, d_ff, getattr(torch, wi.dtype), up=wi.offset, down=wo.offset)


FAMILIES: dict[str, Family] = {"switch_transformers": Switch()}
"""By `model_type` in config.json."""
