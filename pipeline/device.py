"""What an Executor runs on: one door to a CPU (on_cpu.py) and to a GPU (gpu/on_gpu.py).

Both keep experts in slots under a budget and the rest a read away, and give the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline.data import Batch
from pipeline.inputs import Hear
from pipeline.models import ModelSpec
from pipeline.parallel.exchange import Exchange
from pipeline.tasks.registry import Task
from predictor.hash_table import HashTable
from predictor.registry import PredictorSpec
from predictor.stepping import Foresight
from predictor.traces import LayerTrace
from store.movement import Movement


@dataclass(frozen=True)
class ExecutorSpec:
    """All that an Executor is made of; travels to it.

    Attributes:
        slots: how many experts fit the budget (store.slots.parse_budget).
        background: copy on a thread of its own; otherwise whenever a table or a layer comes.
        threads: for torch's operators.
        read_ahead: the arena lies on a disk: what the tables name is read into RAM ahead, and no GPU registers it.
        top_t: keep so many of the routers' probabilities per token, for a trace; None: no trace.
        predictor: made and asked in the Executor's own process; None: tables come with the batches, if at all.
        asks_routers: where a table decides, too, and heed no answer: for times that are to be those of exact routing.
        stepping: of a task that writes, the predictor that says before every step which experts its tokens will need; in the
            Executor's process, since a step has no time for another. None: nothing is said of them.
        number: which of a run's Executors it is, from 0.
        alone: it has its process to itself (pipeline/garbage.py).
        demand: on a GPU, copy what a router has named before its experts run, instead of reading it in place: for want of tables.
        exchange: with the owners of experts that are not here; put in by a Rank, in its own process (pipeline/parallel/rank.py).
    """

    model: ModelSpec
    task: Task
    arena: Path
    slots: int
    policy: str
    device: str
    threads: int
    background: bool = True
    demand: bool = False
    read_ahead: bool = False
    predictor: PredictorSpec | None = None
    stepping: PredictorSpec | None = None
    top_t: int | None = None
    asks_routers: bool = False
    exchange: Exchange | None = None
    number: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Answer:
    """What came out of one batch.

    Attributes:
        outputs: the task's, on the CPU.
        chosen: what the routers chose, per MoE layer int16 (tokens, top_k); empty under hash routing.
        decisions: the same with more of their probabilities, if that was asked for.
        span: when the device began and ended it, time.time_ns().
        moved: what has moved since the answer before.
        how: on a GPU "whole" or "pieces", as it ran as CUDA graphs, or "eager: " and why it did not; of a batch of several forwards
            each way with the number of them that ran so.
    """

    outputs: torch.Tensor
    chosen: list[np.ndarray]
    decisions: list[LayerTrace]
    span: tuple[int, int]
    moved: Movement
    how: str | dict[str, int] | None = None


class Work(Protocol):
    """One batch on its way. Made in any thread: what can be done ahead is done."""

    def start(self) -> None:
        """Hands it to the device. Batches start one after the other, in one thread, and may start before others have ended."""

    def answer(self) -> Answer:
        """Waits for it. After `start`, in the same order, in one thread, which may be another."""


class Device(Protocol):
    """A model that stands somewhere, and its experts."""

    @property
    def miss_path(self) -> str:
        """How an expert is reached that is in no slot: "in_place", or "staged: " and why it has to come into one first."""

    @property
    def memory_peak_bytes(self) -> int | None:
        """The most that torch has held on a GPU in this process; None: there is none."""

    def plan(self, batch: int, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Hears which experts a later batch will need (store.schedule.Schedule.plan). From any thread."""

    def prepare(
        self,
        batch: Batch,
        table: HashTable | None,
        top_t: int | None = None,
        hear: Hear | None = None,
        foresight: Foresight | None = None,
    ) -> Work:
        """Makes one batch ready to run. From any thread.

        Args:
            table: decides under hash routing; None: the routers decide.
            top_t: record so many of the routers' probabilities per token; None: only what they chose.
            hear: told of every new token, by tasks that make some.
            foresight: of such a task, asked before every forward but the first.
        """

    def close(self) -> None:
        """Stops copying. Nothing is on its way any more."""
