"""Grouping rows by the experts that they share: whole, the same every time, and with fewer experts per batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pipeline.overlap import expected_uses, group


def in_order(rows: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(rows, start + size)) for start in range(0, rows, size)]


def kinds_of_rows(seed: int, kinds: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of several kinds, shuffled, each kind with experts of its own: (rows, experts), and the kind of each row."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat(np.arange(kinds), each))
    rows = rng.uniform(0, 0.05, (len(kind), kinds * 5))
    for row, own in enumerate(kind):
        rows[row, own * 5 : own * 5 + 5] = rng.uniform(0.6, 1.0, 5)
    return rows, kind


@pytest.mark.parametrize("size", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_every_row_is_in_one_batch_and_only_the_last_batch_is_short(rows, size):
    batches = group(np.random.default_rng(rows).uniform(0, 1, (rows, 12)), size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert [len(batch) for batch in batches] == [len(batch) for batch in in_order(rows, size)]
    assert all((np.diff(batch) > 0).all() for batch in batches)


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_kind_come_together(seed):
    rows, kind = kinds_of_rows(seed, kinds=6, each=4)
    assert all(len({*kind[batch].tolist()}) == 1 for batch in group(rows, 4))


@pytest.mark.parametrize("seed", range(5))
def test_batches_of_one_row_follow_a_row_of_their_kind(seed):
    rows, kind = kinds_of_rows(seed, kinds=5, each=6)
    order = [int(kind[batch[0]]) for batch in group(rows, 1)]
    assert sum(a != b for a, b in pairwise(order)) == 4, "each kind is met once"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_no_grouping_can_tell_apart_is_not_made_worse(size):
    rng = np.random.default_rng(size)
    rows = rng.uniform(0, 1, (64, 40)) ** 4
    grouped = group(rows, size)
    assert expected_uses(rows, grouped) < expected_uses(rows, in_order(64, size))
    again = group(rows.copy(), size)
    assert all(np.array_equal(a, b) for a, b in zip(grouped, again, strict=True))


def test_rows_without_any_use_and_rows_that_use_all_are_grouped_too():
    rows = np.concatenate([np.zeros((5, 6)), np.ones((5, 6))])
    assert sorted(np.concatenate(group(rows, 3)).tolist()) == list(range(10))
