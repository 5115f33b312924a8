"""What a run has lost on its way, and what had to be done again for it. Plain data: it goes into the journal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("executor", "predictor", "store", "machine", "driver")


@dataclass(frozen=True)
class Loss:
    """One process or machine that was there, and was not any more.

    Attributes:
        what: one of KINDS.
        name: for people.
        redone: batches that it had been sent and that were sent again, answered or not.
        at: when that was noticed, time.time_ns().
    """

    what: str
    name: str
    redone: int = 0
    at: int = field(default_factory=time.time_ns)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Told = Callable[[Loss], None]


def loss_metrics(losses: Iterable[Loss]) -> dict[str, Any]:
    """What metrics.json says: how many of each kind, batches that were sent again, and each loss in its order."""
    every = sorted(losses, key=lambda loss: loss.at)
    counts = Counter(loss.what for loss in every)
    each = [{key: value for key, value in loss.to_dict().items() if key != "at"} for loss in every]
    return {f"{kind}s": counts[kind] for kind in KINDS} | {"batches_redone": sum(loss.redone for loss in every), "each": each}
