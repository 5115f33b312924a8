"""The trace that a run saves: a file per batch while it is under way, so that a killed run loses none, and one file in the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from predictor import traces
from predictor.tokens import RoutingShape
from predictor.traces import Trace

DIRECTORY = "trace"


class TraceParts:
    """Of one run's output directory."""

    def __init__(self, output: Path, shape: RoutingShape, identity: str):
        self._directory, self._shape, self._identity = output / DIRECTORY, shape, identity

    def add(self, batch: int, trace: Trace) -> None:
        traces.save(trace, self._part(batch), self._shape, self._identity)

    def finish(self, batches: dict[int, list[int]], path: Path) -> None:
        """Joins the batches' traces in the order of the input: whoever plays it again cuts batches of its own.

        Args:
            batches: each one's rows, by their numbers in the input.
        """
        parts = [traces.load(self._part(batch), self._shape, self._identity) for batch in batches]
        order = np.argsort(np.concatenate([np.array(rows) for rows in batches.values()]))
        traces.save(traces.select(traces.join(parts), order, self._shape), path, self._shape, self._identity)
        shutil.rmtree(self._directory)

    def _part(self, batch: int) -> Path:
        return self._directory / f"{batch}.safetensors"
