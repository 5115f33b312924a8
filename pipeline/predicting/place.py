"""Where a predictor runs, and what it takes there: decided before anything starts."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.errors import ConfigError, StandInsError
from pipeline.predicting.stand_ins import plan
from predictor.stand_ins import Plan
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


def planned_stand_ins(config: Config, layout: ArenaLayout, beside: int | None) -> tuple[Plan | None, int]:
    """What is to be made for a rehearsal, if anything, and the bytes of what it will hold.

    Args:
        beside: bytes of the budget that they count in; None: they lie elsewhere.
    """
    if config.predictor.kind != "rehearsal":
        return None, 0
    if config.predictor.path is not None:  # what is wrong with a file that cannot be used, check_predictor says
        path = Path(config.predictor.path)
        return None, path.stat().st_size if path.is_file() else 0
    wanted = plan(config.predictor.stand_ins, layout, beside)
    return wanted, wanted.nbytes


def slots_beside(nbytes: int, budget: str, layout: ArenaLayout, free: int) -> int:
    """The slots that a budget buys beside a predictor's stand-ins.

    Raises:
        StandInsError: they alone are more than the budget.
    """
    whole = parse_bytes(budget, layout.expert_bytes, free, "store.budget")
    if nbytes > whole:
        raise StandInsError(
            f"store.budget: {budget!r} is {whole} bytes, the predictor's stand-ins on the same device take {nbytes}: "
            f"{nbytes - whole} bytes short; raise it, or lower predictor.stand_ins.budget"
        )
    return (whole - nbytes) // layout.slot_bytes
