"""The forward of a MoE layer's experts on a GPU: no question to the CPU, so that it can be part of a CUDA graph.

`DeviceExperts` stands in the place of a model's own experts, as experts.py does on a CPU. Its kernels
(grouping.py, kernels.py) find each expert through the pointer table: in a slot, or in the host's registered memory, over the link.
Between the router and the kernels it stops at `DeviceForward.boundary`: whoever runs the forward may wait for copies there, or end
one graph and begin another; and may have the experts that are in slots computed first, any number of times, before the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pipeline.expert_shape import ExpertShape
from pipeline.experts import record
from pipeline.gpu import grouping, kernels
from pipeline.parallel.exchange import Exchange
from pipeline.routing import Routing
from predictor.traces import LayerTrace
from store.layout import LayerLayout


class Counters:
    """What the kernels found in one forward, on the device.

    Attributes:
        routed, hits: int32 (MoE layers, experts of the largest layer): tokens of each expert; 1 if it was read from a slot.
    """

    def __init__(self, layers: tuple[LayerLayout, ...], device: torch.device):
        widest = max(layer.experts for layer in layers)
        self.both = torch.zeros(2, len(layers), widest, dtype=torch.int32, device=device)
        self.routed, self.hits = self.both


@dataclass
class DeviceForward:
    """The forward under way.

    Attributes:
        masks: per stream, 1 for real tokens: int64 (batch, tokens).
        tables: hash routing: per MoE layer the experts, int64 (batch * tokens, top_k), and their scaling; None: routers decide.
        routed: called when a layer's router has decided, with the number of the layer and the tokens of each of its experts, int32
            (experts + 1,) on the device, those without expert last.
        boundary: called with the layer before its experts are computed; says whether those in slots only (a part), after which it
            is called again, or all that are left.
        done: called with the layer when these kernels are enqueued, and whether they were but a part.
        top_t: record so many of the routers' probabilities per token, which asks the GPU; None: their choice alone, which does not.
        chosen: per MoE layer what the router chose, int16 (batch * tokens, top_k).
        decisions: with top_t.
        seen: MoE layers that have run, in the first forward if there are many.
    """

    masks: list[torch.Tensor]
    tables: list[tuple[torch.Tensor, torch.Tensor]] | None
    routed: Callable[[int, torch.Tensor], None]
    boundary: Callable[[int], bool]
    done: Callable[[int, bool], None]
    top_t: int | None = None
    chosen: list[torch.Tensor] = field(default_factory=list)
    decisions: list[LayerTrace] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


class CurrentForward:
    """Holds the forward under way, for the MoE layers of one model.

    Attributes:
        ahead: called with the layer, what comes to it, (tokens, d_model), and its experts, (tokens, top_k), -1 for none, before
            they are computed: whoever guesses what later layers will need. No word between host and device in there.
    """

    forward: DeviceForward
    ahead: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None


class DeviceExperts:
    """The experts of one MoE layer, wherever the pointer table says (pipeline.routing.Experts)."""

    def __init__(
        self,
        layer: int,
        stream: int,
        shape: ExpertShape,
        table: torch.Tensor,
        slots: tuple[int, int],
        counters: Counters,
        current: CurrentForward,
        asks: bool = False,
        exchange: Exchange | None = None,
    ):
        """
        Args:
            asks: the router, even where a table decides (ExecutorSpec.asks_routers).
            table: int64 (experts,), this layer's part of the pointer table.
            slots: first address of the slots and the first behind them.
            exchange: to the owners of the experts; None: all are here.
        """
        self._layer, self._stream = layer, stream
        self._shape, self._table, self._slots = shape, table, slots
        self._routed, self._hits = counters.routed[layer, : shape.experts], counters.hits[layer, : shape.experts]
        self._current, self._asks, self._exchange = current, asks, exchange
        if exchange is not None:
            exchange.serves(layer, self._serve)

    def __call__(self, hidden: torch.Tensor, route: Callable[[], Routing]) -> torch.Tensor:
        now = self._current.forward
        mask = now.masks[self._stream].reshape(-1, 1)
        # While generating, later forwards bring one token per row, which may be as many as the prompt had.
        first = len(mask) == len(hidden) and self._layer not in now.seen
        now.seen.add(self._layer)
        table = now.tables[self._layer] if now.tables is not None and first else None
        if table is None or self._asks:
            routing = route()
            experts, weights = torch.where(mask != 0, routing.experts, -1) if first else routing.experts, routing.weights
            if first:
                now.chosen.append(routing.chosen.to(torch.int16))
            if first and now.top_t is not None:
                real = mask[:, 0].nonzero()[:, 0]
                logits = routing.logits[real] if routing.logits is not None else None
                now.decisions.append(record(logits, routing.chosen[real], weights[real], now.top_t))
        if table is not None:
            experts, weights = table
        if self._exchange is not None:
            return self._exchange.round(self._layer, hidden, experts, weights)
        return self._run(hidden, experts, weights)

    def _serve(self, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """See `pipeline.parallel.exchange.Serve`."""
        return self._run(tokens, experts[:, None], tokens.new_ones(len(tokens), 1))

    def _run(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: (tokens, d_model).
            experts, weights: (tokens, top_k); expert -1 is none.
        """
        now = self._current.forward
        groups = grouping.group(experts, self._shape)
        output = kernels.room(hidden, groups)
        if self._current.ahead is not None:
            self._current.ahead(self._layer, hidden, experts)
        now.routed(self._layer, groups.counts)
        in_part = True
        while in_part:
            in_part = now.boundary(self._layer)
            grouping.snapshot(groups, self._table, *self._slots, self._routed, self._hits, last=not in_part)
            kernels.run(hidden, weights, groups, output)
            now.done(self._layer, in_part)
        return kernels.combine(output, weights.shape[1])
