"""`batch.order: overlap`: a window of rows is predicted first and cut into batches then, rows with like experts together.

A window is some batches of the input's order: as many batches come out, with the same numbers and the same rows among them, so that
whoever counts batches need not know. Rows keep their numbers, and results their order. Each window's grouping can be written
down before its first batch runs, and is taken from there by a run that goes on: its batches are the same, whatever a
prediction's last bits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import BatchConfig
from pipeline.data import Batch
from pipeline.overlap import group
from predictor.hash_table import HashTable, join, split
from predictor.tokens import RoutingShape, TokenBatch

Grouping = list[list[int]]
"""Of a window: the rows of each of its batches, by their numbers in the input."""
AT_ONCE = 64
"""Rows that are predicted together: enough for a predictor to be quick, and few enough for another window's to come between."""


@dataclass(frozen=True)
class Regrouping:
    """What decides how rows are grouped."""

    batch: BatchConfig
    shape: RoutingShape
    routing: str


def windows(batches: Sequence[Batch], config: BatchConfig) -> list[list[Batch]]:
    """Batches of the input's order in windows of `batch.window` rows, rounded down to whole batches, at least one."""
    count = max(1, config.window // config.size)
    return [list(batches[start : start + count]) for start in range(0, len(batches), count)]


def chunks(window: Sequence[Batch]) -> list[TokenBatch]:
    """A window's rows in the order of the input, in parts to be predicted."""
    rows = [row for batch in window for row in _rows(batch)]
    parts = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
    return [TokenBatch(tuple(zip(*part, strict=True))) for part in parts]


def row_tables(parts: Sequence[TokenBatch], tables: Sequence[HashTable], shape: RoutingShape) -> list[HashTable]:
    """The table of every row of a window, from those of its parts."""
    return [row for tokens, table in zip(parts, tables, strict=True) for row in split(table, tokens, shape.streams)]


def regroup(window: Sequence[Batch], tables: Sequence[HashTable], settings: Regrouping) -> Grouping:
    """
    Args:
        tables: of the window's rows, in the order of the input.
    """
    signatures = np.stack([_signature(table, settings.shape, settings.routing) for table in tables])
    numbers = np.concatenate([batch.rows for batch in window])
    return [numbers[rows].tolist() for rows in group(signatures, settings.batch.size)]


def _signature(table: HashTable, shape: RoutingShape, routing: str) -> np.ndarray:
    """How likely a row uses each (MoE layer, expert): float32 (experts of all MoE layers,)."""
    parts = [np.zeros(count, dtype=np.float32) for count in shape.experts]
    for part, layer in zip(parts, table.uses_under(routing), strict=True):
        for expert, probability in layer:
            part[expert] = probability
    return np.concatenate(parts)


def rebuilt(window: Sequence[Batch], grouping: Grouping, tables: Sequence[HashTable]) -> list[tuple[Batch, HashTable]]:
    """A window's batches as they are grouped, and their tables, put together from those of the rows."""
    numbers = np.concatenate([batch.rows for batch in window])
    place = {int(number): at for at, number in enumerate(numbers)}
    tokens = [row for batch in window for row in _rows(batch)]
    targets = [target for batch in window for target in batch.targets or ()]
    made = []
    for batch, rows in zip(window, grouping, strict=True):
        at = [place[row] for row in rows]
        streams = tuple(zip(*(tokens[i] for i in at), strict=True))
        scored = tuple(targets[i] for i in at) if targets else None
        made.append((Batch(batch.index, np.array(rows), TokenBatch(streams), scored), join([tables[i] for i in at])))
    return made


def _rows(batch: Batch) -> list[tuple[np.ndarray, ...]]:
    """Each row's streams."""
    return list(zip(*batch.tokens.streams, strict=True))
