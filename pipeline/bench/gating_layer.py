"""The MoE layers of Towards MoE Deployment's models, of random weights, with static and with dynamic gating, and dense ones beside.

Both gatings get the same router, tokens and weights. `static` is static_gating.py; `dynamic` this project's grouping and kernels,
on a CPU a plain loop. Knows no time: gating.py measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.bench.static_gating import StaticExperts, waste_factor
from pipeline.expert_shape import ExpertShape
from pipeline.routing import Routing
from store.layout import BlockLayout

HEADS = 16


@dataclass(frozen=True)
class Setting:
    """One of the paper's models, as far as a slice of it goes.

    Attributes:
        every: MoE layers are every so many-th; the others of the slice are dense.
        tokens: of a sequence in one forward. The paper does not say; these make its own activation memory at batch 8 about what
            the static layer takes here. A decoder has one.
        capacity: the paper's capacity factor: places per expert, as a share of the tokens.
        paper: its factor of throughput on one node, and activation memory in GB at batch 8, static and dynamic.
    """

    name: str
    experts: int
    d_model: int
    d_ff: int
    every: int
    tokens: int
    capacity: float
    paper: dict[str, float]
    top_k: int = 2

    @property
    def waste(self) -> float:
        return waste_factor(self.experts, self.top_k, self.capacity)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("lm", 512, 1024, 4096, 2, 1024, 0.05, {"factor": 6.21, "static_gb": 6.29, "dynamic_gb": 1.28}),
        Setting("mt-encoder", 128, 2048, 8192, 4, 32, 1.0, {"factor": 5.75, "static_gb": 1.89, "dynamic_gb": 1.05}),
        Setting("mt-decoder", 128, 2048, 8192, 4, 1, 1.0, {"factor": 2.58}),
    )
}


class Layer(nn.Module):
    """A layer of the slice: attention, and then `after`, both added to what comes in."""

    def __init__(self, width: int, after: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self._attention = nn.MultiheadAttention(width, HEADS, batch_first=True, device=device, dtype=dtype)
        self._norms = nn.ModuleList(nn.LayerNorm(width, device=device, dtype=dtype) for _ in range(2))
        self._after = after

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norms[0](hidden)
        hidden = hidden + self._attention(normed, normed, normed, need_weights=False)[0]
        return hidden + self._after(self._norms[1](hidden))


class Gating:
    """One MoE layer of random weights: a router, and experts of two matrices with a relu between, all in one piece of memory."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        name = str(dtype).removeprefix("torch.")
        self._setting, width = setting, (setting.d_model, setting.d_ff)
        block = BlockLayout.of({"up": (width[::-1], name), "down": (width, name)})
        self.memory = torch.empty(setting.experts * block.nbytes, dtype=torch.uint8, device=device)
        self.memory.view(dtype).normal_(std=0.02)
        self._router = torch.randn(setting.experts, setting.d_model, device=device, dtype=dtype)
        offsets = {part.name: part.offset for part in block.parts}
        self._shape = ExpertShape(setting.experts, *width, dtype, up=offsets["up"], down=offsets["down"])
        blocks = self.memory.view(setting.experts, block.nbytes)
        self._weights = {
            part.name: blocks[:, part.offset : part.offset + part.nbytes].view(dtype).view(setting.experts, *part.shape)
            for part in block.parts
        }
        start = self.memory.data_ptr()
        self._table = torch.arange(setting.experts, device=device) * block.nbytes + start
        self._span = (start, start + self.memory.numel())
        self._counted = torch.zeros(2, setting.experts, dtype=torch.int32, device=device)

    def route(self, hidden: torch.Tensor) -> Routing:
        """The first two of a softmax, their shares made to add to 1."""
        shares = (hidden @ self._router.T).float().softmax(-1)
        weights, chosen = shares.topk(self._setting.top_k)
        return Routing(chosen, (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype), chosen, None)

    def static(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = StaticExperts(_two_matrices, self._weights, self._setting.capacity)  # type: ignore[arg-type]
        return experts(flat, lambda: self.route(flat)).view_as(hidden)

    def dynamic(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(flat)
        out = self._grouped(flat, routing) if flat.device.type == "cuda" else self._looped(flat, routing)
        return out.view_as(hidden)

    def _grouped(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        from pipeline.gpu import grouping, kernels  # not on a machine without Triton

        groups = grouping.group(routing.experts, self._shape)
        output = kernels.room(hidden, groups)
        grouping.snapshot(groups, self._table, *self._span, *self._counted)
        kernels.run(hidden, routing.weights, groups, output)
        return kernels.combine(output, self._setting.top_k)

    def _looped(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in routing.experts.unique().tolist():
            token, place = (routing.experts == expert).nonzero(as_tuple=True)
            result = _two_matrices({name: part[expert] for name, part in self._weights.items()}, hidden[token])
            out.index_add_(0, token, result * routing.weights[token, place, None])
        return out


def _two_matrices(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(nn.functional.linear(tokens, weights["up"]).relu(), weights["down"])
