"""The forward of a MoE layer over slots: tokens grouped by expert, each expert read from where it is, padding left out.

`SlotMoE` takes the place of the model's own MoE module and keeps its router. Under exact routing the router decides, with
its capacity, exactly as in transformers; under hash routing the batch's hash table does, and the router is not run.
Dynamic gating as in Towards MoE Deployment (section 4): tokens sorted by expert, no capacity padding, no dispatch mask, and
no work for experts that have no token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from pipeline.families import Family
from predictor.hash_table import HashTable
from predictor.traces import LayerTrace
from store.copies import CopyEngine


@dataclass
class Forward:
    """One forward under way: what every MoE layer of it needs to know.

    Attributes:
        real: per stream the positions of real tokens in the padded batch, row after row; int64 (tokens,).
        table: decides under hash routing; None: the routers decide.
        top_t: how many of the router's probabilities to record per token.
        decisions: what the routers decided, one entry per MoE layer so far.
    """

    batch: int
    real: tuple[torch.Tensor, ...]
    table: HashTable | None = None
    top_t: int = 1
    decisions: list[LayerTrace] = field(default_factory=list)


class Current:
    """Holds the forward under way, for the MoE layers of one model."""

    forward: Forward


class SlotMoE(nn.Module):
    """A MoE layer whose experts are elsewhere."""

    def __init__(self, family: Family, router: nn.Module, layer: int, stream: int, engine: CopyEngine, current: Current):
        super().__init__()
        self.router = router
        self._family, self._layer, self._stream = family, layer, stream
        self._engine, self._current = engine, current

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, d_model) -> the same; zero for padding and for tokens that the router drops."""
        now = self._current.forward
        real = now.real[self._stream]
        states = hidden.reshape(-1, hidden.shape[-1])
        tokens = states[real]  # (tokens, d_model)
        if now.table is not None:
            experts = torch.from_numpy(now.table.experts[self._layer].astype(np.int64)).to(hidden.device)
            weights = torch.from_numpy(now.table.scaling[self._layer]).to(hidden.device, hidden.dtype)
        else:
            routing = self._family.route(self.router, hidden)
            experts, weights = routing.experts[real], routing.weights[real]
            now.decisions.append(record(routing.logits[real], routing.chosen[real], weights, now.top_t))
        output = torch.zeros_like(states)
        output[real] = self._run(now.batch, tokens, experts, weights)
        return output.reshape(hidden.shape)

    def _run(self, batch: int, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tokens: (tokens, d_model).
            experts, weights: (tokens, top_k); expert -1 is none.
        """
        output = torch.zeros_like(tokens)
        by_expert = experts.reshape(-1).argsort(stable=True)  # positions in (tokens, top_k), those of one expert together
        used, counts = experts.reshape(-1)[by_expert].unique_consecutive(return_counts=True)
        groups = list(zip(used.tolist(), by_expert.split(counts.tolist()), strict=True))
        groups = [(expert, positions) for expert, positions in groups if expert >= 0]
        with self._engine.reading(batch, self._layer, [expert for expert, _ in groups]) as blocks:
            for (_, positions), block in zip(groups, blocks, strict=True):
                rows = positions // experts.shape[1]
                result = self._family.apply(block, tokens[rows]) * weights.reshape(-1)[positions, None]
                output.index_add_(0, rows, result.to(output.dtype))
        return output


def record(logits: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, top_t: int) -> LayerTrace:
    """What the router decided, before any capacity: a label for predictors.

    Args:
        logits: (tokens, experts).
        chosen, weights: (tokens, top_k).
    """
    every = logits.float().softmax(dim=-1)
    first = every.scatter(1, chosen, 2.0)  # above any probability: what the router chose comes first, ties or not
    top = first.topk(min(max(top_t, chosen.shape[1]), logits.shape[-1]), dim=-1).indices
    probabilities = every.gather(1, top)
    return LayerTrace(
        top.to(torch.int16).cpu().numpy(),
        probabilities.half().cpu().numpy(),
        weights.sum(dim=-1).half().cpu().numpy(),
    )
