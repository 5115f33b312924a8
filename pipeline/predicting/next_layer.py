"""What the next MoE layer's router would say of what comes to this one: a rehearsal one layer long, while the experts are awaited.

Between two MoE layers a state changes by one attention and by this layer's experts; the next router, asked of the state as it is
before both, names most of the experts that it will name, but not from the first layer, whose experts change the state more than any
other's (docs/prediction.md). It costs one small matmul, and no word between host and device. For models whose routers stand beside
their experts and hand out a score for each.

Of the experts that it would name the better half is taken: on a trained model more than nine in ten of these are right, of all
eight in ten, and a copy of a wrong one takes the link from a right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.families.door import SERVED

FIRST = 2
"""MoE layers that no router is asked about ahead."""


class NextLayer:
    """Asks each MoE layer's successor.

    Attributes:
        widest: experts of the largest layer.
    """

    def __init__(self, model: PreTrainedModel, experts: tuple[int, ...], top_k: int):
        self._experts, self._most = experts, -(-top_k // 2)
        self.widest = max(experts)
        self._routers = _routers(model, experts)

    def reaches(self, layer: int) -> bool:
        """Whether there is a router that can be asked for the layer behind this one."""
        return FIRST - 1 <= layer < len(self._routers) - 1 and self._routers[layer + 1] is not None

    @property
    def reaches_all(self) -> bool:
        """Whether every MoE layer but the first two is reached."""
        return all(self.reaches(layer) for layer in range(FIRST - 1, len(self._experts) - 1))

    def scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the router of the layer behind says, (tokens, experts)."""
        router = self._routers[layer + 1]
        assert router is not None
        scores = _scores(router(hidden), self._experts[layer + 1])
        assert scores is not None
        return scores

    def named(self, layer: int, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """How many tokens name each expert of the layer behind: int32 (widest + 1,), the last for tokens that do not count.

        Args:
            hidden: (tokens, d_model), what comes to this layer's experts.
            real: bool (tokens,): tokens that count.
        """
        best = torch.where(real[:, None], self.scores(layer, hidden).topk(self._most, dim=-1).indices, self.widest)
        counts = torch.zeros(self.widest + 1, dtype=torch.int32, device=hidden.device)
        return counts.index_add_(0, best.reshape(-1), torch.ones(best.numel(), dtype=torch.int32, device=hidden.device))


def _routers(model: PreTrainedModel, experts: tuple[int, ...]) -> list[nn.Module | None]:
    """Of every MoE layer, in their order; None where none can be asked."""
    found: list[nn.Module | None] = []
    for name, module in model.named_modules():
        if hasattr(module, SERVED):
            count = experts[len(found)] if len(found) < len(experts) else 0
            parent = model.get_submodule(name.rpartition(".")[0])
            beside = [m for m in parent.children() if m is not module and any(p.shape[:1] == (count,) for p in m.parameters())]
            found.append(next((router for router in beside if _answers(router, count)), None))
    return found if len(found) == len(experts) else []


def _answers(router: nn.Module, experts: int) -> bool:
    """Whether it says something of each expert when it is given states and nothing else."""
    weight = next(p for p in router.parameters() if p.shape[:1] == (experts,))
    if weight.ndim != 2:
        return False
    try:
        return _scores(router(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)), experts) is not None
    except Exception:  # whatever a family's router wants besides: it is not asked then
        return False


def _scores(said: Any, experts: int) -> torch.Tensor | None:
    """The first of what a router gives back that has a score for each expert, (tokens, experts)."""
    for value in said if isinstance(said, tuple) else (said,):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (experts,):
            return value.reshape(-1, experts)
    return None
