"""What a batch would take on a GPU, without one: `python -m tests.store.timed_lanes TRACE BATCH BUDGET [KEPT [HOST_MS [known]]]`

The GPU's own copy engine over lanes that take as long as an H200 took (docs/results.md), by a clock that only counts: the same on
any machine, to the digit. Shows what a rule of the schedule makes of the link before a GPU is at hand. What it leaves out: that
kernels read an expert of many tokens more than once, and of the host all but HOST_MS.

TRACE: of a model of equal MoE layers (`train` with predictor.kind=oracle); BUDGET: a share of its experts, 0 to 1; KEPT: so many of
the true tables' names are left right (predictor.baselines.Worsened), 1 if not given; HOST_MS: of Python for each copy, and as much
for each layer's kernels, one at a time since its threads take turns; 0 if not given; known: which names are wrong, so that tables
are without them. docs/benchmarks.md has what came out beside what GPUs took. Tries, not a test: the figures are of the machine that
it is to stand for.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.bench.limit import fewest_moves
from pipeline.bench.workload import experts_used
from predictor import traces
from predictor.baselines import Oracle, Worsened
from predictor.tokens import RoutingShape
from store.simulator import Tables, Uses
from tests.store.lanes_by_clock import COPY_MS, Mark, Step, TimedEngine, TimedLanes

COMPUTE_MS = {1: 1.94, 8: 3.58, 64: 7.97}
"""Of a batch with all experts in slots, by its rows."""
ROUNDS, BATCHES, AHEAD = 3, {1: 64, 8: 16, 64: 4}, {1: 48, 8: 8, 64: 4}


def serve(engine: TimedEngine, lanes: TimedLanes, uses: Uses, tables: Tables, ahead: int, host_ms: float) -> list[tuple]:
    """Forwards as a GPU's Executor gives them; after each round the ms, those in which the link was used, those
    in which the copy lane waited for withdrawals, and the reads in place."""
    each, rounds, under_way = len(uses), [], deque[tuple]()
    experts, clock = max(layer.experts for layer in engine._arena.layout.layers), lanes.clock

    def answer(batch: int, found: list[set[int]], ended: Mark) -> None:
        clock.until(ended.is_reached)
        for layer, (used, there) in enumerate(zip(uses[batch % each], found, strict=True)):
            routed, hits = np.zeros((2, experts), dtype=np.int32)
            routed[list(used)], hits[list(there)] = 1, 1
            engine.counted(layer, routed, hits, routed, batch)

    def look() -> Step:
        rounds.append((clock.now, lanes.link_ms, lanes.copy.waited_ms, lanes.in_place))
        yield from ()

    for planned in range(each * ROUNDS + ahead):
        if planned < each * ROUNDS:
            engine.plan(planned, tables[planned % each])
        batch = planned - ahead
        if batch < 0:
            continue
        while len(under_way) > 1:
            answer(*under_way.popleft())
        if batch % each == 0:
            lanes.compute.give(look())
        layers = uses[batch % each]
        found: list[set[int]] = [set() for _ in layers]
        asks = engine.is_doubted(batch)
        whole = not asks and engine.is_ready(batch)
        for layer, used in enumerate(layers):
            left = {*used}
            if asks:
                clock.until(lanes.compute.mark().is_reached)
                engine.demand(batch, layer, sorted(used))
            while not whole and engine.stage(batch, layer):
                lanes.layer(layer, left, found[layer], last=False)
                engine.read(batch, layer)
            lanes.layer(layer, left, found[layer], last=True)
            if not whole:
                clock.spend(host_ms)
                engine.passed(batch, layer)
        if whole:
            engine.passed(batch, *range(len(layers)))
        engine.finish(batch)
        under_way.append((batch, found, lanes.compute.mark()))
    while under_way:
        answer(*under_way.popleft())
    lanes.compute.give(look())
    clock.until(lambda: len(rounds) > ROUNDS)
    return rounds


def history(trace: str, rows: int, batches: int, kept: float) -> tuple[RoutingShape, Uses, Tables]:
    """The first `batches` of so many rows: what routers chose, and tables of which so much is left right."""
    metadata = json.loads(traces.load_checked(Path(trace), "trace", None)[1]["shape"])
    shape = RoutingShape(**{key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()})
    whole = traces.load(Path(trace), shape, None)
    parts = [traces.select(whole, np.arange(i * rows, (i + 1) * rows), shape) for i in range(batches)]
    uses = [[[expert for _, expert in layer] for layer in experts_used(part, shape.top_k)] for part in parts]
    maker = Worsened(Oracle(traces.join(parts), shape, shape.top_k), shape, kept, seed=0)
    return shape, uses, [maker.predict(part.tokens).uses for part in parts]


def right_names(tables: Tables, uses: Uses) -> Tables:
    """What comes true of tables, for certain."""
    pairs = [list(zip(named, used, strict=True)) for named, used in zip(tables, uses, strict=True)]
    return [[[(expert, 1.0) for expert, _ in named if expert in used] for named, used in table] for table in pairs]


def main(trace: str, batch: str, budget: str, kept: str = "1", host: str = "0", wrong: str = "") -> None:
    rows, host_ms = int(batch), float(host)
    shape, uses, tables = history(trace, rows, BATCHES[rows], float(kept))
    if wrong == "known":
        tables = right_names(tables, uses)
    slots = int(sum(shape.experts) * float(budget))
    sequence = [[(i, expert) for expert in layer] for each in uses for i, layer in enumerate(each)]
    limit = max(fewest_moves(sequence, slots) / len(uses) * COPY_MS, COMPUTE_MS[rows])
    lanes = TimedLanes(COMPUTE_MS[rows], shape.layers)
    engine = TimedEngine(shape.experts, slots, lanes, host_ms)
    rounds = serve(engine, lanes, uses, tables, AHEAD[rows], host_ms)
    each = [[(after - before) / len(uses) for before, after in zip(*pair, strict=True)] for pair in pairwise(rounds[1:])]
    ms, link_ms, waited_ms, in_place = (statistics.median(column) for column in zip(*each, strict=True))
    link = f"the link is used for {link_ms:.2f} ms, copies wait for withdrawals {waited_ms:.2f} ms"
    print(f"{ms:.2f} ms, {ms / limit:.2f} x limit; {link}; {in_place:.1f} read in place")


if __name__ == "__main__":
    main(*sys.argv[1:])
