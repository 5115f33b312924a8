"""One batch on a GPU, from tokens to answer: made ready, enqueued, and read when the GPU has come to its end.

Three steps, in up to three threads (pipeline.device.Work), so that the GPU finds the next batch when it ends one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import Answer
from pipeline.gpu.graphs import MASKS, Tables
from pipeline.gpu.grouping import tiles_for
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
        # Pinned: a copy from other memory waits for all that the GPU has been given before.
        self._inputs = {name: tensor.pin_memory() for name, tensor in host.items()}
        self._tables = self._padded(table) if table is not None else None

    def start(self) -> None:
        gpu = self._gpu
        gpu.wait_for_room()
        stream = gpu.stream.cuda_stream
        with torch.cuda.stream(gpu.stream):
            self._begun = cuda.Event(stream)
            try:
                outputs, self._how = gpu.forward(self._batch, self._inputs, self._tables, self._top_t)
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

    def _padded(self, table: HashTable) -> Tables:
        """A hash table for padded tokens; padding has no expert."""
        tables = []
        gpu = self._gpu
        dtype = gpu.model.dtype
        for stream, experts, scaling in zip(gpu.spec.model.shape.streams, table.experts, table.scaling, strict=True):
            everywhere = torch.full((self._tokens[stream], experts.shape[1]), -1, dtype=torch.int64)
            everywhere[self._real[stream]] = torch.from_numpy(experts.astype(np.int64))
            weights = torch.zeros(everywhere.shape, dtype=dtype)
            weights[self._real[stream]] = torch.from_numpy(scaling).to(dtype)
            tables.append((everywhere.pin_memory(), weights.pin_memory()))
        return tables

    def _count(self) -> None:
        """Tells the engine what the kernels found."""
        gpu = self._gpu
        streams, top_k = gpu.spec.model.shape.streams, gpu.spec.model.shape.top_k
        # Pairs of each MoE layer, padding counted: what its tiles were chosen by. A hash table may have more than the routers.
        widths = [experts.shape[1] for experts, _ in self._tables] if self._tables is not None else [top_k] * len(streams)
        counters = self._counters.numpy()
        for layer, (stream, width, shape) in enumerate(zip(streams, widths, gpu.shapes, strict=True)):
            routed, hits = counters[:, layer, : shape.experts]
            rows = tiles_for(self._tokens[stream] * width, shape).rows
            gpu.engine.counted(layer, routed, hits, -(-routed // rows), self._batch)


def padded(longest: int) -> int:
    """To how many tokens a batch is padded: few shapes, so that graphs come again, and less than a quarter too many beyond 64."""
    step = 8 if longest <= 64 else 2 ** ((longest - 1).bit_length() - 3)
    return -(-longest // step) * step
