"""A model on a GPU: its backbone there, its experts in slots and, for the rest, in the host's memory, a table of addresses between.

The host's arena is registered with CUDA, so that copies run at the link's speed and a kernel can read a block in place. A batch is
answered without a question to the CPU: its kernels follow the table, and count what they found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.device import Answer, ExecutorSpec
from pipeline.device_experts import Counters, CurrentForward, DeviceExperts, DeviceForward
from pipeline.expert_shape import ExpertShape
from pipeline.graphs import MASKS, GraphedForward, Outputs
from pipeline.grouping import tiles_for
from pipeline.inputs import Hear, Inputs
from pipeline.models import build
from pipeline.routing import Expert
from predictor.hash_table import HashTable
from store import cuda
from store.arena import Arena
from store.cuda import CudaError
from store.device_copies import DeviceCopyEngine
from store.errors import SpaceError
from store.eviction import POLICIES
from store.lanes import CudaLanes, PointerTable
from store.movement import Movement
from store.slots import Slots

SWITCH_S = 0.0002
"""Python's threads take turns so often: at its own 5 ms the copy thread would let the link idle while another thread computes."""
Tables = list[tuple[torch.Tensor, torch.Tensor]]


class OnGPU:
    """See `pipeline.device.Device`. One thread runs batches; plans come from any."""

    def __init__(self, spec: ExecutorSpec, arena: Arena):
        """
        Raises:
            SpaceError: the arena cannot be registered.
        """
        self._spec = spec
        self._registered = ExitStack()
        try:
            self._build(arena)
        except BaseException:
            self._registered.close()
            raise

    def _build(self, arena: Arena) -> None:
        spec = self._spec
        device = self._device = torch.device(spec.device)
        sys.setswitchinterval(SWITCH_S)
        torch.cuda.set_device(device)
        torch.cuda.init()
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            slots = Slots(arena, spec.slots, device)
            host = self._register(arena, device)
            table = PointerTable(arena, host, device)
            self._counters = Counters(arena.layout.layers, device)
            self._current = CurrentForward()
            begin = slots.memory.data_ptr()
            self._shapes: list[ExpertShape] = []

            def experts(layer: int, stream: int, expert: Expert) -> DeviceExperts:
                shape = expert.shape(arena.layout.layers[layer])
                self._shapes.append(shape)
                entries = table.entries[layer, : shape.experts]
                span = (begin, begin + slots.memory.numel())
                return DeviceExperts(layer, stream, shape, entries, span, self._counters, self._current)

            self._model = build(spec.model, arena, experts, device)
        self._lanes = CudaLanes(arena, slots, table, self._stream)
        self._engine = DeviceCopyEngine(arena, slots, POLICIES[spec.policy](), self._lanes)
        self._graphs: dict[tuple, GraphedForward | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._recording = torch.cuda.Stream(device)
        self.eager_because: dict[str, int] = {}
        """Batches that ran without a graph, by reason."""
        self._engine.start()

    def _register(self, arena: Arena, device: torch.device) -> int:
        """The arena's address as the device sees it. Whatever fails later, or if nothing does `close`, gives it up."""
        address = arena.memory.data_ptr()
        try:
            host = cuda.register(address, arena.memory.numel(), device.index or 0)
        except CudaError as error:
            raise SpaceError(f"{arena.path}: CUDA cannot register it ({error}); write `device: cpu`") from None
        self._registered.callback(cuda.unregister, address)
        return host

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._engine.plan(batch, uses)

    def run(self, batch: Batch, table: HashTable | None, top_t: int | None = None, hear: Hear | None = None) -> Answer:
        host = self._spec.task.inputs(batch, padded)
        real = [host[name].reshape(-1).nonzero().squeeze(1) for name in MASKS if name in host]
        tables = self._padded(table, host, real) if table is not None else None
        with torch.cuda.stream(self._stream):
            try:
                if self._spec.task.one_forward:
                    outputs = self._forward(batch.index, host, tables, top_t)
                else:
                    outputs = self._eager(batch.index, host, tables, top_t, "many forwards", hear)
                # One word from the GPU per batch, when all is done.
                results = outputs.results.to("cpu", non_blocking=True)
                chosen = [layer.to("cpu", non_blocking=True) for layer in outputs.chosen]
                counters = self._counters.both.to("cpu", non_blocking=True)
                self._stream.synchronize()
            finally:
                self._engine.finish(batch.index)
        streams, top_k = self._spec.model.shape.streams, self._spec.model.shape.top_k
        tokens = [host[name].numel() for name in MASKS if name in host]
        widths = [experts.shape[1] for experts, _ in tables] if tables is not None else [top_k] * len(streams)
        self._count(counters.numpy(), [tokens[stream] * width for stream, width in zip(streams, widths, strict=True)])
        choices = [layer[real[stream]].numpy() for layer, stream in zip(chosen, streams, strict=False)]
        return Answer(results, choices, outputs.decisions)

    @property
    def memory_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device)

    def take(self) -> Movement:
        return self._engine.take()

    def close(self) -> None:
        self._engine.close()
        torch.cuda.synchronize()
        self._registered.close()

    def _forward(self, batch: int, host: Inputs, tables: Tables | None, top_t: int | None) -> Outputs:
        """Enqueues a forward: as a graph when its shape has been seen before."""
        key = (tuple(tensor.shape for tensor in host.values()), tables is not None)
        if top_t is not None:
            return self._eager(batch, host, tables, top_t, "traced")
        if key not in self._graphs:
            self._graphs[key] = self._graphed(host, tables)
            return self._eager(batch, host, tables, None, "first of its shape")
        graphed = self._graphs[key]
        if graphed is None:
            return self._eager(batch, host, tables, None, "not recordable")
        try:  # both at once: what is needed changes from batch to batch, and recording takes as long as several of them
            complete = self._engine.is_complete  # asked once: the copy thread may end in between, and neither would be recorded
            graphed.record(whole=not self._spec.demand or complete, pieces=not complete)
        except RuntimeError as error:
            self._graphs[key] = None
            self._pool = torch.cuda.graph_pool_handle()  # torch may take the old one for one that is still recorded to
            return self._eager(batch, host, tables, None, f"not recordable: {str(error).splitlines()[0]}")
        graphed.load(host, tables)
        if graphed.whole is not None and self._engine.is_ready(batch):
            graphed.whole.pieces[0].replay()
            outputs = graphed.whole.outputs
            self._engine.passed(batch, *range(len(outputs.counts)))
            return outputs
        assert graphed.pieces is not None
        outputs = graphed.pieces.outputs
        graphed.pieces.pieces[0].replay()
        for layer, piece in enumerate(graphed.pieces.pieces[1:]):
            self._hold(batch, layer, outputs.counts[layer])
            piece.replay()
            self._engine.passed(batch, layer)
        return outputs

    def _hold(self, batch: int, layer: int, counts: torch.Tensor) -> None:
        """Between a layer's router and its experts: waits for those that the tables, or on demand the router, want in slots."""
        if self._spec.demand:
            self._engine.demand(batch, layer, counts[:-1].cpu().numpy().nonzero()[0].tolist())
        self._engine.stage(batch, layer)

    def _eager(
        self, batch: int, host: Inputs, tables: Tables | None, top_t: int | None, reason: str, hear: Hear | None = None
    ) -> Outputs:
        self.eager_because[reason] = self.eager_because.get(reason, 0) + 1
        inputs = {name: tensor.to(self._device) for name, tensor in host.items()}
        moved = [(e.to(self._device), w.to(self._device)) for e, w in tables] if tables is not None else None
        masks = [inputs[name] for name in MASKS if name in inputs]
        now = self._current.forward = DeviceForward(
            masks, moved, partial(self._hold, batch), partial(self._engine.passed, batch), top_t
        )
        return Outputs(self._spec.task.forward(self._model, inputs, hear), now.chosen, [], now.decisions)

    def _graphed(self, host: Inputs, tables: Tables | None) -> GraphedForward:
        inputs = {name: torch.empty_like(tensor, device=self._device) for name, tensor in host.items()}
        buffers = None
        if tables is not None:
            buffers = [(torch.empty_like(e, device=self._device), torch.empty_like(w, device=self._device)) for e, w in tables]
        forward = partial(self._spec.task.forward, self._model)
        return GraphedForward(forward, inputs, buffers, self._current, self._pool, self._recording)

    def _padded(self, table: HashTable, host: Inputs, real: list[torch.Tensor]) -> Tables:
        """A hash table for padded tokens, on the CPU; padding has no expert."""
        tables = []
        masks = [host[name] for name in MASKS if name in host]
        dtype = self._model.dtype
        for stream, experts, scaling in zip(self._spec.model.shape.streams, table.experts, table.scaling, strict=True):
            everywhere = torch.full((masks[stream].numel(), experts.shape[1]), -1, dtype=torch.int64)
            everywhere[real[stream]] = torch.from_numpy(experts.astype(np.int64))
            weights = torch.zeros(everywhere.shape, dtype=dtype)
            weights[real[stream]] = torch.from_numpy(scaling).to(dtype)
            tables.append((everywhere, weights))
        return tables

    def _count(self, counters: np.ndarray, pairs: list[int]) -> None:
        """Tells the engine what the kernels found.

        Args:
            counters: (2, MoE layers, experts), `Counters.both`.
            pairs: of each MoE layer, padding counted: what its tiles were chosen by. A hash table may have more than the routers.
        """
        for layer, (count, shape) in enumerate(zip(pairs, self._shapes, strict=True)):
            routed, hits = counters[:, layer, : shape.experts]
            rows = tiles_for(count, shape).rows
            self._engine.counted(layer, routed, hits, -(-routed // rows))


def padded(longest: int) -> int:
    """To how many tokens a batch is padded: few shapes, so that graphs come again, and less than a quarter too many beyond 64."""
    step = 8 if longest <= 64 else 2 ** ((longest - 1).bit_length() - 3)
    return -(-longest // step) * step
