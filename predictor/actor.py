"""The Predictor actor: turns batches into hash tables, ahead of the Executor."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch

from predictor.hash_table import HashTable
from predictor.registry import HashPredictor, Model, PredictorSpec, make
from predictor.tokens import TokenBatch


@dataclass(frozen=True)
class Prediction:
    """A batch's table, when it was made (time.time_ns()), and by which process."""

    table: HashTable
    start: int
    end: int
    pid: int = field(default_factory=os.getpid)


class Predictor:
    """Run as a Ray actor; plain calls work too."""

    def __init__(self, spec: PredictorSpec, model: Model, threads: int = 1):
        """
        Args:
            model: says where its weights are; they do not travel through Ray.
            threads: for torch; Ray leaves an actor one.
        """
        torch.set_num_threads(threads)
        self._spec, self._model = spec, model

    @cached_property
    def _predictor(self) -> HashPredictor:
        return make(self._spec, self._model)

    def ready(self) -> int:
        """The process id: answers once the predictor is made, not in the constructor, whose errors Ray would wrap in its own.

        Raises:
            PredictorError: see `make`.
        """
        self._predictor  # noqa: B018 (made on first use)
        return os.getpid()

    def predict(self, tokens: TokenBatch) -> Prediction:
        """The table of one batch. Calls may be repeated, and in any order."""
        return timed(self._predictor, tokens)


def timed(predictor: HashPredictor, tokens: TokenBatch) -> Prediction:
    """A table and when it was made."""
    start = time.time_ns()
    table = predictor.predict(tokens)
    table.uses  # noqa: B018 (worked out here, it travels along: the Executor has better things to do)
    return Prediction(table, start, time.time_ns())
