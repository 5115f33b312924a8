"""Static against dynamic gating at the sizes of Towards MoE Deployment: `python -m pipeline.bench.gating [--setting lm ...]
[--output DIR]`

The paper (arXiv 2303.06182) starts from capacity-padded gating and measures what sorting tokens by expert wins: whole models of
52 and 54.5 billion parameters on eight GPUs. Here one GPU holds one MoE layer of them, of random weights, and beside it the
dense layers that come with it: a slice of the model (a MoE layer every second or fourth). Nothing is sent between GPUs, which
the paper's factors include.

The layers are gating_layer.py's. The batch is doubled until memory runs out. Writes gating.json after every measurement, and
gating.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.bench.gating_layer import SETTINGS, Gating, Layer, Setting
from pipeline.bench.gating_report import markdown, summary
from pipeline.machine import hardware
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole

INDEX = 2**31
"""The kernels' index into what experts have between their two matmuls."""


def measure(setting: Setting, device: torch.device, dtype: torch.dtype, most: int, until: float) -> Iterator[dict[str, Any]]:
    """A row per batch size and kind: milliseconds and activation memory of the MoE layer alone and of the slice.

    Args:
        most: batch sizes go no further.
        until: time.perf_counter(): nothing new is begun after it.
    """
    layer = Gating(setting, device, dtype)
    width, hidden = setting.d_model, setting.d_ff

    def dense() -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, hidden, device=device, dtype=dtype), nn.ReLU(), nn.Linear(hidden, width, device=device, dtype=dtype)
        )

    others = [Layer(width, dense(), device, dtype) for _ in range(setting.every - 1)]
    for kind, gate in (("static", layer.static), ("dynamic", layer.dynamic)):
        whole = nn.Sequential(*others, Layer(width, gate, device, dtype))
        batch = 1
        while batch <= most and batch * setting.tokens * setting.top_k * setting.d_ff < INDEX:
            row = {"setting": setting.name, "kind": kind, "batch": batch, "tokens": batch * setting.tokens}
            if time.perf_counter() > until:
                yield row | {"left_out": "no time was left"}
                break
            inputs = torch.randn(batch, setting.tokens, width, device=device, dtype=dtype)
            try:
                alone, slice_ = (_timed(forward, inputs, until) for forward in (gate, whole))
            except RuntimeError as error:
                full = isinstance(error, torch.OutOfMemoryError)
                yield row | {"left_out": "out of memory" if full else str(error).splitlines()[0]}
                break
            yield row | {
                "layer_ms": round(alone[0], 4),
                "layer_bytes": alone[1],
                "slice_ms": round(slice_[0], 4),
                "slice_bytes": slice_[1],
            }
            batch *= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def _timed(forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, until: float) -> tuple[float, int | None]:
    """Milliseconds, the median of several, and the bytes that it took beyond its input and weights: None on a CPU."""
    on_gpu = inputs.device.type == "cuda"
    forward(inputs)  # compiles
    taken = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(inputs)
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 200 and time.perf_counter() < until):
        start = time.perf_counter()
        forward(inputs)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), taken


def run(
    settings: list[Setting], output: Path, device: torch.device, dtype: torch.dtype, most: int, seconds: float
) -> dict[str, Any]:
    """Measures and writes; returns the report."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    report: dict[str, Any] = {"hardware": hardware(str(device)), "versions": versions(), "settings": [], "rows": []}
    for number, setting in enumerate(settings):
        rows: list[dict[str, Any]] = []
        report["settings"].append(asdict(setting))
        share = time.perf_counter() + seconds / (len(settings) - number)
        began = time.perf_counter()
        for row in measure(setting, device, dtype, most, share):
            rows.append(row)
            report["rows"].append(row)
            report["settings"][-1] = asdict(setting) | summary(setting, rows)
            print(row, flush=True)
            write_whole(output / "gating.json", json.dumps(report, indent=1) + "\n")
        seconds -= time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.empty_cache()
    text = markdown(report)
    print(text, end="")
    for path in (write_whole(output / "gating.md", text), output / "gating.json"):
        print(f"wrote {path}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, as runner.py's."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.gating", description="Static against dynamic gating.")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="of the paper; repeatable, all unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/gating"), help="a directory")
    parser.add_argument("--most", type=int, default=4096, help="the largest batch to try")
    parser.add_argument("--seconds", type=float, default=75, help="nothing new is begun after them")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: gating: these layers take 8.6 GB each, on a GPU; there is none here", file=sys.stderr)
        return 2
    settings = [SETTINGS[name] for name in options.setting or SETTINGS]
    run(settings, options.output, torch.device("cuda"), torch.bfloat16, options.most, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
