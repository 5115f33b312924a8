"""How a predictor is trained: the config's `train` section. Imports no torch: a config is read before what takes seconds is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from predictor.traces import TOP_T


@dataclass(frozen=True)
class TrainSettings:
    """The paper trains with lr 5e-5, constant, batch 64, ce_weight 0.005 "to converge"; these take a few epochs."""

    epochs: int = 12
    lr: float = 3e-3
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    """one_cycle: up to `lr` in the first third, then down to nothing."""
    patience: int | None = None
    """End after so many epochs without a better one; null: never."""
    batch_size: int = 64
    hidden: int = 128
    ce_weight: float = 0.005
    top_t: int = TOP_T
    holdout: float = 0.1
    """Share of rows that is never trained on: half of them choose the epoch and calibrate, every figure is of the other half."""
