"""Where a predictor runs, and what it takes there: decided before anything starts."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.predicting.stand_ins import plan
from predictor.stand_ins import Plan
from predictor.traces import file_kind
from store.errors import SpaceError
from store.layout import ArenaLayout
from store.slots import parse_bytes


def choose_predictor_device(config: Config, device: str) -> str:
    """Where the predictor computes: "cpu" or "cuda:0" in the Predictor actor, or "executor".

    `auto` is the Predictor actor: on a GPU of its own for a rehearsal, where torch sees more than the Executors take, else on the
    CPU. A rehearsal with no GPU but theirs runs in their processes: two processes on one GPU take turns, and would hold the
    backbone twice.

    Args:
        device: the Executor's.

    Raises:
        ConfigError: a GPU of its own is wanted, and there is none.
    """
    wanted, gpus = config.predictor.device, torch.cuda.device_count() if device != "cpu" else 0
    if wanted == "cuda" and gpus <= config.executors:
        raise ConfigError(
            f"predictor.device: cuda is a GPU beside those of {config.executors} Executors, and torch finds {gpus}; "
            "write `executor` to share theirs, or `cpu`"
        )
    if wanted == "auto" and config.predictor.kind == "rehearsal" and gpus:
        wanted = "cuda" if gpus > config.executors else "executor"
    if wanted == "executor":
        return "executor"
    return "cuda:0" if wanted == "cuda" else "cpu"  # Ray shows an actor its own GPU as the first


def planned_stand_ins(config: Config, layout: ArenaLayout) -> tuple[Plan | None, int]:
    """What is to be made for a rehearsal, if anything, and the bytes of what it will hold.

    Made is what `predictor.path` does not hold: nothing is named there, or, as when only `predictor.kind` was changed, another
    kind's file, which is said.
    """
    if config.predictor.kind != "rehearsal":
        return None, 0
    path = Path(config.predictor.path) if config.predictor.path is not None else None
    if path is not None:
        kind = file_kind(path)
        if kind in (None, "stand_ins"):  # what is wrong with a file that cannot be read, check_predictor says
            return None, path.stat().st_size if path.is_file() else 0
        print(f"{path} holds a {kind}: the rehearsal makes stand-ins of its own ({config.predictor.stand_ins.kind})", flush=True)
    wanted = plan(config.predictor.stand_ins, layout)
    return wanted, wanted.nbytes


def slots_beside(nbytes: int, budget: str, layout: ArenaLayout, free: int) -> int:
    """The slots that a budget buys beside a predictor's stand-ins.

    Raises:
        SpaceError: they alone are more than the budget.
    """
    whole = parse_bytes(budget, layout.expert_bytes, free, "store.budget")
    if nbytes > whole:
        raise SpaceError(
            f"store.budget: {budget!r} is {whole} bytes, the predictor's stand-ins on the same device take {nbytes}: "
            f"{nbytes - whole} bytes short; raise it, or lower predictor.stand_ins.budget"
        )
    return (whole - nbytes) // layout.slot_bytes
