"""How a run's experts are shared out: loads measured by a trace, or predicted by the tables of the run's first batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.config import BatchConfig, Config
from pipeline.data import Batch, cut
from pipeline.parallel.load import measured, predicted
from pipeline.parallel.placement import Assignment, place
from predictor import traces
from predictor.hash_table import HashTable
from predictor.tokens import RoutingShape, TokenBatch

PREDICTED_ON = 64
"""Batches whose tables say what load to expect."""


def assign(
    config: Config, batches: list[Batch], shape: RoutingShape, identity: str, predict: Callable[[list[TokenBatch]], list[HashTable]]
) -> Assignment:
    """
    Args:
        identity: of the model's routers, for a trace.
        predict: makes tables; not called if there is a trace, or if no load is asked for.

    Raises:
        PredictorError: the trace cannot be used.
    """
    parallel = config.parallel
    assert parallel.placement is not None
    if parallel.trace is not None:
        loads = measured_by(Path(parallel.trace), config.batch, shape, identity)
    elif parallel.placement == "round_robin" and not parallel.replicas:
        loads = [np.ones((1, experts)) / experts for experts in shape.experts]
    else:
        loads = predicted(predict([batch.tokens for batch in batches[:PREDICTED_ON]]), shape)
    return place(loads, config.executors, parallel.placement, parallel.replicas)


def measured_by(path: Path, batch: BatchConfig, shape: RoutingShape, identity: str | None) -> list[np.ndarray]:
    """The loads of a saved trace, in batches as the config cuts them.

    Args:
        identity: of the model's routers; None: a model whose weights were not read.

    Raises:
        PredictorError: the trace cannot be used.
    """
    trace = traces.load(path, shape, identity)
    rows = cut([len(row) for row in trace.tokens.streams[0]], batch)
    return measured([traces.select(trace, part, shape) for part in rows], shape)
