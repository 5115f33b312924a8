"""CUDA graphs of a forward: one launch instead of hundreds, for shapes that come again.

A forward is recorded in two ways. `whole` is one graph, for when all that the tables want is in slots. `pieces` are cut at every
boundary between a router and its experts, so that between two of them the host may wait for copies, and evictions take
effect; for each boundary there is one graph more, a part of the layer: it computes the experts that are in slots and have not been
computed, and is replayed as often as that is worth it, or never. All read the same inputs, and share one pool
of memory: one runs at a time.

A forward that asks the GPU something while it is recorded, as some models do, cannot be a graph: recording it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.gpu.layers import CurrentForward, DeviceForward
from pipeline.gpu.packed import Tables
from pipeline.gpu.recording import closed, undisturbed
from pipeline.inputs import Inputs
from predictor.traces import LayerTrace


@dataclass
class Outputs:
    """Where a forward leaves what it says: tensors on the device, overwritten by the next."""

    results: torch.Tensor
    chosen: torch.Tensor | None
    """Of all MoE layers, one behind the other, what their routers chose: int16; None under hash routing."""
    counts: list[torch.Tensor]
    """Per MoE layer, tokens of each expert: int32 (experts + 1,), those without expert last."""
    decisions: list[LayerTrace]

    @classmethod
    def of(cls, results: torch.Tensor, forward: DeviceForward, counts: list[torch.Tensor]) -> Outputs:
        chosen = torch.cat([layer.reshape(-1) for layer in forward.chosen]) if forward.chosen else None
        return cls(results, chosen, counts, forward.decisions)


@dataclass
class Recorded:
    """A forward as graphs, to be launched in this order, with a MoE boundary between each and the next.

    Attributes:
        pieces, parts: handles for store.cuda.launch; parts: for each boundary.
        graphs: which they are of.
    """

    pieces: list[int]
    parts: list[int]
    outputs: Outputs
    graphs: list[torch.cuda.CUDAGraph]


class GraphedForward:
    """The forward of one shape."""

    def __init__(
        self,
        forward: Callable[[Inputs], torch.Tensor],
        inputs: Inputs,
        tables: Tables | None,
        current: CurrentForward,
        pool: Any,
        stream: torch.cuda.Stream,
    ):
        """
        Args:
            inputs, tables: on the device, where they stay; whoever runs the graphs has filled them.
            pool: torch.cuda.graph_pool_handle(), of all graphs; may be changed for those to come.
            stream: to record on; nobody else uses it.
        """
        self.inputs, self.tables = inputs, tables
        self._forward, self._current, self._stream = forward, current, stream
        self.pool = pool
        self.whole: Recorded | None = None
        self.pieces: Recorded | None = None

    def record(self, whole: bool, pieces: bool) -> bool:
        """Makes the graphs that will be needed, unless they are there.

        Returns: whether there was one to make.

        Raises:
            RuntimeError: the forward cannot be recorded.
        """
        missing = (whole and self.whole is None, pieces and self.pieces is None)
        if missing[0]:
            self.whole = self._record(cut=False)
        if missing[1]:
            self.pieces = self._record(cut=True)
        return any(missing)

    def _record(self, cut: bool) -> Recorded:
        graphs: list[torch.cuda.CUDAGraph] = []
        counts: list[torch.Tensor] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(self.pool, capture_error_mode="thread_local")

        def routed(layer: int, tokens: torch.Tensor) -> None:
            if layer != len(counts):
                raise RuntimeError("MoE layers that text does not reach, or that run more than once")
            counts.append(tokens)

        def boundary(layer: int) -> bool:
            if not cut:
                return False
            graphs[-1].capture_end()
            begin()
            return len(graphs) % 2 == 0  # a piece, a part, a piece, ...

        masks = [self.inputs[name] for name in MASKS if name in self.inputs]
        now = self._current.forward = DeviceForward(masks, self.tables, routed, boundary, lambda layer, in_part: None)
        with undisturbed(), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            begin()
            with closed(graphs):
                outputs = Outputs.of(self._forward(self.inputs), now, counts)
        handles = [graph.raw_cuda_graph_exec() for graph in graphs]
        return Recorded(handles[::2], handles[1::2], outputs, graphs)


MASKS = ("attention_mask", "decoder_attention_mask")
"""Of the streams, by their names among a task's inputs."""
