"""What the Executor hands back of a batch: results, and what it cost. What a batch has said before it is done, too."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import numpy as np

from pipeline.inputs import Hear, Result
from predictor.accuracy import Accuracy
from predictor.traces import Trace


@dataclass
class BatchStats:
    """What one batch did; plain data, so that it can be written to the journal. Times are time.time_ns()."""

    start: int
    end: int
    pid: int
    tokens: int
    predict_span: list[int] | None
    copy_spans: list[list[int]]
    hits: list[int]
    misses: list[int]
    prefetch_bytes: int
    demand_bytes: int
    read_in_place_bytes: int
    stall_ms: float
    resident: list[int]
    """Experts in slots per MoE layer, after the batch."""
    resident_peak_bytes: int
    predicted_uses: float
    """Distinct (MoE layer, expert) pairs that the batch's table expects."""
    executor: int = 0
    """Which of the run's Executors, from 0."""
    born: int = 0
    """When its process began."""
    queued: int = 0
    """Batches that it had been sent besides, when this one's answer came."""
    predictor_pid: int | None = None
    """Which process made the table."""
    device_memory_peak_bytes: int | None = None
    """On a GPU, the most that torch has held there so far."""
    how: str | dict[str, int] | None = None
    """On a GPU, `pipeline.device.Answer.how`."""
    miss_path: str = "in_place"
    """`pipeline.device.Device.miss_path`."""
    first_token_ms: float | None = None
    """Of a task that generates, from the batch's start to the first new token of each row."""
    token_ms: list[float] = field(default_factory=list)
    """The same for each further step."""
    new_tokens: int = 0
    """Of all rows."""
    accuracy: Accuracy = field(default_factory=Accuracy)
    load: list[list[int]] = field(default_factory=list)
    """Per MoE layer, tokens that the router gave each expert; empty under hash routing."""
    predicted_load: list[list[int]] = field(default_factory=list)
    """The same by the table's first choice."""

    @property
    def moves(self) -> int:
        """Experts that crossed the link since the batch before: copied or read in place."""
        return sum(experts for _, _, experts in self.copy_spans) + sum(self.misses)


@dataclass(frozen=True)
class BatchResult:
    """What comes back of a batch."""

    batch: int
    results: list[Result]
    stats: BatchStats
    trace: Trace | None = None
    """What the routers decided, if that is to be saved."""

    def to_dict(self) -> dict:
        """One line of the journal: all but the trace."""
        return {"batch": self.batch, "results": self.results, "stats": asdict(self.stats)}


class Spoken:
    """What a batch has generated so far, and when, time.time_ns(): see `pipeline.inputs.Hear`."""

    def __init__(self, hear: Hear | None):
        self._hear = hear
        self.times: list[int] = []
        self.tokens: list[list[int]] = []

    def __call__(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        self.times.append(time.time_ns())
        self.tokens.append(tokens.tolist())
        if self._hear is not None:
            self._hear(tokens, awake)
