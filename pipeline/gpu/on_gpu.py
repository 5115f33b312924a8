"""A model on a GPU: its backbone there, its experts in slots and, for the rest, in the host's memory, a table of addresses between.

The host's arena is registered with CUDA, so that copies run at the link's speed and a kernel can read a block in place. A batch is
enqueued without a question to the GPU: its kernels follow the table, and count what they found. What is done with a batch before
and after that, work.py has.

Where the arena is not registered (it cannot be, or lies on a disk: all of it would be pinned), an expert has to come into a slot
before it is used: the routers' choice is read back, layer by layer, and what is missing comes first (store/staged_copies.py).
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.expert_shape import ExpertShape
from pipeline.gpu.graphs import MASKS, GraphedForward, Outputs
from pipeline.gpu.layers import Counters, CurrentForward, DeviceExperts, DeviceForward
from pipeline.gpu.packed import Packed, Packing, Tables
from pipeline.gpu.recording import TRIES
from pipeline.gpu.replays import Replays
from pipeline.gpu.work import GPUWork
from pipeline.gpu.writing import GPUWriting
from pipeline.inputs import Hear, Inputs
from pipeline.models import build
from pipeline.routing import Expert
from predictor.hash_table import HashTable
from predictor.stepping import Foresight
from store import cuda
from store.arena import Arena
from store.cuda import CudaError
from store.device_copies import DeviceCopyEngine
from store.eviction import POLICIES
from store.lanes import CudaLanes, PointerTable
from store.read_ahead import StagedReadAheadEngine
from store.ring import HOST_SLOTS, CudaRingLanes
from store.slots import Slots
from store.staged_copies import StagedCopyEngine

ASKED = "pieces: routers asked"
"""How a batch ran whose table was not heeded (store/doubt.py)."""

SWITCH_S = 0.00005
"""Python's threads take turns so often: at its own 5 ms the copy thread would let the link idle while another thread computes."""


class OnGPU:
    """See `pipeline.device.Device`. One thread runs batches; plans come from any."""

    def __init__(self, spec: ExecutorSpec, arena: Arena):
        """
        Raises:
            SpaceError: the arena cannot be registered, and no host memory can be pinned in its stead.
        """
        self.spec = spec
        self._registered = ExitStack()
        try:
            self._build(arena)
        except BaseException:
            self._registered.close()
            raise

    def _build(self, arena: Arena) -> None:
        spec = self.spec
        device = self._device = torch.device(spec.device)
        sys.setswitchinterval(SWITCH_S)
        torch.cuda.set_device(device)
        torch.cuda.init()
        self.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self.stream):
            self.counters = Counters(arena.layout.layers, device)  # the first allocation, which makes a context
            host = self._register(arena, device)
            on_device = host is not None or spec.slots > 0
            slots = Slots(arena, spec.slots, device) if on_device else Slots(arena, HOST_SLOTS, None)
            table = PointerTable(arena, host, device)
            self._current = CurrentForward()
            begin = slots.memory.data_ptr()
            self.shapes: list[ExpertShape] = []

            def experts(layer: int, stream: int, expert: Expert) -> DeviceExperts:
                shape = expert.shape(arena.layout.layers[layer])
                self.shapes.append(shape)
                entries = table.entries[layer, : shape.experts]
                span = (begin, begin + slots.memory.numel())
                asks = spec.asks_routers
                return DeviceExperts(layer, stream, shape, entries, span, self.counters, self._current, asks, spec.exchange)

            self.model = build(spec.model, arena, experts, device)
        self.asks = spec.demand or host is None
        """What a router has named has to come into a slot, before its experts run: in every batch."""
        self._batch_asks = False
        """In the one that is being enqueued."""
        policy = POLICIES[spec.policy]()
        may_doubt = spec.task.forwards == 1 and spec.exchange is None  # steps ask by a rule of their own (replays.py)
        self.lanes: CudaLanes
        self.engine: DeviceCopyEngine
        if host is not None:
            self.lanes = CudaLanes(arena, slots, table, self.stream)
            self.engine = DeviceCopyEngine(arena, slots, policy, self.lanes, may_doubt)
        else:
            self.lanes = CudaRingLanes(arena, slots, table, self.stream)
            staged = StagedReadAheadEngine if spec.read_ahead else StagedCopyEngine
            self.engine = staged(arena, slots, policy, self.lanes, on_device, may_doubt)
        self._graphs: dict[Packing, tuple[GraphedForward, torch.Tensor] | None] = {}
        """By shape, the graphs and the memory that they read; None: there can be none."""
        self._failed: Counter[Packing] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._recording = torch.cuda.Stream(device)
        self._context = cuda.context()
        self.under_way: deque[cuda.Event] = deque()
        """The ends of the batches that the GPU has been given last."""
        self.eager_because: dict[str, int] = {}
        """Batches that ran without a graph, by reason."""
        self.memory_peak_bytes: int | None = None
        with torch.cuda.stream(self.stream):
            self.replays = Replays(self, self._current, self._recording) if spec.task.forwards > 1 else None
        self.engine.start()

    def _register(self, arena: Arena, device: torch.device) -> int | None:
        """The arena's address as the device sees it, until what fails later, or else `close`, gives it up; None: it does not."""
        self.miss_path = "in_place"
        if self.spec.read_ahead:
            self.miss_path = "staged: store.backing is file, and registering it would pin all of it"
            return None
        address = arena.memory.data_ptr()
        try:
            host = cuda.register(address, arena.memory.numel(), device.index or 0)
        except CudaError as error:
            self.miss_path = f"staged: {arena.path}: CUDA cannot register it ({error})"
            return None
        self._registered.callback(cuda.unregister, address)
        return host

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        self.engine.plan(batch * self.spec.task.forwards, uses)

    def prepare(
        self,
        batch: Batch,
        table: HashTable | None,
        top_t: int | None = None,
        hear: Hear | None = None,
        foresight: Foresight | None = None,
    ) -> GPUWork:
        if self.spec.task.forwards > 1:
            return GPUWriting(self, batch, table, top_t, hear, foresight)
        return GPUWork(self, batch, table, top_t)

    def wait_for_room(self) -> None:
        """Until the GPU has but one batch to do. With more, whoever is evicted would wait for batches that have not begun."""
        while len(self.under_way) > 1:
            self.under_way.popleft().synchronize()

    def wait_for(self, event: cuda.Event) -> None:
        cuda.use(self._context)  # the thread may be new to CUDA
        event.synchronize()

    def close(self) -> None:
        self.engine.close()
        try:
            torch.cuda.synchronize(self._device)
        finally:
            self._registered.close()

    def forward(self, batch: int, host: Packed, top_t: int | None) -> tuple[Outputs, str]:
        """Enqueues a forward: as a graph when its shape has been seen before.

        Args:
            host: has to stay until the batch has ended.

        Returns: its outputs, and how it ran: "whole", "pieces", `ASKED`, or "eager: " and why there was no graph.
        """
        self._batch_asks = self.engine.is_doubted(batch)
        if self.spec.exchange is not None:  # which asks the GPU for sizes
            self.counters.both.zero_()  # a layer may get no token
            return self._eager(batch, host, top_t, "experts at other Executors")
        if top_t is not None:
            return self._eager(batch, host, top_t, "traced")
        shape = host.packing
        if shape not in self._graphs:
            self._graphs[shape] = self._graphed(shape)
            return self._eager(batch, host, None, "first of its shape")
        known = self._graphs[shape]
        if known is None:
            return self._eager(batch, host, None, "not recordable")
        graphed, memory = known
        try:  # both at once: what is needed changes from batch to batch, and recording takes as long as several of them
            complete = self.engine.is_complete  # asked once: the copy thread may end in between, and neither would be recorded
            if graphed.record(whole=not self.asks or complete, pieces=not complete):
                self._failed.pop(shape, None)
                self.look_at_memory()
        except RuntimeError as error:
            self._failed[shape] += 1
            if self._failed[shape] == TRIES:
                self._graphs[shape] = None
            self._pool = torch.cuda.graph_pool_handle()  # torch may take the old one for one that is still recorded to
            for waiting in filter(None, self._graphs.values()):
                waiting[0].pool = self._pool
            return self._eager(batch, host, None, f"not recordable: {str(error).splitlines()[0]}")
        stream = self.stream.cuda_stream
        cuda.copy_to_device(memory.data_ptr(), host.memory.data_ptr(), shape.nbytes, stream)
        if graphed.whole is not None and not self._batch_asks and self.engine.is_ready(batch):
            cuda.launch(graphed.whole.pieces[0], stream)
            outputs = graphed.whole.outputs
            self.engine.passed(batch, *range(len(outputs.counts)))
            return outputs, "whole"
        assert graphed.pieces is not None
        outputs = graphed.pieces.outputs
        cuda.launch(graphed.pieces.pieces[0], stream)
        for layer, (part, piece) in enumerate(zip(graphed.pieces.parts, graphed.pieces.pieces[1:], strict=True)):
            self._routed(batch, layer, outputs.counts[layer])
            while self.engine.stage(batch, layer):
                cuda.launch(part, stream)
                self.engine.read(batch, layer)
            cuda.launch(piece, stream)
            self.engine.passed(batch, layer)
        return outputs, ASKED if self._batch_asks else "pieces"

    def look_at_memory(self) -> None:
        """After what takes some. Graphs take none when they run, and torch takes a tenth of a millisecond to say."""
        self.memory_peak_bytes = torch.cuda.max_memory_allocated(self._device)

    def _routed(self, batch: int, layer: int, counts: torch.Tensor) -> None:
        """On demand, in doubt, or where it could be read nowhere else, what a router has named is wanted in slots."""
        if (self.asks or self._batch_asks) and not self.engine.is_complete:
            self.engine.demand(batch, layer, counts[:-1].cpu().numpy().nonzero()[0].tolist())

    def _done(self, batch: int, layer: int, in_part: bool) -> None:
        (self.engine.read if in_part else self.engine.passed)(batch, layer)

    def brought(self, host: Packed) -> tuple[Inputs, Tables | None]:
        """A batch's tensors on the device, for a forward that is not recorded."""
        return host.packing.views(host.memory.to(self._device, non_blocking=True))

    def _eager(self, batch: int, host: Packed, top_t: int | None, reason: str) -> tuple[Outputs, str]:
        self.eager_because[reason] = self.eager_because.get(reason, 0) + 1
        inputs, tables = self.brought(host)
        masks = [inputs[name] for name in MASKS if name in inputs]
        now = self._current.forward = DeviceForward(
            masks, tables, partial(self._routed, batch), partial(self.engine.stage, batch), partial(self._done, batch), top_t
        )
        outputs = Outputs.of(self.spec.task.forward(self.model, inputs), now, [])
        self.look_at_memory()
        return outputs, f"eager: {reason}"

    def _graphed(self, shape: Packing) -> tuple[GraphedForward, torch.Tensor]:
        memory = torch.empty(shape.nbytes, dtype=torch.uint8, device=self._device)
        forward = partial(self.spec.task.forward, self.model)
        return GraphedForward(forward, *shape.views(memory), self._current, self._pool, self._recording), memory
