"""How much each expert has to do, measured by traces or predicted by hash tables; and how well an assignment shares it out.

The measures are those of "Towards MoE Deployment": a device's load in a batch is the share of the batch's tokens that its experts
get, and the busiest device is what a MoE layer waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.parallel.placement import EVERYWHERE, Assignment
from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape
from predictor.traces import Trace


def measured(traces: Sequence[Trace], shape: RoutingShape) -> list[np.ndarray]:
    """What the routers chose: per MoE layer float64 (batches, experts), rows adding to 1; 0 where a layer was not reached."""
    return [
        _shares([np.bincount(trace.layers[i].top[:, : shape.top_k].ravel(), minlength=experts) for trace in traces])
        for i, experts in enumerate(shape.experts)
    ]


def predicted(tables: Sequence[HashTable], shape: RoutingShape) -> list[np.ndarray]:
    """The same, of the tokens that each expert is expected to get."""
    loads = []
    for i, experts in enumerate(shape.experts):
        expected = []
        for table in tables:
            named = table.experts[i] >= 0
            expected.append(np.bincount(table.experts[i][named], table.probability[i][named], minlength=experts))
        loads.append(_shares(expected))
    return loads


def counted(batches: Sequence[Sequence[Sequence[int]]], shape: RoutingShape) -> list[np.ndarray]:
    """The same, of tokens that were counted: [batch][MoE layer][expert]."""
    return [_shares([np.array(batch[i]) for batch in batches]) for i in range(shape.layers)]


def _shares(counts: list[np.ndarray]) -> np.ndarray:
    load = np.array(counts, dtype=np.float64)
    total = load.sum(axis=1, keepdims=True)
    return np.divide(load, total, out=np.zeros_like(load), where=total > 0)


@dataclass(frozen=True)
class Balance:
    """How an assignment does on loads, over all batches and MoE layers.

    Attributes:
        max_load: the highest share that any device ever has.
        avg_max_load: the mean of the busiest device's share. 1 / devices would be perfect.
        avg_max_used: the mean of the most experts that one device computes: with few tokens each, what a layer waits for.
    """

    max_load: float
    avg_max_load: float
    avg_max_used: float

    @classmethod
    def of(cls, loads: Sequence[np.ndarray], assignment: Assignment) -> Balance:
        busiest, most = [], []
        for load, owner in zip(loads, assignment.owners, strict=True):
            reached = load[load.sum(axis=1) > 0]
            everywhere = owner == EVERYWHERE
            here = np.stack([owner == device for device in range(assignment.devices)], axis=1).astype(np.float64)
            here[everywhere] = 1 / assignment.devices  # its tokens stay where they are: rows are shared out evenly
            busiest.append((reached @ here).max(axis=1))
            most.append(((reached > 0).astype(np.int64) @ (here > 0)).max(axis=1))
        shares, used = np.concatenate(busiest), np.concatenate(most)
        return cls(float(shares.max()), float(shares.mean()), float(used.mean()))
