"""Which rows go together: those whose tables name the same experts, so that a batch, and its neighbours, need fewer of them.

A row is a vector of how likely it uses each (MoE layer, expert). A batch is expected to use an expert unless none of its rows does;
the sum of that over experts and batches is what grouping makes small: greedily at first, then by swapping rows between batches
as long as that helps. At last the batches are put into an order in which each shares much with the one before it, whose experts
are in slots. Knows no rows but their vectors, no policy and no budget.
"""

from __future__ import annotations

import numpy as np

CERTAIN = 0.999
"""No use is more certain than this: what is divided out of a batch must not be zero."""
KEPT = 0.7
"""How much of a batch's experts one counts on a batch later; a batch later again, the square of it."""
PASSES = 4
WORTH = 1e-3
"""Expected uses: a smaller gain is rounding."""


def group(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into batches of `size`, the last one maybe smaller.

    The same for the same numbers: whatever is equally good, the first row wins.

    Args:
        rows: float (rows, experts of all MoE layers): the probability that the row uses the expert.

    Returns:
        Row numbers of each batch, ascending within it, in the order of execution.
    """
    unused = 1 - np.minimum(rows, CERTAIN).astype(np.float64)  # (rows, experts)
    batch_of = _greedy(unused, size)
    if 1 < size < len(rows):
        _swap(unused, batch_of)
    batches = [np.flatnonzero(batch_of == b) for b in range(batch_of.max() + 1)]
    short = [batches.pop()] if len(batches[-1]) < size else []  # a batch that is not full stays last, so that all numbers are known
    needs = [1 - unused[batch].prod(axis=0) for batch in batches]
    ordered, recent = [], np.zeros(rows.shape[1])
    while batches:
        at = int(np.argmax([need @ recent / max(need.sum(), 1e-9) for need in needs]))
        ordered.append(batches.pop(at))
        recent = np.maximum(needs.pop(at), KEPT * recent)
    return ordered + short


def expected_uses(rows: np.ndarray, batches: list[np.ndarray]) -> float:
    """Distinct experts that the batches are expected to use, added up: what `group` makes small."""
    unused = 1 - np.minimum(rows, CERTAIN).astype(np.float64)
    return float(sum((1 - unused[batch].prod(axis=0)).sum() for batch in batches))


def _greedy(unused: np.ndarray, size: int) -> np.ndarray:
    """The batch of each row, int (rows,): to each batch comes the row of whose uses the largest share is already there."""
    used = 1 - unused
    total = np.maximum(used.sum(axis=1), 1e-9)
    batch_of, recent = np.full(len(unused), -1), np.zeros(unused.shape[1])
    for batch in range(-(-len(unused) // size)):
        nobody = np.ones(unused.shape[1])
        for place in range(size):
            there = recent if place == 0 else np.maximum(1 - nobody, recent / 2)
            left = np.flatnonzero(batch_of < 0)
            if not len(left):
                break
            row = left[int(np.argmax(used[left] @ there / total[left]))]
            batch_of[row] = batch
            nobody *= unused[row]
        recent = np.maximum(1 - nobody, KEPT * recent)
    return batch_of


def _swap(unused: np.ndarray, batch_of: np.ndarray) -> None:
    """Exchanges rows of different batches, in place, each for the best partner it has, until none gains."""
    rows = np.arange(len(unused))
    nobody = np.stack([unused[batch_of == b].prod(axis=0) for b in range(batch_of.max() + 1)])  # (batches, experts)
    others = nobody[batch_of] / unused  # (rows, experts): that no other row of its batch uses the expert
    for _ in range(PASSES):
        swapped = False
        for row in rows:
            # a batch's uses fall by what `nobody` rises; of both batches, with the rows exchanged and as they are
            with_partner = unused @ others[row] + others @ unused[row]
            now = nobody[batch_of[row]].sum() + nobody.sum(axis=1)[batch_of]
            gain = np.where(batch_of == batch_of[row], 0.0, with_partner - now)
            partner = int(np.argmax(gain))
            if gain[partner] <= WORTH:
                continue
            batch_of[row], batch_of[partner] = batch_of[partner], batch_of[row]
            for batch in (batch_of[row], batch_of[partner]):
                members = np.flatnonzero(batch_of == batch)
                nobody[batch] = unused[members].prod(axis=0)
                others[members] = nobody[batch] / unused[members]
            swapped = True
        if not swapped:
            return
