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
from predictor.tokens import TokenBatch


class Remote:
    """An Executor's method: what it is asked is a word, answered by `result`."""

    def __init__(self, word: str):
        self._word = word

    def remote(self, *arguments: object) -> str:
        return self._word


def executor(name: str) -> SimpleNamespace:
    return SimpleNamespace(execute=Remote(f"{name} answers"), spoken=Remote(f"{name} speaks"))


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


def stats(number: int) -> SimpleNamespace:
    return SimpleNamespace(executor=number, pid=number, born=0, predictor_pid=None, predicted_uses=1.0, queued=0)


def test_whoever_dies_while_it_is_listened_to_leaves_its_batch_to_the_others(words):
    actors = SimpleNamespace(executors=[executor("first")], predictor=None)
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
    floor = Floor(SimpleNamespace(executors=[executor("first"), executor("second")], predictor=None), "exact", 4, 2)
    floor.predict(batch(0), None)
    floor.dispatch()
    words["first answers"] = words["second answers"] = BatchResult(0, [{"index": 0}], stats(0), None)
    words["first speaks"] = words["second speaks"] = [[1]]
    said: list[object] = []
    assert [done.batch for done in floor.done(lambda *what: said.append(what))] == [0]
    assert not said
