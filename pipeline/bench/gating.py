"""Static against dynamic gating at the sizes of Towards MoE Deployment: `python -m pipeline.bench.gating [--setting lm ...]
[--output DIR]`

The paper (arXiv 2303.06182) starts from capacity-padded gating and measures what sorting tokens by expert wins: whole models of
52 and 54.5 billion parameters on eight GPUs. Here one GPU holds one MoE layer of them, of random weights, and beside it the
dense layers that come with it: a slice of the model (a MoE layer every second or fourth). Nothing is sent between GPUs, which
the paper's factors include.

Both kinds get the same router, tokens and weights. `static` is static_gating.py; `dynamic` this project's grouping and kernels,
on a CPU a plain loop. The batch is doubled until memory runs out. Writes gating.json after every measurement, and gating.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.bench.static_gating import StaticExperts, waste_factor
from pipeline.expert_shape import ExpertShape
from pipeline.machine import hardware
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.routing import Routing
from store.layout import BlockLayout

HEADS = 16
INDEX = 2**31
"""The kernels' index into what experts have between their two matmuls."""


@dataclass(frozen=True)
class Setting:
    """One of the paper's models, as far as a slice of it goes.

    Attributes:
        every: MoE layers are every so many-th; the others of the slice are dense.
        tokens: of a sequence in one forward. The paper does not say; these make its own activation memory at batch 8 about what
            the static layer takes here. A decoder has one.
        capacity: the paper's capacity factor: places per expert, as a share of the tokens.
        paper: its factor of throughput on one node, and activation memory in GB at batch 8, static and dynamic.
    """

    name: str
    experts: int
    d_model: int
    d_ff: int
    every: int
    tokens: int
    capacity: float
    paper: dict[str, float]
    top_k: int = 2

    @property
    def waste(self) -> float:
        return waste_factor(self.experts, self.top_k, self.capacity)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("lm", 512, 1024, 4096, 2, 1024, 0.05, {"factor": 6.21, "static_gb": 6.29, "dynamic_gb": 1.28}),
        Setting("mt-encoder", 128, 2048, 8192, 4, 32, 1.0, {"factor": 5.75, "static_gb": 1.89, "dynamic_gb": 1.05}),
        Setting("mt-decoder", 128, 2048, 8192, 4, 1, 1.0, {"factor": 2.58}),
    )
}


class Layer(nn.Module):
    """A layer of the slice: attention, and then `after`, both added to what comes in."""

    def __init__(self, width: int, after: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self._attention = nn.MultiheadAttention(width, HEADS, batch_first=True, device=device, dtype=dtype)
        self._norms = nn.ModuleList(nn.LayerNorm(width, device=device, dtype=dtype) for _ in range(2))
        self._after = after

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norms[0](hidden)
        hidden = hidden + self._attention(normed, normed, normed, need_weights=False)[0]
        return hidden + self._after(self._norms[1](hidden))


class Gating:
    """One MoE layer of random weights: a router, and experts of two matrices with a relu between, all in one piece of memory."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        name = str(dtype).removeprefix("torch.")
        self._setting, width = setting, (setting.d_model, setting.d_ff)
        block = BlockLayout.of({"up": (width[::-1], name), "down": (width, name)})
        self.memory = torch.empty(setting.experts * block.nbytes, dtype=torch.uint8, device=device)
        self.memory.view(dtype).normal_(std=0.02)
        self._router = torch.randn(setting.experts, setting.d_model, device=device, dtype=dtype)
        offsets = {part.name: part.offset for part in block.parts}
        self._shape = ExpertShape(setting.experts, *width, dtype, up=offsets["up"], down=offsets["down"])
        blocks = self.memory.view(setting.experts, block.nbytes)
        self._weights = {
            part.name: blocks[:, part.offset : part.offset + part.nbytes].view(dtype).view(setting.experts, *part.shape)
            for part in block.parts
        }
        start = self.memory.data_ptr()
        self._table = torch.arange(setting.experts, device=device) * block.nbytes + start
        self._span = (start, start + self.memory.numel())
        self._counted = torch.zeros(2, setting.experts, dtype=torch.int32, device=device)

    def route(self, hidden: torch.Tensor) -> Routing:
        """The first two of a softmax, their shares made to add to 1."""
        shares = (hidden @ self._router.T).float().softmax(-1)
        weights, chosen = shares.topk(self._setting.top_k)
        return Routing(chosen, (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype), chosen, None)

    def static(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = StaticExperts(_two_matrices, self._weights, self._setting.capacity)  # type: ignore[arg-type]
        return experts(flat, lambda: self.route(flat)).view_as(hidden)

    def dynamic(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(flat)
        out = self._grouped(flat, routing) if flat.device.type == "cuda" else self._looped(flat, routing)
        return out.view_as(hidden)

    def _grouped(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        from pipeline.gpu import grouping, kernels  # not on a machine without Triton

        groups = grouping.group(routing.experts, self._shape)
        output = kernels.room(hidden, groups)
        grouping.snapshot(groups, self._table, *self._span, *self._counted)
        kernels.run(hidden, routing.weights, groups, output)
        return kernels.combine(output, self._setting.top_k)

    def _looped(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in routing.experts.unique().tolist():
            token, place = (routing.experts == expert).nonzero(as_tuple=True)
            result = _two_matrices({name: part[expert] for name, part in self._weights.items()}, hidden[token])
            out.index_add_(0, token, result * routing.weights[token, place, None])
        return out


def _two_matrices(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(nn.functional.linear(tokens, weights["up"]).relu(), weights["down"])


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


def summary(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the paper says of a setting beside what was measured here."""
    done = {
        kind: {row["batch"]: row for row in rows if row["kind"] == kind and "layer_ms" in row} for kind in ("static", "dynamic")
    }
    both = sorted(done["static"].keys() & done["dynamic"].keys())
    if not both:
        return {"setting": setting.name, "waste": setting.waste, "paper": setting.paper, "largest_batch": None}

    def best(kind: str, what: str) -> float:
        return max(row["tokens"] / row[what] for row in done[kind].values())

    at = {batch: {kind: done[kind][batch] for kind in done} for batch in both}
    ratios = {
        what: {batch: round(pair["static"][f"{what}_ms"] / pair["dynamic"][f"{what}_ms"], 2) for batch, pair in at.items()}
        for what in ("layer", "slice")
    }
    return {
        "setting": setting.name,
        "waste": round(setting.waste, 2),
        "paper": setting.paper,
        "largest_batch": {kind: max(done[kind]) for kind in done},
        "times_as_fast": ratios,
        "best_throughput": {
            what: round(best("dynamic", f"{what}_ms") / best("static", f"{what}_ms"), 2) for what in ("layer", "slice")
        },
        "slice_gb_at_8": {kind: _gb(done[kind].get(8, {}).get("slice_bytes")) for kind in done},
    }


def _gb(nbytes: int | None) -> float | None:
    return None if nbytes is None else round(nbytes / 1e9, 2)


def markdown(report: dict[str, Any]) -> str:
    """gating.md: the paper's figures and these."""
    lines = [
        "| setting | waste factor | paper: times as fast | slice, at the same batch, up to | slice, best throughput of each "
        "| MoE layer alone, up to | paper: activations at batch 8, GB | slice at batch 8, GB | largest batch, static / dynamic |",
        "|" + "---|" * 9,
    ]
    for one in report["settings"]:
        if one["largest_batch"] is None:
            continue
        paper, gb, largest = one["paper"], one["slice_gb_at_8"], one["largest_batch"]
        said = f"{paper['static_gb']} / {paper['dynamic_gb']}" if "static_gb" in paper else "-"
        lines.append(
            f"| {one['setting']} | {one['waste']} | {paper['factor']} | {max(one['times_as_fast']['slice'].values())} "
            f"| {one['best_throughput']['slice']} | {max(one['times_as_fast']['layer'].values())} | {said} "
            f"| {gb['static']} / {gb['dynamic']} | {largest['static']} / {largest['dynamic']} |"
        )
    return "\n".join(lines) + "\n"


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
