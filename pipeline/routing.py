"""What passes between a router and a MoE layer's experts, and who computes them: the words that families and devices share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.expert_shape import ExpertShape
from store.layout import LayerLayout


@dataclass(frozen=True)
class Routing:
    """A router's answer for all tokens of a padded batch, row after row.

    Attributes:
        experts: int64 (tokens, top_k); -1 where the router drops the token.
        weights: (tokens, top_k), multiplied with the expert's output.
        chosen: int64 (tokens, top_k): the same before any capacity; never -1.
        logits: (tokens, experts), before any capacity, or the probabilities; None: the model's code does not hand them out.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    logits: torch.Tensor | None


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: the module's name in the model, e.g. "encoder.block.1.layer.1.mlp".
        experts: [expert][part] -> the tensor's name in the model's weights.
        shapes: part -> its shape in one expert.
        stream: which tokens it routes (predictor.tokens).
        top_k: experts that its router gives a token.
        router: the module under which its router is.
    """

    name: str
    experts: tuple[dict[str, str], ...]
    shapes: dict[str, tuple[int, ...]]
    stream: int
    top_k: int
    router: str


class Expert(Protocol):
    """What one expert of a MoE layer computes."""

    def __call__(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """(tokens, d_model) -> the same, before the router's weight. `weights` are the block's parts by name."""

    def shape(self, layout: LayerLayout) -> ExpertShape:
        """The same for the kernels of a GPU: where in a block what lies.

        Raises:
            ModelError: no kernel computes it.
        """


class Experts(Protocol):
    """All experts of one MoE layer, wherever they lie."""

    def __call__(self, hidden: torch.Tensor, route: Callable[[], Routing]) -> torch.Tensor:
        """(tokens, d_model), row after row, padding included -> the same; zero for padding and for tokens without expert.

        Args:
            route: asks the model's own router; not called where a hash table decides.
        """


def are_probabilities(scores: torch.Tensor) -> bool:
    """Whether each row's adds to 1: some routers hand out these in place of logits."""
    return bool(((scores >= 0).all(dim=-1) & ((scores.sum(dim=-1) - 1).abs() < 1e-2)).all())


MakeExperts = Callable[[int, int, Expert], Experts]
"""From a MoE layer's number, its stream and what its experts compute: who computes it."""
