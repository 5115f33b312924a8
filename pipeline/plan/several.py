"""What choosing an Executor by its experts saves: python -m pipeline.plan.several CONFIG.yaml [key.path=value ...]

Every batch goes to one of 2 and of 4 Executors by pipeline/dispatch.py, with the true tables and with none. A batch takes as
long as it has tokens. Of each Executor's batches those moves are counted that perfect foresight would need; and when the last ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.limit import fewest_moves
from pipeline.bench.workload import experts_used, record_batches
from pipeline.config import load_config
from pipeline.data import Batch
from pipeline.dispatch import Job, Lane, choose
from pipeline.prepare import prepare
from store.actor import ExpertStore
from store.layout import Key

LOOKAHEAD = 8


class Executors:
    """So many that are equally quick, and a clock that goes on when one ends a batch."""

    def __init__(self, count: int, slots: int):
        self.now = 0.0
        self.lanes = [Lane(number, slots, LOOKAHEAD, lambda: self.now) for number in range(count)]
        self._ends = [0.0] * count

    def send(self, job: Job, informed: bool) -> int:
        """Who gets it, once there is room.

        Args:
            informed: of its table, before it chooses.
        """
        asked = job if informed else Job(job.batch, None)
        while sum(lane.room for lane in self.lanes) <= 0 or (lane := choose(self.lanes, asked)) is None:
            self.end_one()
        number = self.lanes.index(lane)
        if not lane.under_way:
            self._ends[number] = self.now + job.tokens
        lane.sent(job)
        return number

    def end_one(self) -> None:
        number = min((n for n, lane in enumerate(self.lanes) if lane.under_way), key=self._ends.__getitem__)
        lane, self.now = self.lanes[number], max(self.now, self._ends[number])
        lane.answered(0.0)
        if lane.under_way:
            self._ends[number] = self.now + lane.under_way[0].tokens


def moves(
    batches: Sequence[Batch], used: Sequence[Sequence[Sequence[Key]]], count: int, slots: int, informed: bool
) -> tuple[float, float]:
    """Moves per use, and the time of the last end over that of a work perfectly divided.

    Args:
        used: per batch and MoE layer the experts that it reads.
    """
    executors = Executors(count, slots)
    sequences: list[list[Sequence[Key]]] = [[] for _ in range(count)]
    for batch, layers in zip(batches, used, strict=True):
        job = Job(batch, None, uses=[[(expert, 1.0) for _, expert in layer] for layer in layers])
        sequences[executors.send(job, informed)] += layers
    while any(lane.under_way for lane in executors.lanes):
        executors.end_one()
    uses = sum(len(layer) for sequence in sequences for layer in sequence)
    tokens = sum(Job(batch, None).tokens for batch in batches)
    return sum(fewest_moves(sequence, slots, 1) for sequence in sequences) / uses, executors.now / (tokens / count)


def main(arguments: list[str]) -> None:
    prepared = prepare(load_config(Path(arguments[0]), arguments[1:]))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    try:
        used = [experts_used(trace, prepared.model.shape.top_k) for trace in record_batches(prepared)]
    finally:
        store.close(prepared.config.store.keep)
    for count in (1, 2, 4):
        text = f"{count} Executors of {prepared.slots} slots"
        for informed in (False, True):
            per_use, stretched = moves(prepared.batches, used, count, prepared.slots, informed)
            how = "by their experts" if informed else "the least busy one"
            text += f"; {how}: {per_use:.3f} moves per use, {stretched:.3f} x the time"
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
