"""A rank of a group: an Executor whose experts are its own share, and whose tokens go to the owners of the others.

All ranks run batches at the same time, each its own, and meet in every MoE layer (exchange.py). A batch of no rows takes part too:
it is what a rank gets that has none in the group's last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.batch_result import BatchResult
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.inputs import Inputs, Result
from pipeline.parallel.exchange import Exchange, Traffic
from pipeline.parallel.membership import Membership, leave
from pipeline.parallel.placement import EVERYWHERE, Assignment
from pipeline.tasks.registry import Task
from predictor.actor import Prediction
from predictor.tokens import TokenBatch

NEVER = 2**40
"""A batch that does not come: what it wants is wanted until it is in slots, however many batches have passed by then."""

Uses = list[list[tuple[int, float]]]
"""Per MoE layer (expert, probability that it is needed), likeliest first."""


def no_rows(index: int) -> Batch:
    """A batch to take part with."""
    nothing = np.empty(0, dtype=np.int64)
    return Batch(index, nothing, TokenBatch(((nothing,),)))


class Rank(Executor):
    """Run as a Ray actor or in a process of its own. Another rank's loss ends it: a group is started again as a whole."""

    def __init__(self, spec: ExecutorSpec, membership: Membership):
        """Waits until all ranks have come."""
        device = torch.device(spec.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._rank, self._assignment = membership.rank, membership.assignment
        self._own = self._assignment.own(self._rank)
        self._fits, self._filled = sum(map(len, self._own)) <= spec.slots, False
        self._exchange = membership.join(device)
        task = _InGroup(spec.task, self._exchange)
        super().__init__(replace(spec, task=task, exchange=self._exchange, number=membership.rank))

    def step(self, batch: Batch, routing: str, *predictions: Prediction | None) -> Future[BatchResult]:
        """Takes part in one step of the group, after those that it was given before.

        Args:
            batch: this rank's.
            predictions: of all ranks' batches, by rank: what comes from elsewhere needs experts here.
        """
        if self._fits and not self._filled:
            self._filled = True  # all of the share, once; nobody ever has to go
            self._device.plan(NEVER, [[(expert, 1.0) for expert in layer] for layer in self._own])
        elif not self._fits:
            self._device.plan(batch.index, uses_of(self._assignment, self._rank, predictions, routing))
        return self.submit(batch, predictions[self._rank], routing)

    def _plan(self, batch: int, prediction: Prediction, routing: str) -> None:
        """`step` has planned for all ranks."""

    @property
    def traffic(self) -> Traffic:
        return self._exchange.traffic

    def close(self) -> None:
        super().close()
        leave()


def uses_of(assignment: Assignment, rank: int, predictions: Sequence[Prediction | None], routing: str) -> Uses:
    """What the tables of all ranks want of the experts of one: likely if any of them needs it. A replica serves its own rank alone.

    Args:
        predictions: by rank.
    """
    shares: Uses = []
    for layer, owner in enumerate(assignment.owners):
        unneeded = np.ones(len(owner))
        for other, prediction in enumerate(predictions):
            for expert, p in prediction.table.uses_under(routing)[layer] if prediction is not None else ():
                if owner[expert] == rank or (owner[expert] == EVERYWHERE and other == rank):
                    unneeded[expert] *= 1 - p
        order = np.argsort(unneeded, kind="stable")
        shares.append([(int(expert), float(1 - unneeded[expert])) for expert in order if unneeded[expert] < 1])
    return shares


@dataclass(frozen=True)
class _InGroup:
    """A task whose forward ends when those of all ranks have; or that is no more than that."""

    task: Task
    exchange: Exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def inputs(self, batch: Batch, *more: Any) -> Inputs:
        if len(batch.rows):
            return self.task.inputs(batch, *more)
        return {name: torch.zeros(1, 1, dtype=torch.int64) for name in ("attention_mask", "decoder_attention_mask")}

    def forward(self, model: Any, inputs: Inputs, *more: Any) -> torch.Tensor:
        outputs = self.task.forward(model, inputs, *more) if "input_ids" in inputs else torch.empty(0)
        self.exchange.end()
        return outputs

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return self.task.results(batch, outputs) if len(batch.rows) else []
