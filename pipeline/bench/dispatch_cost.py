"""What the driver spends on choosing an Executor, by how many there are: python -m pipeline.bench.dispatch_cost

One core's time, on made-up tables of Switch-base-256's sizes; docs/scaling.md goes by it.
"""

from __future__ import annotations

import random
import statistics
import time

import numpy as np

from pipeline.data import Batch
from pipeline.dispatch import Job, Lane, choose
from predictor.tokens import TokenBatch

LAYERS, EXPERTS, SLOTS, BATCHES = 6, 256, 307, 60


def choosing_ms(executors: int, used: int) -> float:
    """Median per batch.

    Args:
        used: experts that a table names per MoE layer.
    """
    chance = random.Random(0)
    lanes = [Lane(number, SLOTS, 8) for number in range(executors)]
    batch = Batch(0, np.array([0]), TokenBatch(((np.zeros(24, dtype=np.int64),),)))
    layers = [[tuple((e, 0.9) for e in chance.sample(range(EXPERTS), used)) for _ in range(LAYERS)] for _ in range(BATCHES)]
    jobs = [Job(batch, None, uses=tuple(uses)) for uses in layers]
    for lane in lanes:
        for job in chance.sample(jobs, 3):
            lane.sent(job)
    times = []
    for job in jobs:
        start = time.thread_time()
        chosen = choose(lanes, job)
        assert chosen is not None
        chosen.sent(job)
        times.append(time.thread_time() - start)
        chosen.under_way.popleft()
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    for used in (19, 101):
        costs = ", ".join(f"{count}: {choosing_ms(count, used):.2f} ms" for count in (2, 8, 64, 800))
        print(f"{used} experts named per MoE layer; Executors: {costs}")
