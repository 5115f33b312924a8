"""One batch that is being written on a GPU: its prompt, and then a step for every token, recorded where the family allows it.

To the copy engine each forward is a batch of its own. The prompt runs eagerly; of the steps, which are recorded and how the next
one runs, replays.py says. Here they are given to the GPU one after the other, and what they have said is read when it is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.data import Batch
from pipeline.device import Answer
from pipeline.gpu.graphs import MASKS, Recorded
from pipeline.gpu.grouping import tiles_for
from pipeline.gpu.layers import DeviceForward
from pipeline.gpu.replays import Recording
from pipeline.gpu.work import GPUWork
from pipeline.inputs import Hear
from pipeline.predicting.next_layer import FIRST
from pipeline.tasks.fixed_step import FixedStep
from predictor.hash_table import HashTable
from predictor.stepping import Foresight
from store import cuda

if TYPE_CHECKING:
    from pipeline.gpu.on_gpu import OnGPU


@dataclass
class Said:
    """What a forward has said, on its way to the host.

    Attributes:
        ended: when all of it is there.
        tokens: int64 (rows,), what was chosen after it.
        counters: int32 (2, MoE layers, experts) (pipeline.gpu.layers.Counters).
        chosen: int16, of all MoE layers what their routers chose; None: nobody asks.
        awake: the rows that it was for, bool (rows,); None: all, it was the prompt's.
        pairs: of each MoE layer tokens x experts, those without expert counted: what tiles were chosen by.
        number: the forward's, to the engine.
    """

    ended: cuda.Event
    tokens: torch.Tensor
    counters: torch.Tensor
    chosen: torch.Tensor | None
    awake: np.ndarray | None
    pairs: list[int]
    number: int


class GPUWriting(GPUWork):
    """See `pipeline.device.Work`: all of it has run when `start` returns. What runs its forwards (pipeline.tasks.writing.Steps)."""

    def __init__(
        self, gpu: OnGPU, batch: Batch, table: HashTable | None, top_t: int | None, hear: Hear | None, foresight: Foresight | None
    ):
        super().__init__(gpu, batch, table, top_t)
        self._tokens_of, self._hears, self._foresight = batch.tokens, hear, foresight
        self._number = batch.index * gpu.spec.task.forwards
        self._last = self._number + gpu.spec.task.forwards - 1
        self._fixed: Recording | None = None
        self._ways: Counter[str] = Counter()
        self._under_way: deque[Said] = deque()
        # What the host knows: the newest tokens, the rows that go on behind them, and those that the forward under way is for.
        self._newest, self._on = np.zeros(0, dtype=np.int64), np.ones(0, dtype=bool)
        self._awake: np.ndarray | None = None
        self._replayed: Recorded | None = None
        self._missing: int | None = None  # bytes of experts that were in no slot when they were named; None: nobody asked
        if foresight is not None and gpu.replays is not None and gpu.replays.ahead is not None:
            foresight.layers = FIRST  # of the others the layer before says more

    def start(self) -> None:
        gpu = self._gpu
        assert gpu.replays is not None
        self._replays = gpu.replays
        gpu.wait_for_room()
        stream = gpu.stream.cuda_stream
        with torch.cuda.stream(gpu.stream):
            self._begun = cuda.Event(stream)
            inputs, tables = gpu.brought(self._host)
            masks = [inputs[name] for name in MASKS if name in inputs]
            gpu.counters.both.zero_()
            self._prompt = self._now = self._eagerly(masks, tables, self._top_t)
            self._ways["eager: a prompt"] += 1
            try:
                self._results = gpu.spec.task.forward(gpu.model, inputs, self)
                self._ended = cuda.Event(stream)
            finally:
                gpu.engine.finish(self._last)
        gpu.look_at_memory()
        gpu.under_way.append(self._ended)

    def answer(self) -> Answer:
        gpu = self._gpu
        gpu.wait_for(self._ended)
        clock = gpu.lanes.clock
        span = (clock.ns(self._begun), clock.ns(self._ended))
        return Answer(self._results, self._choices(), self._prompt.decisions, span, gpu.engine.take(), dict(self._ways))

    def fixed(self, model: PreTrainedModel, rows: int, most: int) -> FixedStep | None:
        self._fixed = self._replays.fixed(rows, most)
        return self._fixed.step if self._fixed is not None else None

    def next(self, tokens: torch.Tensor, awake: torch.Tensor, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        gpu, replays = self._gpu, self._replays
        gpu.engine.finish(self._number)
        self._number += 1
        self._awake, self._missing = self._on, None
        gpu.counters.both.zero_()  # of layers that a step does not reach
        whole = replays.goes_whole(len(tokens))
        if self._foresight is not None and not gpu.engine.is_complete:
            gpu.engine.plan(self._number, self._foresight.uses(self._newest, self._on))
        if self._fixed is None:
            self._ways[f"eager: {replays.why_not}"] += 1
            masks = [awake[:, None].to(torch.int64)] * len(self._tokens)
            self._now = self._eagerly(masks, None, None)
            return forward()
        step = self._fixed.step
        step.advance(tokens, awake)
        graphs = replays.recorded(self._fixed) if self._fixed.warm and self._fixed.why_not is None else None
        if graphs is None:
            reason = f"not recordable: {self._fixed.why_not}" if self._fixed.why_not else "first of its shape"
            self._ways[f"eager: {reason}"] += 1
            self._fixed.warm = True
            self._now = self._eagerly([step.inputs["attention_mask"]], None, None)
            return step.forward(step.inputs)
        if graphs.pieces is None or (whole and graphs.whole is not None):
            assert graphs.whole is not None
            return self._whole(graphs.whole)
        return self._pieces(graphs.pieces)

    def read(self, tokens: torch.Tensor) -> np.ndarray | None:
        gpu = self._gpu
        host = tokens.to("cpu", non_blocking=True)
        counters = gpu.counters.both.to("cpu", non_blocking=True)
        chosen = self._chosen_tensor()
        if chosen is not None:
            chosen = chosen.to("cpu", non_blocking=True)
        prompt = self._awake is None
        if prompt:
            self._chosen = chosen
        pairs = self._pairs if prompt else [len(tokens) * gpu.spec.model.shape.top_k] * gpu.spec.model.shape.layers
        ended = cuda.Event(gpu.stream.cuda_stream)
        self._under_way.append(Said(ended, host, counters, chosen, self._awake, pairs, self._number))
        if self._is_late and len(self._under_way) < 2:
            return None
        return self._settle(self._under_way.popleft())

    def left(self) -> list[np.ndarray]:
        return [self._settle(self._under_way.popleft()) for _ in range(len(self._under_way))]

    def hear(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        self._on = awake
        if self._hears is not None:
            self._hears(tokens, awake)

    # How

    @property
    def _is_late(self) -> bool:
        """Whether the host need not know a token before the next forward is given."""
        return self._gpu.engine.is_complete or not self._replays.asks

    def _eagerly(self, masks: list[torch.Tensor], tables: list | None, top_t: int | None) -> DeviceForward:
        """The forward that is about to run, its layers held until what is wanted for them is there."""
        number, engine = self._number, self._gpu.engine
        self._replayed = None

        def done(layer: int, in_part: bool) -> None:
            (engine.read if in_part else engine.passed)(number, layer)

        now = DeviceForward(masks, tables, partial(self._asked, number), partial(engine.stage, number), done, top_t)
        self._replays.enter(now)
        return now

    def _asked(self, number: int, layer: int, counts: torch.Tensor) -> None:
        """Wants whom a router has named, and then whom the next one would name."""
        if not self._replays.asks or self._gpu.engine.is_complete:
            return
        engine = self._gpu.engine
        now, then = self._replays.named(layer, counts)
        new = sum((at, expert) not in engine.slots for at, named in ((layer, now), (layer + 1, then)) for expert in named)
        self._missing = (self._missing or 0) + new * engine.slots.block_bytes((layer, 0))
        engine.demand(number, layer, now)
        if then:
            engine.expect(number, layer + 1, then)

    def _whole(self, recorded: Recorded) -> torch.Tensor:
        self._ways["whole"] += 1
        cuda.launch(recorded.pieces[0], self._gpu.stream.cuda_stream)
        self._gpu.engine.passed(self._number, *range(len(recorded.outputs.counts)))
        self._replayed = recorded
        return recorded.outputs.results

    def _pieces(self, recorded: Recorded) -> torch.Tensor:
        self._ways["pieces"] += 1
        engine, number, stream = self._gpu.engine, self._number, self._gpu.stream.cuda_stream
        cuda.launch(recorded.pieces[0], stream)
        for layer, (part, piece) in enumerate(zip(recorded.parts, recorded.pieces[1:], strict=True)):
            self._asked(number, layer, recorded.outputs.counts[layer])
            while engine.stage(number, layer):
                cuda.launch(part, stream)
                engine.read(number, layer)
            cuda.launch(piece, stream)
            engine.passed(number, layer)
        self._replayed = recorded
        return recorded.outputs.results

    def _chosen_tensor(self) -> torch.Tensor | None:
        """What the routers chose in the forward that has been given last; of a step only if somebody learns from it."""
        if self._awake is not None and (self._foresight is None or self._gpu.engine.is_complete):
            return None
        if self._replayed is not None:
            return self._replayed.outputs.chosen
        return torch.cat([layer.reshape(-1) for layer in self._now.chosen]) if self._now.chosen else None

    def _settle(self, said: Said) -> np.ndarray:
        """What a forward has said, now that it is on the host: its tokens."""
        said.ended.synchronize()
        self._count(said)
        if self._foresight is not None:
            if said.awake is None:
                self._foresight.begin(self._tokens_of, self._choices())
            elif said.chosen is not None:
                layers = said.chosen.numpy().reshape(-1, len(said.awake), self._gpu.spec.model.shape.top_k)
                self._foresight.learn([layer[said.awake] for layer in layers[: self._foresight.layers]], said.awake)
        self._newest = said.tokens.numpy()
        return self._newest

    def _count(self, said: Said) -> None:  # type: ignore[override]  # of one of many forwards
        engine, counters = self._gpu.engine, said.counters.numpy()
        missed = 0
        for layer, (pairs, shape) in enumerate(zip(said.pairs, self._gpu.shapes, strict=True)):
            routed, hits = counters[:, layer, : shape.experts]
            rows = tiles_for(pairs, shape).rows
            engine.counted(layer, routed, hits, -(-routed // rows), said.number)
            missed += int(((routed > 0) & (hits == 0)).sum()) * engine.slots.block_bytes((layer, 0))
        if said.awake is not None:
            self._replays.saw((missed if self._missing is None else self._missing) / len(said.pairs))
