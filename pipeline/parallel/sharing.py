"""How a run's experts are shared out: loads measured by a trace, or predicted by the tables of the run's first batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.config import BatchConfig
from pipeline.data import cut
from pipeline.errors import ConfigError
from pipeline.parallel.load import measured, predicted
from pipeline.parallel.placement import Assignment, place
from pipeline.prepare import Prepared
from predictor import traces
from predictor.hash_table import HashTable
from predictor.registry import SILENT
from predictor.tokens import RoutingShape, TokenBatch
from store.load import routers_identity

PREDICTED_ON = 64
"""Batches whose tables say what load to expect."""


def check_sharing(prepared: Prepared) -> None:
    """
    Raises:
        ConfigError: experts are to be shared out by loads that nobody can tell.
        PredictorError: the trace that is to tell them cannot be used.
    """
    parallel, predictor = prepared.config.parallel, prepared.config.predictor
    if parallel.placement is None:
        return
    if prepared.predictor_device == "executor":
        raise ConfigError(
            "parallel.placement: each Executor has its share of the experts, so that none can hold a predictor that needs them; "
            "write predictor.device=cpu"
        )
    if prepared.config.task == "generate" and prepared.device != "cpu":
        raise ConfigError(
            "parallel.placement: task generate is not served by a group of GPUs yet; write device=cpu, or leave it out"
        )
    if parallel.trace is not None:
        traces.load(Path(parallel.trace), prepared.model.shape, routers_identity(prepared.weights, prepared.model.placement))
    elif predictor.kind in SILENT and _asks_for_loads(prepared):
        raise ConfigError(
            f"parallel.placement: {parallel.placement!r} goes by loads, and predictor.kind is {predictor.kind}; name a trace in "
            "parallel.trace (what trace.save leaves), or write parallel.placement=round_robin without replicas"
        )


def share_out(prepared: Prepared, identity: str, predict: Callable[[TokenBatch], HashTable]) -> Assignment:
    """
    Args:
        identity: of the model's routers, which the arena knows.
        predict: makes tables; not called if there is a trace, or if no load is asked for.
    """
    config, shape = prepared.config, prepared.model.shape
    parallel = config.parallel
    assert parallel.placement is not None
    if parallel.trace is not None:
        loads = measured_by(Path(parallel.trace), config.batch, shape, identity)
    elif _asks_for_loads(prepared):
        loads = predicted([predict(batch.tokens) for batch in prepared.batches[:PREDICTED_ON]], shape)
    else:
        loads = [np.ones((1, experts)) / experts for experts in shape.experts]
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


def _asks_for_loads(prepared: Prepared) -> bool:
    parallel = prepared.config.parallel
    return parallel.placement != "round_robin" or parallel.replicas > 0
