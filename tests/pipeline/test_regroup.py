"""A window of batches cut anew: the same rows, numbers and tables, in other company."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import BatchConfig
from pipeline.data import Encoded, make_batches
from pipeline.regroup import Regrouping, chunks, rebuilt, regroup, row_tables, windows
from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape, TokenBatch

SHAPE = RoutingShape((16, 16), (0, 1), 1, 100)
"""One MoE layer per stream."""


def by_token(tokens: TokenBatch) -> HashTable:
    """A table that depends on each token alone, as a token table does."""
    experts, certain = [], []
    for stream in SHAPE.streams:
        ids = tokens.flat(stream)
        experts.append(np.stack([ids % 16, ids * 7 % 16], axis=1).astype(np.int16))
        certain.append(np.stack([0.6 + ids % 3 / 10, np.full(len(ids), 0.1)], axis=1).astype(np.float32))
    return HashTable(tuple(experts), tuple(certain), tuple(certain))


def make(rows: int, size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(rows):
        a, b = rng.integers(2, 9, 2)
        encoded.append(Encoded((rng.integers(0, 100, a), rng.integers(0, 100, b)), rng.integers(0, 100, b)))
    return encoded, make_batches(encoded, BatchConfig(size=size, order="input"))


@pytest.mark.parametrize(("size", "window", "batches"), [(4, 256, 64), (4, 10, 2), (4, 3, 1), (1, 8, 8), (16, 64, 4)])
def test_a_window_is_whole_batches_and_never_more_rows_than_asked_for(size, window, batches):
    _, cut = make(300, size)
    found = windows(cut, BatchConfig(size=size, window=window))
    assert [len(each) for each in found[:-1]] == [batches] * (len(found) - 1)
    assert [batch.index for each in found for batch in each] == list(range(len(cut)))


@pytest.mark.parametrize(("rows", "size"), [(40, 4), (41, 4), (90, 1), (130, 16), (3, 8)])
def test_rows_keep_their_tokens_targets_and_tables_and_no_row_leaves_its_window(rows, size):
    encoded, cut = make(rows, size)
    config = BatchConfig(size=size, order="overlap", window=32)
    moved = 0
    for window in windows(cut, config):
        parts = chunks(window)
        tables = row_tables(parts, [by_token(part) for part in parts], SHAPE)
        grouping = regroup(window, tables, Regrouping(config, SHAPE, "exact"))
        made = rebuilt(window, grouping, tables)
        assert [batch.index for batch, _ in made] == [batch.index for batch in window]
        assert sorted(r for batch, _ in made for r in batch.rows) == sorted(r for batch in window for r in batch.rows)
        moved += sum(not np.array_equal(new.rows, old.rows) for (new, _), old in zip(made, window, strict=True))
        for batch, table in made:
            for at, row in enumerate(batch.rows):
                for stream in range(2):
                    np.testing.assert_array_equal(batch.tokens.streams[stream][at], encoded[row].streams[stream])
                np.testing.assert_array_equal(batch.targets[at], encoded[row].target)
            whole = by_token(batch.tokens)
            for field in ("experts", "probability", "scaling"):
                for mine, theirs in zip(getattr(table, field), getattr(whole, field), strict=True):
                    np.testing.assert_array_equal(mine, theirs)
    assert moved or rows == 3


def test_a_grouping_that_was_written_down_is_what_is_built():
    _, cut = make(12, 4)
    (window,) = windows(cut, BatchConfig(size=4, window=12))
    parts = chunks(window)
    tables = row_tables(parts, [by_token(part) for part in parts], SHAPE)
    grouping = [[0, 11, 5, 6], [1, 2, 3, 4], [7, 8, 9, 10]]
    assert [batch.rows.tolist() for batch, _ in rebuilt(window, grouping, tables)] == grouping


def test_rows_without_targets_have_none_afterwards():
    batches = make_batches([Encoded((np.array([i]), np.array([i]))) for i in range(4)], BatchConfig(size=2, order="input"))
    parts = chunks(batches)
    tables = row_tables(parts, [by_token(part) for part in parts], SHAPE)
    assert all(batch.targets is None for batch, _ in rebuilt(batches, [[0, 3], [1, 2]], tables))
