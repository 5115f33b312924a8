"""Static gating, as Towards MoE Deployment (arXiv 2303.06182, section 4) found it and left it behind: for `bench` alone.

Every expert of a layer has so many places, whether tokens come or not: a dispatch mask of (tokens, experts, places) brings tokens
to places by a matmul, all experts run on all their places, a second mask brings the results back. A token that finds no place is
dropped, a place that no token takes computes on zeros. So a token costs experts * capacity / top_k times what it has to: the
paper's waste factor. All experts lie on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.func import vmap
from transformers import PreTrainedModel

from pipeline.models import ModelSpec, build
from pipeline.routing import Expert, Routing
from store.arena import Arena
from store.layout import LayerLayout


class StaticExperts:
    """The experts of one MoE layer, each with a fixed number of places (pipeline.routing.Experts)."""

    def __init__(self, expert: Expert, weights: dict[str, torch.Tensor], capacity: float):
        """
        Args:
            weights: of all experts, each part (experts, *shape of the part).
            capacity: places per expert, as a share of the layer's tokens, padding included.
        """
        self._expert, self._weights, self._capacity = expert, weights, capacity
        self._count = len(next(iter(weights.values())))

    def __call__(self, hidden: torch.Tensor, route: Callable[[], Routing]) -> torch.Tensor:
        """Zero for tokens that the router drops or that find no place."""
        routing = route()  # T tokens, E experts, C places, D hidden
        places = max(1, math.ceil(self._capacity * len(hidden)))
        dispatch, combine = masks(routing.experts, routing.weights.to(hidden.dtype), self._count, places)
        inputs = torch.einsum("tec,td->ecd", dispatch, hidden)
        outputs = vmap(self._expert)(self._weights, inputs)
        return torch.einsum("tec,ecd->td", combine, outputs)


def masks(experts: torch.Tensor, weights: torch.Tensor, count: int, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token goes to which place of which expert, and with which weight it comes back: (tokens, count, places) both, of the
    weights' dtype.

    First choices find places before second ones, and earlier tokens before later ones.

    Args:
        experts, weights: (tokens, top_k); expert -1 is none.
    """
    tokens, top_k = experts.shape
    chosen = nn.functional.one_hot(experts.clamp(min=0).T.reshape(-1), count) * (experts.T.reshape(-1, 1) >= 0)  # (top_k * T, E)
    place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)  # (top_k * T,): how many were there before
    fits = (place < places) & (chosen.sum(-1) > 0)
    first = (torch.arange(tokens, device=experts.device).repeat(top_k) * count + experts.T.reshape(-1)) * places
    where = torch.where(fits, first + place, tokens * count * places)  # the last for those that find none

    def mask(values: torch.Tensor) -> torch.Tensor:
        flat = weights.new_zeros(tokens * count * places + 1).scatter_(0, where, values)
        return flat[:-1].view(tokens, count, places)

    return mask(torch.ones_like(weights).reshape(-1)), mask(weights.T.reshape(-1))


def waste_factor(experts: int, top_k: int, capacity: float) -> float:
    """Places per token that needs one: what a static layer computes for each that it has to (the paper's E * C / k)."""
    return experts * capacity / top_k


def static_model(spec: ModelSpec, arena: Arena, capacity: float, device: torch.device) -> PreTrainedModel:
    """The model with static gating in the place of every MoE layer, all of it on `device`."""
    memory = arena.memory[: arena.layout.expert_bytes].to(device)  # on a CPU the arena's own pages

    def experts(layer: int, stream: int, expert: Expert) -> StaticExperts:
        return StaticExperts(expert, _stacked(arena.layout.layers[layer], memory), capacity)

    return build(spec, arena, experts, device)


def _stacked(layer: LayerLayout, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each part of all experts of a layer as one strided view: (experts, *shape)."""
    views = {}
    end = layer.offset + layer.experts * layer.block.nbytes
    for name, part in ((part.name, part.view(memory[layer.offset : end])) for part in layer.block.parts):
        stride = layer.block.nbytes // part.element_size()
        views[name] = part.as_strided((layer.experts, *part.shape), (stride, *part.stride()))
    return views
