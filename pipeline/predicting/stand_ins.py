"""Where a rehearsal's stand-ins come from: a file that `train` wrote, or made of the arena's experts once and kept.

What is made without training depends on the weights alone: it is kept in a cache by the arena's fingerprint, written beside its
place and renamed, so that nobody sees half of it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from pipeline.config import StandInConfig
from pipeline.progress import bar
from predictor import stand_ins
from predictor.errors import PredictorError
from predictor.stand_ins import Plan, Shapes, StandIns
from store.arena import Arena
from store.layout import ArenaLayout
from store.slots import parse_bytes

QUARTER, FIFTH = 4, 5
"""`predictor.stand_ins.budget: auto`: a quarter of all expert bytes, but at most a fifth of a budget that they have to share."""
BEST = ("4bit", "svd", "none")
"""`predictor.stand_ins.kind: auto`: the first that fits. Not 2bit: with as many bytes svd predicts better (docs/prediction.md)."""


def plan(config: StandInConfig, layout: ArenaLayout, beside: int | None = None) -> Plan:
    """
    Args:
        beside: bytes of the budget that they count in; None: they lie elsewhere.

    Raises:
        PredictorError, SpaceError: the budget is none, or too small.
    """
    if config.budget == "auto":
        budget_bytes = min(layout.expert_bytes // QUARTER, layout.expert_bytes if beside is None else beside // FIFTH)
    else:
        budget_bytes = parse_bytes(config.budget, layout.expert_bytes, layout.expert_bytes, "predictor.stand_ins.budget")
    experts = tuple(layer.experts for layer in layout.layers)
    if config.kind != "auto":
        return stand_ins.plan(config.kind, budget_bytes, experts, shapes(layout))
    for kind in BEST[:-1]:
        with contextlib.suppress(PredictorError):
            return stand_ins.plan(kind, budget_bytes, experts, shapes(layout))
    return stand_ins.plan(BEST[-1], budget_bytes, experts, shapes(layout))


def shapes(layout: ArenaLayout) -> list[Shapes]:
    """Per MoE layer and part, the shape of one expert's tensor."""
    return [{part.name: part.shape for part in layer.block.parts} for layer in layout.layers]


def make(wanted: Plan, arena: Arena, device: str) -> StandIns:
    """Of an arena's experts, computed on a device, where that takes seconds; they end on the CPU, and nothing is left there."""
    if device == "cpu":
        return _make(wanted, arena, torch.device(device))
    try:
        return _make(wanted, arena, torch.device(device))
    except torch.cuda.OutOfMemoryError:
        print(f"{device} has no room to make stand-ins on: the CPU makes them, in minutes", flush=True)
        return _make(wanted, arena, torch.device("cpu"))
    finally:
        torch.cuda.empty_cache()  # the Executor, another process, has reckoned with it


def _make(wanted: Plan, arena: Arena, device: torch.device) -> StandIns:

    def read(layer: int, part: str, experts: slice) -> torch.Tensor:
        layout = arena.layout.layers[layer]
        some = range(layout.experts)[experts]
        return torch.stack([layout.block.views(arena.block(layer, expert))[part] for expert in some]).to(device)

    parts = sum(len(layer) for layer in shapes(arena.layout)[:-1])
    with bar(f"making {wanted.method} stand-ins", parts, unit="part") as shown:
        experts = tuple(layer.experts for layer in arena.layout.layers)
        return stand_ins.make(wanted, experts, shapes(arena.layout), read, shown.update)


def cached(wanted: Plan, arena: Arena, device: str, directory: Path | None = None) -> Path:
    """The file of these stand-ins, made on that device if it is not there. One that is damaged is made anew, and that is said."""
    fingerprint = arena.path.name.rsplit("-", 1)[-1]
    path = (directory or cache_directory()) / f"{fingerprint}-{wanted.method}-{wanted.size}.safetensors"
    if path.exists():
        try:
            stand_ins.load(path, len(arena.layout.layers), arena.identity)
            return path
        except PredictorError as error:
            print(f"{error}; making it anew", flush=True)
    stand_ins.save(make(wanted, arena, device), path, arena.identity)
    return path


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sida-moe"
