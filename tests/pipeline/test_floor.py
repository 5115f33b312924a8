"""Where the batches of a run are, with Executors that die when a test says so."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import floor as floor_module
from pipeline.actors import ActorLost
from pipeline.batch_result import BatchResult
from pipeline.data import Batch
from pipeline.floor import Floor
from pipeline.losses import Loss
from predictor.tokens import TokenBatch


class Remote:
    """An Executor's method: what it is asked is a word, answered by `result`."""

    def __init__(self, word: str):
        self._word = word

    def remote(self, *arguments: object) -> str:
        return self._word


class Fake:
    """An Executor's handle."""

    def __init__(self, name: str):
        self.execute, self.spoken = Remote(f"{name} answers"), Remote(f"{name} speaks")


def executor(name: str) -> Fake:
    return Fake(name)


@pytest.fixture
def words(monkeypatch) -> dict[str, object]:
    """What comes of each word; an answer that is not there yet is not in it. Whoever is not there dies on being listened to."""
    known: dict[str, object] = {}

    def result(word: str) -> object:
        if word not in known:
            raise ActorLost(word)
        return known[word]

    def wait(refs: list[str], **_: object) -> tuple[list[str], list[str]]:
        return [ref for ref in refs if ref in known], [ref for ref in refs if ref not in known]

    monkeypatch.setattr(floor_module, "ray", SimpleNamespace(wait=wait, kill=lambda actor: None, ObjectRef=str))
    monkeypatch.setattr(floor_module, "result", result)
    return known


def batch(index: int) -> Batch:
    return Batch(index, np.array([index]), TokenBatch(((np.zeros(3, dtype=np.int64),),)))


def stats(number: int, predictor: int | None = None, born: int = 0) -> SimpleNamespace:
    """Of the process of that number."""
    return SimpleNamespace(executor=number, pid=number, born=born, predictor_pid=predictor, predicted_uses=1.0, queued=0)


def test_whoever_dies_while_it_is_listened_to_leaves_its_batch_to_the_others(words):
    actors = SimpleNamespace(executors=[executor("first")], predictor=None, pids={})
    floor = Floor(actors, "exact", 4, 2)
    floor.predict(batch(0), None)
    floor.dispatch()
    heard: list[object] = []

    def listen(of: Batch, said: list[list[int]]) -> None:
        heard.append(said)
        actors.executors.append(executor("second"))  # joins meanwhile
        assert floor.room > 0
        del words["first speaks"]

    words["first speaks"] = [[1]]
    assert floor.done(listen) == []
    assert heard == [[[1]]]
    words["second answers"] = BatchResult(0, [{"index": 0}], stats(1), None)
    floor.dispatch()
    assert [done.batch for done in floor.done(listen)] == [0]
    assert floor.is_empty


def test_of_several_nobody_is_listened_to(words):
    floor = Floor(SimpleNamespace(executors=[executor("first"), executor("second")], predictor=None, pids={}), "exact", 4, 2)
    floor.predict(batch(0), None)
    floor.dispatch()
    words["first answers"] = words["second answers"] = BatchResult(0, [{"index": 0}], stats(0), None)
    words["first speaks"] = words["second speaks"] = [[1]]
    said: list[object] = []
    assert [done.batch for done in floor.done(lambda *what: said.append(what))] == [0]
    assert not said


@pytest.mark.parametrize(("executors_pid", "predictors_pid", "died"), [(7, 5, []), (8, 5, ["executor"]), (7, 6, ["predictor"])])
def test_a_death_before_the_first_answer_is_counted(words, executors_pid, predictors_pid, died):
    one, predictor = executor("first"), SimpleNamespace
    actors = SimpleNamespace(executors=[one], predictor=predictor, pids={one: {7}, predictor: {5}}, predict=lambda tokens: "table")
    losses: list[Loss] = []
    floor = Floor(actors, "exact", 4, 2, losses.append)
    floor.predict(batch(0), None)
    floor.dispatch()
    words["table"] = None
    words["first answers"] = BatchResult(0, [{"index": 0}], stats(executors_pid, predictors_pid, born=2**63), None)
    assert [done.batch for done in floor.done()] == [0]
    assert [loss.what for loss in losses] == died
    assert [loss.redone for loss in losses if loss.what == "executor"] == [1] * (executors_pid != 7)


def test_a_death_is_counted_once_in_a_run_of_several_passes(words):
    """Under hash routing a second pass asks the routers, with a floor of its own."""
    one, predictor = executor("first"), SimpleNamespace
    actors = SimpleNamespace(executors=[one], predictor=predictor, pids={one: {7}, predictor: {5}}, predict=lambda tokens: "table")
    losses: list[Loss] = []
    words["table"] = None
    words["first answers"] = BatchResult(0, [{"index": 0}], stats(8, 6, born=2**63), None)
    for _ in range(2):
        floor = Floor(actors, "exact", 4, 2, losses.append)
        floor.predict(batch(0), None)
        floor.dispatch()
        assert [done.batch for done in floor.done()] == [0]
        assert sorted(loss.what for loss in losses) == ["executor", "predictor"]


def test_who_dies_before_its_first_answer_has_no_number(words):
    one, other = executor("first"), executor("second")
    losses: list[Loss] = []
    floor = Floor(SimpleNamespace(executors=[one, other], predictor=None, pids={}), "exact", 4, 2, losses.append)
    floor._lose(floor._lanes[0])
    assert [loss.name for loss in losses] == ["an Executor that had not answered yet"]
