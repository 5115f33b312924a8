"""What wrong and missing names cost: `python -m tests.store.wrong_names TRACE BATCH ROWS KEPT BUDGET [BUDGET ...]`

Moves over the fewest of a GPU's own copy engine whose copies end as soon as they are decided (at_once.py), with the true tables,
with KEPT of their names left right (predictor.baselines.Worsened), with the wrong ones among these taken out, and with the missing
ones put in. The second of two rounds over ROWS rows counts. TRACE: what `train` writes with predictor.kind=oracle; budgets are
shares of the experts, 0 to 1. Counts, not times; docs/benchmarks.md has what came out.
"""

from __future__ import annotations

import sys

from pipeline.bench.limit import fewest_moves
from store.simulator import Tables
from tests.store.at_once import play
from tests.store.timed_lanes import AHEAD, history, right_names


def main(trace: str, batch: str, rows: str, kept: str, *budgets: str) -> None:
    size, count = int(batch), int(rows) // int(batch)
    shape, uses, worsened = history(trace, size, count, float(kept))
    _, _, true = history(trace, size, count, 1.0)
    sure = [[[(expert, 1.0) for expert, _ in layer] for layer in table] for table in worsened]
    pairs = [list(zip(named, used, strict=True)) for named, used in zip(sure, uses, strict=True)]
    all_of = [[sorted({*named, *((expert, 1.0) for expert in used)}) for named, used in table] for table in pairs]
    tables: dict[str, Tables] = {
        "true": true,
        "worsened": sure,
        "wrong names known": right_names(sure, uses),
        "missing names known": all_of,
    }
    sequence = [[(i, expert) for expert in layer] for layers in uses for i, layer in enumerate(layers)]
    for budget in budgets:
        slots = int(sum(shape.experts) * float(budget))
        fewest = fewest_moves(sequence, slots)
        said = []
        for name, made in tables.items():
            moved, _ = play(shape.experts, slots, "lookahead", [*uses, *uses], [*made, *made], AHEAD[size])
            said.append(f"{name} {sum(moved[count:]) / fewest:.3f}")
        print(f"batch {size}, {float(budget):.0%}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
