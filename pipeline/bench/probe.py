"""What the link, the kernels and a warm start are good for here: `python -m pipeline.bench.probe CONFIG.yaml [key.path=value ...]`

Three questions that every other figure stands on, asked of the model's own arena on a GPU:

* the link: copies from the arena, registered, beside copies from pinned memory, block by block of several sizes;
* the kernels: one MoE layer with its experts in slots, and with the same experts read in place, over the link;
* a warm start: from an arena that is there to the first answer of an Executor, which registers it, builds the model and compiles
  what is not in Triton's cache.

Writes probe.json into `output_dir`. The arena stays if `store.keep` says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.workload import mapped
from pipeline.config import load_config
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.executor import Executor
from pipeline.expert_shape import ExpertShape
from pipeline.machine import hardware
from pipeline.prepare import Prepared, prepare
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from store import cuda
from store.actor import ExpertStore
from store.arena import Arena

BLOCKS = (2**16, 2**18, 2**20, 2**22, 2**26)
"""Bytes, beside the model's own block."""
GOES = 7
MOST_BYTES = 2**30
"""Of the arena that a go copies."""


def run(given: Path, overrides: list[str]) -> dict[str, Any]:
    """
    Returns: what is written; times in milliseconds, rates in 10^9 bytes per second.

    Raises:
        ConfigError: the device is a CPU.
    """
    config = load_config(given, overrides)
    prepared = prepare(config)
    if prepared.device == "cpu":
        raise ConfigError("device: cpu; the link and the kernels that this asks for are a GPU's")
    device = torch.device(prepared.device)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    try:
        arena = store.open(lambda done: None)
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # CUDA's context is not a part of anything below
        with mapped(prepared) as shared:
            link = _link(shared, prepared.layout.slot_bytes, device)
        start, shape = _start(prepared)
        with mapped(prepared) as shared:
            layer = _layer(shared, shape, device)
        found = {
            "hardware": hardware(prepared.device),
            "versions": versions(),
            "arena": {"bytes": arena.nbytes, "warm_start": arena.warm_start, "seconds": round(arena.seconds, 3)},
            "link": link,
            "layer": layer,
            "start": start,
        }
    finally:
        store.close(config.store.keep)
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "probe.json", json.dumps(found, indent=1) + "\n")
    return found


def _link(arena: Arena, block_bytes: int, device: torch.device) -> list[dict[str, float]]:
    """Copies of one block after the other, from the arena and from as much pinned memory, taking turns; medians over goes."""
    most = min(MOST_BYTES, arena.memory.numel())
    pinned = torch.empty(most, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(arena.memory[:most])
    target = torch.empty(max(*BLOCKS, block_bytes), dtype=torch.uint8, device=device)
    cuda.register(arena.memory.data_ptr(), arena.memory.numel(), device.index or 0)
    rows = []
    try:
        for nbytes in sorted(nbytes for nbytes in {*BLOCKS, block_bytes} if nbytes <= most):
            count = min(256, most // nbytes)
            rates: dict[str, list[float]] = {"arena": [], "pinned": []}
            for _ in range(GOES):
                for name, memory in (("arena", arena.memory), ("pinned", pinned)):
                    rates[name].append(count * nbytes / _seconds(_copies(memory, target, nbytes, count), device) / 1e9)
            there = {name: statistics.median(each) for name, each in rates.items()}
            rows.append({"block_bytes": nbytes, **there, "ratio": there["arena"] / there["pinned"]})
    finally:
        cuda.unregister(arena.memory.data_ptr())
    return rows


def _copies(memory: torch.Tensor, target: torch.Tensor, nbytes: int, count: int) -> Callable[[int], None]:
    def copy(stream: int) -> None:
        for i in range(count):
            cuda.copy_to_device(target.data_ptr(), memory.data_ptr() + i * nbytes, nbytes, stream)

    return copy


def _seconds(work: Callable[[int], None], device: torch.device) -> float:
    """On the GPU, from the first operation to the last."""
    stream = torch.cuda.Stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        begin.record()
        work(stream.cuda_stream)
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _layer(arena: Arena, shape: ExpertShape, device: torch.device) -> list[dict[str, float]]:
    """The first MoE layer with one token for each of so many experts: all in slots, and all in place."""
    block = arena.layout.layers[0].block.nbytes
    first = arena.layout.layers[0].expert_offset(0)
    host = cuda.register(arena.memory.data_ptr(), arena.memory.numel(), device.index or 0)
    rows = []
    try:
        for used in sorted({min(n, shape.experts) for n in (16, 64, shape.experts)}):
            slots = arena.memory[first : first + used * block].to(device)
            begin = slots.data_ptr()
            number = torch.arange(shape.experts, dtype=torch.int64, device=device)
            places = {"slots": begin + number * block, "in_place": host + first + number * block}
            hidden = torch.randn(used, shape.d_model, device=device, dtype=shape.dtype)
            experts, weights = number[:used, None].contiguous(), torch.ones(used, 1, device=device, dtype=shape.dtype)
            counters = torch.zeros(2, shape.experts, dtype=torch.int32, device=device)

            inputs = (hidden, experts, weights, counters)
            row: dict[str, float] = {"experts": used}
            for name, table in places.items():
                forward = partial(_forward, shape, table, (begin, begin + slots.numel()), *inputs)
                forward()  # compiles
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    forward()
                handle = graph.raw_cuda_graph_exec()
                seconds = statistics.median(_seconds(partial(cuda.launch, handle), device) for _ in range(GOES))
                row |= {f"{name}_ms": seconds * 1e3, f"{name}_gb_per_s": used * block / seconds / 1e9}
            rows.append(row)
    finally:
        cuda.unregister(arena.memory.data_ptr())
    return rows


def _forward(
    shape: ExpertShape,
    table: torch.Tensor,
    slots: tuple[int, int],
    hidden: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    from pipeline.gpu import grouping, kernels  # not on a machine without a GPU: they need Triton

    groups = grouping.group(experts, shape)
    output = kernels.room(hidden, groups)
    grouping.snapshot(groups, table, *slots, *counters)
    kernels.run(hidden, weights, groups, output)
    kernels.combine(output, 1)


def _start(prepared: Prepared) -> tuple[dict[str, Any], ExpertShape]:
    """Two starts of an Executor over the arena that is there: the first may compile kernels, the second finds them.

    Returns: their times, and what the first MoE layer's experts look like.
    """
    starts = []
    batch = prepared.batches[0]
    for _ in range(2):
        begun = time.perf_counter()
        executor = Executor(replace(prepared.executor_spec(), predictor=None))
        try:
            executor.ready()
            shape = executor._device.shapes[0]  # type: ignore[attr-defined]
            ready = time.perf_counter()
            executor.execute(batch, None)
            answered = time.perf_counter()
            executor.execute(
                replace(batch, index=batch.index + 1), None
            )  # its shape is known now: as a graph, which is recorded here
            again = time.perf_counter()
        finally:
            executor.close()
        times = {"ready": ready - begun, "first_batch": answered - ready, "second_batch": again - answered}
        starts.append({name: round(seconds * 1e3, 1) for name, seconds in times.items()})
    allowed = 2000 + 60 * prepared.layout.expert_bytes / 1e9
    return {"cold_kernels_ms": starts[0], "warm_kernels_ms": starts[1], "aim_ms": round(allowed, 1)}, shape


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, as runner.py's."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.probe", description="What link, kernels and start are good for."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="any config that has a model and data; device: a GPU")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the config")
    options = parser.parse_intermixed_args(arguments)
    try:
        print(json.dumps(run(options.config, options.overrides), indent=1))
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(main))
