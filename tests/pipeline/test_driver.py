"""Tables for `batch.order: overlap`, with Executors that make them and are lost when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest

from pipeline import driver
from pipeline.actors import ActorLost, Actors
from pipeline.config import BatchConfig
from pipeline.data import Batch, Encoded, make_batches
from pipeline.regroup import Regrouping
from predictor.actor import Prediction, timed
from predictor.baselines import Random
from predictor.tokens import RoutingShape, TokenBatch

SHAPE = RoutingShape(experts=(4, 4), streams=(0, 0), top_k=1, vocab_size=10)
SETTINGS = BatchConfig(size=2, order="overlap", window=4)


class Predicts:
    """An Executor with the predictor in its process: a reference is what is done when somebody waits for it."""

    def __init__(self, lost: Callable[[], bool]):
        self.predict, self._lost = self, lost

    def remote(self, tokens: TokenBatch) -> Callable[[], Prediction]:
        def answer() -> Prediction:
            if self._lost():
                raise ActorLost("its machine has gone")
            return timed(Random(SHAPE, 2, 0), tokens)

        return answer


@pytest.fixture
def rows(monkeypatch) -> list[Batch]:
    monkeypatch.setattr(driver, "result", lambda ref: ref())
    return make_batches([Encoded((np.array([i % 10, 1]),)) for i in range(12)], SETTINGS)


def ordered(executors: list[Predicts], batches: list[Batch]) -> list[list[int]]:
    regrouping = Regrouping(SETTINGS, SHAPE, "exact")
    made = driver.overlapping(Actors(None, list(executors)), batches, regrouping, (), {}, lambda window, rows: None)
    return [batch.rows.tolist() for batch, _ in made]


def test_a_lost_executors_tables_are_made_by_another_and_the_batches_stay_the_same(rows):
    undisturbed = ordered([Predicts(lambda: False)], rows)
    assert sorted(chain(*undisturbed)) == list(range(12))
    for gone in ([True, False], [False, True], [True, True, False]):
        assert ordered([Predicts(lambda gone=one: gone) for one in gone], rows) == undisturbed


def test_when_all_are_lost_the_run_ends(rows):
    with pytest.raises(ActorLost):
        ordered([Predicts(lambda: True), Predicts(lambda: True)], rows)
