"""The steps that one GPU keeps recorded from batch to batch, and whether the next is better whole or in pieces.

A step runs in one of two ways:

`whole`   one graph; what is in no slot is read in place. The host is asked nothing, and hears of tokens a step late if nobody
          wants to know them.
`pieces`  a graph between every two MoE layers. The host is told whom the router has named, and whom the next layer's router would
          name (pipeline/predicting/next_layer.py); both are copied, the link has the next layer's experts to bring while this
          one computes, and what has come stays in its slot.

A copy is as fast as the link, a read in place nine tenths of that, and nothing is left of it; asking the host takes some 0.1 ms a
layer. So steps go in pieces where more than `ASKED_ABOVE` bytes of a MoE layer are missed, and whole where less.

Knows no batch: which forward comes when, and what it has said, is writing.py's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.gpu.graphs import GraphedForward
from pipeline.gpu.layers import CurrentForward, DeviceForward
from pipeline.gpu.recording import TRIES
from pipeline.predicting.next_layer import NextLayer
from pipeline.prepare import ACTIVATION_BYTES
from pipeline.tasks.fixed_step import FixedStep, why_not_fixed

if TYPE_CHECKING:
    from pipeline.gpu.on_gpu import OnGPU

ASKED_ABOVE = 16 * 2**20
"""Bytes of one MoE layer: 0.3 ms at 55 GB/s, of which a read in place loses a tenth, beside what it could have left in a slot. From
the link's figures in docs/benchmarks.md; not yet found by measuring both."""
SHAPES, KEPT_BYTES = 4, ACTIVATION_BYTES // 2
"""Recorded steps kept, the last used, and what their caches may take: each has one of its own. That is not of the budget, which is
for experts, but of what is left free beside it. The step under way has its cache, however large."""
SMOOTHING = 0.25
"""What one step counts for in the mean of missed bytes."""


@dataclass
class Recording:
    """A fixed step and, once it has run, its graphs.

    Attributes:
        why_not: it could not be recorded.
        failed: how often it could not, since it last could.
        warm: it has run once, so that its kernels are compiled.
    """

    step: FixedStep
    graphs: GraphedForward | None
    why_not: str | None
    warm: bool = False
    failed: int = 0


class Replays:
    """What one GPU keeps from batch to batch for steps: those recorded, and how much they miss."""

    def __init__(self, gpu: OnGPU, current: CurrentForward, recording: torch.cuda.Stream):
        spec = gpu.spec
        shape = spec.model.shape
        self._gpu, self._current, self._recording = gpu, current, recording
        self._fixed: OrderedDict[tuple[int, int], Recording] = OrderedDict()
        self._token_bytes = 0.0  # of any cache; 0: none has been made yet
        self.why_not = why_not_fixed(gpu.model)
        self.asks = gpu.asks or spec.stepping is not None
        """Whether what routers name is copied."""
        self.ahead = NextLayer(gpu.model, shape.experts, shape.top_k) if spec.stepping is not None else None
        if self.ahead is not None and not self.ahead.reaches_all:
            self.ahead = None
        width = max(shape.experts) + 1
        self._named = torch.zeros(shape.layers, 2, width, dtype=torch.int32, device=gpu.counters.both.device)
        self.missed_bytes: float | None = None
        """Per MoE layer and step, the running mean; None: no step has told yet."""

    def fixed(self, rows: int, most: int) -> Recording | None:
        """The step of so many rows and tokens, ready for a new batch."""
        if self.why_not is not None:
            return None
        key = (rows, most)
        kept = self._fixed.pop(key, None)
        if kept is None:
            step = FixedStep(self._gpu.model, rows, most)
            kept = Recording(step, None, None)
        else:
            kept.step.reset()
        self._fixed[key] = kept
        while len(self._fixed) > SHAPES or (len(self._fixed) > 1 and self.cache_bytes > KEPT_BYTES):
            self._fixed.popitem(last=False)
        return kept

    @property
    def cache_bytes(self) -> int:
        """What the caches of all recorded steps take, or will: a row's token takes as much in each."""
        room = {key: key[0] * key[1] for key in self._fixed}
        self._token_bytes = max(self._token_bytes, *(kept.step.cache_bytes / room[key] for key, kept in self._fixed.items()))
        return round(self._token_bytes * sum(room.values()))

    def recorded(self, kept: Recording) -> GraphedForward | None:
        """The step's graphs; None, and why, if it cannot be one."""
        if kept.graphs is None:
            pool = torch.cuda.graph_pool_handle()  # its own: torch refuses one for good once all that was recorded in it is gone
            kept.graphs = GraphedForward(kept.step.forward, kept.step.inputs, None, self._current, pool, self._recording)
        complete = self._gpu.engine.is_complete
        try:  # both at once: which is better changes with what is in slots
            self._current.ahead = None
            kept.graphs.record(whole=not self._gpu.asks or complete, pieces=False)
            self._current.ahead = self._hears
            kept.graphs.record(whole=False, pieces=self.asks and not complete)
            kept.failed = 0
        except RuntimeError as error:
            kept.failed += 1
            if kept.failed == TRIES:
                kept.why_not = str(error).splitlines()[0]
            kept.graphs = None
        return kept.graphs

    def enter(self, forward: DeviceForward) -> None:
        """The forward that is about to run eagerly."""
        self._current.forward, self._current.ahead = forward, self._hears

    def _hears(self, layer: int, hidden: torch.Tensor, experts: torch.Tensor) -> None:
        """In the forward: leaves where `named` finds it whom the next layer's router would name."""
        if self.ahead is not None and self.ahead.reaches(layer):
            self._named[layer, 1].copy_(self.ahead.named(layer, hidden, experts[:, 0] >= 0))

    def named(self, layer: int, counts: torch.Tensor) -> tuple[list[int], list[int]]:
        """Whom a layer's router has named, and whom the next one would; waits for the device.

        Args:
            counts: int32 (experts + 1,) on the device.
        """
        self._named[layer, 0, : len(counts)].copy_(counts)
        said = self._named[layer].cpu().numpy()
        now, then = said[0, : len(counts) - 1], said[1, :-1]
        reaches = self.ahead is not None and self.ahead.reaches(layer)
        return np.flatnonzero(now).tolist(), np.flatnonzero(then).tolist() if reaches else []

    def goes_whole(self, rows: int) -> bool:
        """Whether the next step is better one graph than pieces."""
        if self._gpu.engine.is_complete or not self.asks:
            return True
        if self._gpu.asks:
            return False
        if self.missed_bytes is None:  # as if all experts were alike
            shape, slots = self._gpu.spec.model.shape, self._gpu.engine.slots
            used = min(rows * shape.top_k, min(shape.experts))
            share = 1 - slots.count / sum(shape.experts)
            self.missed_bytes = used * share * slots.block_bytes((0, 0))
        return self.missed_bytes < ASKED_ABOVE

    def saw(self, missed_bytes: float) -> None:
        """What a step missed per MoE layer, copied or read in place."""
        before = self.missed_bytes
        self.missed_bytes = missed_bytes if before is None else before + SMOOTHING * (missed_bytes - before)
