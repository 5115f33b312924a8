"""One batch on a GPU, from tokens to answer: made ready, enqueued, and read when the GPU has come to its end.

Three steps, in up to three threads (pipeline.device.Work), so that the GPU finds the next batch when it ends one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import Answer
from pipeline.gpu.graphs import MASKS
from pipeline.gpu.grouping import tiles_for
from pipeline.gpu.packed import Packed
from predictor.hash_table import HashTable
from store import cuda

if TYPE_CHECKING:
    from pipeline.gpu.on_gpu import OnGPU


class GPUWork:
    """See `pipeline.device.Work`."""

    def __init__(self, gpu: OnGPU, batch: Batch, table: HashTable | None, top_t: int | None):
        self._gpu, self._batch, self._top_t = gpu, batch.index, top_t
        host = gpu.spec.task.inputs(batch, padded if gpu.spec.model.may_pad else lambda longest: longest)
        masks = [host[name].numpy().reshape(-1) for name in MASKS if name in host]
        self._real = [np.flatnonzero(mask) for mask in masks]
        self._tokens = [len(mask) for mask in masks]
        streams = gpu.spec.model.shape.streams
        self._host = Packed.of(host, table, self._real, self._tokens, streams, gpu.model.dtype)  # until the GPU has ended the batch

    def start(self) -> None:
        gpu = self._gpu
        gpu.wait_for_room()
        stream = gpu.stream.cuda_stream
        with torch.cuda.stream(gpu.stream):
            self._begun = cuda.Event(stream)
            try:
                outputs, self._how = gpu.forward(self._batch, self._host, self._top_t)
                self._results = outputs.results.to("cpu", non_blocking=True)
                self._chosen = outputs.chosen.to("cpu", non_blocking=True) if outputs.chosen is not None else None
                self._counters = gpu.counters.both.to("cpu", non_blocking=True)
                self._decisions = outputs.decisions
                self._ended = cuda.Event(stream)
            finally:
                gpu.engine.finish(self._batch)
        gpu.under_way.append(self._ended)

    def answer(self) -> Answer:
        gpu = self._gpu
        gpu.wait_for(self._ended)
        self._count()
        clock = gpu.lanes.clock
        span = (clock.ns(self._begun), clock.ns(self._ended))
        return Answer(self._results, self._choices(), self._decisions, span, gpu.engine.take(), self._how)

    def _choices(self) -> list[np.ndarray]:
        """Per MoE layer what the router chose for the real tokens."""
        if self._chosen is None:
            return []
        model = self._gpu.spec.model.shape
        chosen = self._chosen.numpy().reshape(-1, model.top_k)
        ends = np.cumsum([self._tokens[stream] for stream in model.streams])
        ends = ends[ends <= len(chosen)]  # the last layers may not have been reached
        layers = np.split(chosen, ends[:-1])
        return [layer[self._real[stream]] for layer, stream in zip(layers, model.streams, strict=False)]

    @property
    def _pairs(self) -> list[int]:
        """Of each MoE layer tokens x experts, padding counted: what its tiles are chosen by."""
        shape, layers = self._gpu.spec.model.shape, self._host.packing.layers
        if layers is None:
            return [self._tokens[stream] * shape.top_k for stream in shape.streams]
        return [layer.tokens * layer.width for layer in layers]  # a table may name more than a router

    def _count(self) -> None:
        """Tells the engine what the kernels found."""
        gpu = self._gpu
        counters = self._counters.numpy()
        for layer, (pairs, shape) in enumerate(zip(self._pairs, gpu.shapes, strict=True)):
            routed, hits = counters[:, layer, : shape.experts]
            rows = tiles_for(pairs, shape).rows
            gpu.engine.counted(layer, routed, hits, -(-routed // rows), self._batch)


def padded(longest: int) -> int:
    """To how many tokens a batch is padded: few shapes, so that graphs come again, and less than a quarter too many beyond 64."""
    step = 8 if longest <= 64 else 2 ** ((longest - 1).bit_length() - 3)
    return -(-longest // step) * step
