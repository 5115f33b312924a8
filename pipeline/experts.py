"""The forward of a MoE layer's experts over slots: tokens grouped by expert, each expert read from where it is, padding left out.

`SlotExperts` stands in the place of a model's own experts, whatever its family (families.py). Under exact routing the model's
router decides, with its capacity if it has one, exactly as in transformers; under hash routing the batch's hash table does. Dynamic
gating as in Towards MoE Deployment (section 4): tokens sorted by expert, no capacity padding, no dispatch mask, and no work for
experts that have no token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.parallel.exchange import Exchange
from pipeline.routing import Expert, Routing, are_probabilities
from predictor.hash_table import HashTable
from predictor.traces import LayerTrace
from store.copies import CopyEngine


@dataclass
class Forward:
    """One forward under way: what every MoE layer needs to know.

    Attributes:
        batch: its number to the engine.
        masks: per stream 1 for real tokens, 0 for padding: bool (batch * tokens,), row after row.
        table: decides under hash routing; None: the routers decide.
        top_t: how many of the router's probabilities to record per token.
        awake: of a step that writes a token per row, the rows that go on, bool (batch,); None: it is no such step.
        decisions: MoE layer -> what its router decided for real tokens.
    """

    batch: int
    masks: tuple[torch.Tensor, ...]
    table: HashTable | None = None
    top_t: int = 1
    awake: torch.Tensor | None = None
    decisions: dict[int, LayerTrace] = field(default_factory=dict)

    def real(self, stream: int, tokens: int) -> torch.Tensor:
        """The positions of real tokens among so many that have come to a layer, int64."""
        mask = self.masks[stream]
        if tokens != len(mask):  # a family without a cache reads all tokens again
            if self.awake is None or tokens % len(self.awake):
                return torch.arange(tokens)
            mask = self.awake.repeat_interleave(tokens // len(self.awake))
        return mask.nonzero()[:, 0]


class Current:
    """Holds the forward under way, for the MoE layers of one model.

    Attributes:
        ahead: called with the layer and the real tokens that come to it, (tokens, d_model), before its experts are computed:
            whoever guesses what later layers will need.
    """

    forward: Forward
    ahead: Callable[[int, torch.Tensor], None] | None = None


class SlotExperts:
    """The experts of one MoE layer, in slots or in the arena (pipeline.routing.Experts)."""

    def __init__(
        self,
        layer: int,
        stream: int,
        expert: Expert,
        engine: CopyEngine,
        current: Current,
        asks: bool,
        exchange: Exchange | None = None,
    ):
        """
        Args:
            asks: the router, even where a table decides (ExecutorSpec.asks_routers).
            exchange: to the owners of the experts; None: all are here.
        """
        self._asks = asks
        self._layer, self._stream, self._expert = layer, stream, expert
        self._engine, self._current, self._exchange = engine, current, exchange
        if exchange is not None:
            exchange.serves(layer, self._serve)

    def __call__(self, hidden: torch.Tensor, route: Callable[[], Routing]) -> torch.Tensor:
        now = self._current.forward
        real = now.real(self._stream, len(hidden))
        first = self._layer not in now.decisions and len(hidden) == len(now.masks[self._stream])
        table = now.table if first else None
        if table is None or self._asks:
            routing = route()
            experts, weights = routing.experts[real], routing.weights[real]
            if first:
                logits = routing.logits[real] if routing.logits is not None else None
                now.decisions[self._layer] = record(logits, routing.chosen[real], weights, now.top_t)
        if table is not None:
            experts = torch.from_numpy(table.experts[self._layer].astype(np.int64)).to(hidden.device)
            weights = torch.from_numpy(table.scaling[self._layer]).to(hidden.device, hidden.dtype)
        if self._current.ahead is not None:
            self._current.ahead(self._layer, hidden[real])
        output = torch.zeros_like(hidden)
        if self._exchange is not None:
            output[real] = self._exchange.round(self._layer, hidden[real], experts, weights)
        else:
            output[real] = self._run(now.batch, hidden[real], experts, weights)
        return output

    def _serve(self, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """See `pipeline.parallel.exchange.Serve`."""
        return self._run(self._current.forward.batch, tokens, experts[:, None], tokens.new_ones(len(tokens), 1))

    def _run(self, batch: int, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tokens: (tokens, d_model).
            experts, weights: (tokens, top_k); expert -1 is none.
        """
        top_k = experts.shape[1]
        by_expert = experts.reshape(-1).argsort(stable=True)  # positions in (tokens, top_k), those of one expert together
        used, counts = experts.reshape(-1)[by_expert].unique_consecutive(return_counts=True)
        groups = list(zip(used.tolist(), by_expert.split(counts.tolist()), strict=True))
        groups = [(expert, positions) for expert, positions in groups if expert >= 0]
        # As transformers adds up: products in the wider dtype of both, a sum over a token's experts in their order, then rounded.
        products = torch.zeros(len(by_expert), tokens.shape[1], dtype=torch.promote_types(tokens.dtype, weights.dtype))
        with self._engine.reading(batch, self._layer, [expert for expert, _ in groups]) as blocks:
            for at, block in blocks:
                positions = groups[at][1]
                result = self._expert(block, tokens[positions // top_k])
                products[positions] = (result * weights.reshape(-1)[positions, None]).to(products.dtype)
        return products.view(-1, top_k, tokens.shape[1]).sum(dim=1).to(tokens.dtype)


def record(logits: torch.Tensor | None, chosen: torch.Tensor, weights: torch.Tensor, top_t: int) -> LayerTrace:
    """What the router decided, before any capacity: a label for predictors.

    Args:
        logits: (tokens, experts), or probabilities, which some routers hand out; None: unknown, then the chosen experts share all
            probability by their weights.
        chosen, weights: (tokens, top_k).
    """
    if logits is None:
        order = weights.float().argsort(dim=-1, descending=True, stable=True)
        share = weights.float().abs().gather(1, order)
        return LayerTrace(
            chosen.gather(1, order).to(torch.int16).cpu().numpy(),
            (share / share.sum(dim=-1, keepdim=True).clamp(min=1e-9)).half().cpu().numpy(),
            weights.float().sum(dim=-1).half().cpu().numpy(),
        )
    every = logits.float()
    if not are_probabilities(every):
        every = every.softmax(dim=-1)
    first = every.scatter_add(1, chosen, torch.full_like(weights, 2.0, dtype=every.dtype))  # the chosen first, ties or not
    top = first.topk(min(max(top_t, chosen.shape[1]), logits.shape[-1]), dim=-1).indices
    probabilities = every.gather(1, top)
    return LayerTrace(
        top.to(torch.int16).cpu().numpy(),
        probabilities.half().cpu().numpy(),
        weights.sum(dim=-1).half().cpu().numpy(),
    )
