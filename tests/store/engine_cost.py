"""What the GPU's copy engine costs in Python: `python -m tests.store.engine_cost TRACE BATCH BUDGET [KEPT]`

Its copies end as soon as they are decided (at_once.py), so that nothing of a device is in it. Rounds over the first batches of
TRACE (`train` with predictor.kind=oracle), of BATCH rows, with slots for a share BUDGET of the experts and tables of which KEPT is
left right (predictor.baselines.Worsened), 1 if not given. For each call of each batch the least of all rounds but the first counts,
so that whoever else uses the machine does not. Prints microseconds per batch by what forwards call, and a digest of what moved: an
engine that only became faster has the same. docs/benchmarks.md has what came out. A try, not a test.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from store.simulator import Moves
from tests.store.at_once import AtOnce
from tests.store.timed_lanes import AHEAD, BATCHES, history

ROUNDS = 12
CALLS = ("plan", "stage", "read", "passed", "demand", "finish", "counted")


def timed(engine: AtOnce, spent: Counter[str]) -> None:
    """Adds up what the calls that forwards make take. (`read` and `passed` do the copy thread's work, too.)"""

    def wrapped(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments)
            finally:
                spent[name] += time.perf_counter() - start

        return outer

    for name in CALLS:
        setattr(engine, name, wrapped(name, getattr(engine, name)))


def main(trace: str, batch: str, budget: str, kept: str = "1") -> None:
    rows = int(batch)
    shape, uses, tables = history(trace, rows, BATCHES[rows], float(kept))
    engine = AtOnce(shape.experts, int(sum(shape.experts) * float(budget)), "lookahead", may_doubt=True)
    spent: Counter[str] = Counter()
    timed(engine, spent)
    each, ahead = len(uses), AHEAD[rows]
    least: list[dict[str, float]] = [{} for _ in uses]
    moved = []
    for planned in range(each * ROUNDS + ahead):
        spent.clear()
        engine.plan(planned, tables[planned % each])
        if (now := planned - ahead) < 0:
            continue
        engine.run(now, uses[now % each], engine.is_doubted(now))
        moved.append(Moves.of([engine.take()]).moves)
        if now >= each:
            known = least[now % each]
            known.update({name: min(spent[name], known.get(name, np.inf)) for name in CALLS})
    means = {name: float(np.mean([one[name] for one in least])) * 1e6 for name in CALLS}
    said = ", ".join(f"{name} {us:.0f}" for name, us in means.items())
    digest = hashlib.sha1(repr(moved).encode()).hexdigest()[:10]
    print(f"{sum(means.values()):.0f} us per batch: {said}; {np.mean(moved[each:]):.1f} moves per batch, digest {digest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
