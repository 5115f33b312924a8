"""Why a GPU's link is idle: `python -m tests.pipeline.idle_link CASE CONFIG [key=value ...]`

CASE: BATCH:BUDGET:KEPT:BATCHES, as in in_turn.py. After rounds to warm up there is one in which every copy is noted, and what copy
thread and compute thread do. It prints, in ms per batch: the time between copies, how much of it lies before the next was decided
(the rest is the device's: a withdrawal that was not reached yet), and what both threads did in it. `python` is running, or waiting
for Python's lock, `lock` waiting for the engine's, `rest` that nothing may be copied, as a layer is being enqueued or bounds forbid
it, `sync` waiting for the copy that ends next. Noting costs time itself (some tenths of a millisecond per batch).
"""

from __future__ import annotations

import bisect
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bench.in_process import InProcess
from pipeline.bench.workload import Combination, Workload, experts_used, record_batches
from pipeline.config import load_config
from pipeline.gpu import on_gpu, work
from pipeline.prepare import prepare
from predictor import traces
from predictor.actor import timed
from predictor.baselines import Oracle, Worsened
from store import lanes
from store.actor import ExpertStore
from store.copy_thread import CopyThread
from store.device_copies import DeviceCopyEngine

WARM_UP = 6

Log = list[tuple[int, str]]
"""When, time.time_ns(), somebody began to do what."""


class Notes:
    """What was done from `begin` on."""

    def __init__(self) -> None:
        self.begun = False
        self.copier: Log = []
        self.compute: Log = []
        self.copies: list[tuple[int, Any]] = []  # when it was decided, its mark

    def note(self, log: Log, what: str) -> None:
        if self.begun:
            log.append((time.time_ns(), what))


def watch(notes: Notes) -> None:
    """Puts itself between the engine, its threads and its lanes."""
    fill = lanes.CudaLanes.fill

    def noted_fill(self: Any, key: Any, slot: int) -> Any:
        mark = fill(self, key, slot)
        if notes.begun:
            notes.copies.append((time.time_ns(), mark))
        return mark

    def noted_work(self: Any) -> None:
        """CopyThread._work, in which the same happens in the same order."""
        try:
            while True:
                notes.note(notes.copier, "lock")
                with self._changed:
                    notes.note(notes.copier, "python")
                    if self._begin():
                        continue
                    if not self._under_way:
                        if self._closed:
                            return
                        self._at_rest = True
                        self._changed.notify_all()
                        notes.note(notes.copier, "rest: enqueuing" if self._enqueuing else "rest")
                        self._changed.wait()
                        continue
                self._land()
        except BaseException as error:
            self._fail(error)
            raise

    def noted_land(self: Any) -> None:
        notes.note(notes.copier, "sync: lane full" if len(self._under_way) >= self._depth else "sync")
        self._under_way[0][1].wait()
        notes.note(notes.copier, "lock")
        with self._changed:
            notes.note(notes.copier, "python")
            self._landed(*self._under_way.popleft())
            while self._under_way and self._under_way[0][1].is_reached():
                self._landed(*self._under_way.popleft())
            if not self._is_held():
                self._changed.notify_all()

    def noted(inner: Callable, name: str, then: str = "python") -> Callable:
        def outer(*arguments: Any) -> Any:
            notes.note(notes.compute, name)
            try:
                return inner(*arguments)
            finally:
                notes.note(notes.compute, then)

        return outer

    patched: Any = lanes.CudaLanes
    patched.fill = noted_fill
    patched = CopyThread
    patched._work, patched._land = noted_work, noted_land
    for name in ("stage", "read", "passed", "finish", "is_ready"):
        setattr(DeviceCopyEngine, name, noted(getattr(DeviceCopyEngine, name), name))
    patched = on_gpu.OnGPU
    patched.wait_for_room = noted(on_gpu.OnGPU.wait_for_room, "room")
    patched = on_gpu.cuda
    patched.launch = noted(on_gpu.cuda.launch, "launch")
    patched = work.GPUWork
    patched.start = noted(work.GPUWork.start, "python", then="no batch")


def shares(spans: Sequence[tuple[int, int]], log: Log, batches: int) -> str:
    """What was done in them, ms per batch."""
    times, told = [at for at, _ in log], Counter[str]()
    for begin, end in spans:
        which = bisect.bisect_right(times, begin) - 1
        while begin < end and which < len(log):
            until = min(end, times[which + 1]) if which + 1 < len(log) else end
            told[log[which][1] if which >= 0 else "?"] += until - begin
            begin, which = until, which + 1
    return ", ".join(f"{what} {ns / 1e6 / batches:.2f}" for what, ns in told.most_common())


def main(case: str, config_path: str, *overrides: str) -> None:
    size, budget, kept, count = case.split(":")
    config = load_config(Path(config_path), list(overrides))
    prepared = prepare(replace(config, batch=replace(config.batch, size=int(size))))
    prepared = replace(prepared, batches=prepared.batches[: int(count)])
    batches = len(prepared.batches)
    notes = Notes()
    watch(notes)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    try:
        arena = store.open()
        recorded, shape = record_batches(prepared), prepared.model.shape
        maker = Worsened(Oracle(traces.join(recorded), shape, shape.top_k), shape, float(kept), config.seed)
        tables = {"oracle": [timed(maker, batch.tokens) for batch in prepared.batches]}
        uses = [layer for trace in recorded for layer in experts_used(trace, shape.top_k)]
        given = Combination("sida", budget, "oracle")
        workload = Workload(prepared, arena, Path(), tables, {}, [], uses)
        running = InProcess(workload, given, replace(workload.executor_spec(given), policy="lookahead"))
        for _ in range(WARM_UP):
            running.run(prepared.batches)
        notes.begun = True
        seconds = running.run(prepared.batches).seconds
        notes.begun = False
        torch.cuda.synchronize()
        spans = np.array([mark.span() for _, mark in notes.copies])
        running.close()
    finally:
        store.close(config.store.keep)
    decided = np.array([at for at, _ in notes.copies])
    idle = [(int(a), int(b)) for a, b in zip(spans[:-1, 1], spans[1:, 0], strict=True) if b > a]
    late = np.clip(np.minimum(decided[1:], spans[1:, 0]) - spans[:-1, 1], 0, None).sum() / 1e6 / batches
    copies = (spans[:, 1] - spans[:, 0]) / 1e6
    each = f"{len(copies) / batches:.1f} copies of {np.median(copies):.4f} ms each"
    print(f"{case}: {seconds / batches * 1e3:.2f} ms per batch; {each}")
    print(f"  between copies: {sum(b - a for a, b in idle) / 1e6 / batches:.2f}, before the next was decided {late:.2f}")
    print(f"  the copy thread meanwhile: {shares(idle, notes.copier, batches)}")
    print(f"  the compute thread meanwhile: {shares(idle, notes.compute, batches)}")
    whole = [(int(spans[0, 0]), int(spans[-1, 1]))]
    print(f"  the copy thread all the time: {shares(whole, notes.copier, batches)}")
    print(f"  the compute thread all the time: {shares(whole, notes.compute, batches)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
