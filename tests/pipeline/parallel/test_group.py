"""A group loses ranks, by kill -9 and because one no longer answers, and every batch is answered once, in order, and right."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.bench.workload import record_batches
from pipeline.config import parse
from pipeline.parallel.group import RETRIES, Group, GroupLost, Step
from pipeline.parallel.load import measured
from pipeline.parallel.placement import Assignment, place
from pipeline.parallel.processes import Processes
from pipeline.prepare import prepare
from store.actor import ExpertStore
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv
from tests.pipeline.test_exactness import assert_equal_results


class Served:
    """A model, its batches, and two ranks for it."""

    def __init__(self, base: Path):
        whole = save_switch(base / "model")
        (base / "arenas").mkdir()
        rows = write_tsv(base / "rows.tsv", SENTENCES * 2)
        config = parse(config_data(base / "model", rows, base / "arenas", base / "out"), "a test")
        self.prepared = prepare(config)
        self.store = ExpertStore(self.prepared.arena, self.prepared.model.source, self.prepared.model.placement)
        self.store.open()
        self.plan = place(measured(record_batches(self.prepared), self.prepared.model.shape), 2, "greedy")
        self.spec = replace(self.prepared.executor_spec(), slots=self.plan.most, threads=1)
        self.expected = [answers(self.prepared.task, whole, batch) for batch in self.prepared.batches]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("group"))
    yield served
    assert served.store.close(False, patience_s=5)


def test_ranks_are_lost_and_all_batches_are_answered(served):
    started: list[Processes] = []

    def start() -> Processes:
        started.append(Processes(served.spec, served.plan, timeout_s=10))
        return started[-1]

    group = Group(start, served.plan)
    try:
        results = []
        for result in group.run(((batch, None) for batch in served.prepared.batches), "exact", ahead=0):
            results.append(result)  # no later step has been given yet: whoever dies here is missed in the next
            if len(results) == 1:
                os.kill(started[0].pids[1], signal.SIGKILL)
            if len(results) == 5:
                os.kill(started[1].pids[0], signal.SIGSTOP)  # it does not die, and says nothing
        assert [result.batch for result in results] == [batch.index for batch in served.prepared.batches]
        for result, expected in zip(results, served.expected, strict=True):
            assert_equal_results(result.results, expected)
        assert group.restarts == len(started) - 1 == 2
        assert sum(traffic.sent for traffic in started[2].traffic()) > 0
        started[2].close()
    finally:
        group.stop()


class Scripted:
    """Ranks that do as they are told: "lost" is lost, a number is how many batches of the step they answer."""

    def __init__(self, script: list[str]):
        self.script, self.steps, self.stopped = script, [], False

    def submit(self, step: Step) -> None:
        self.steps.append([batch.index for batch in step.batches])

    def answer(self) -> list:
        if self.script.pop(0) == "lost":
            raise GroupLost("as told")
        return [("answer", index) for index in self.steps.pop(0)] + ["nobody's"] * 2

    def stop(self) -> None:
        self.stopped = True


def scripted(*scripts: list[str]) -> tuple[Group, list[Scripted]]:
    left, made = [*scripts], []

    def start() -> Scripted:
        made.append(Scripted(left.pop(0)))
        return made[-1]

    return Group(start, Assignment((), 3)), made


class Numbered:
    """All of a batch that a group looks at."""

    def __init__(self, index: int):
        self.index = index


def test_what_has_no_answer_is_given_to_the_next_ranks_and_nothing_twice():
    group, made = scripted(["ok", "lost"], ["lost"], ["ok", "ok"])
    results = list(group.run([(Numbered(i), None) for i in range(8)], "exact", ahead=1))
    assert results == [("answer", i) for i in range(8)]
    assert group.restarts == 2
    assert [ranks.stopped for ranks in made] == [True, True, False]


def test_a_step_that_kills_again_and_again_is_taken_for_the_cause():
    group, made = scripted(*(["lost"] for _ in range(RETRIES + 1)))
    with pytest.raises(RuntimeError, match=f"lost {RETRIES + 1} times during one step; the last time: as told"):
        list(group.run([(Numbered(0), None)], "exact", ahead=0))
    assert all(ranks.stopped for ranks in made)


def test_a_lonely_batch_comes_with_batches_of_no_rows(served):
    batch = served.prepared.batches[3]
    calls = Step((batch,), ("a table",), "hash").calls(3)
    assert calls[0] == (batch, "hash", "a table", None, None)
    assert [(len(call[0].rows), call[0].index) for call in calls[1:]] == [(0, batch.index)] * 2
    assert all(call[1:] == calls[0][1:] for call in calls)


def test_ranks_that_cannot_stand_say_why(served):
    with pytest.raises(RuntimeError, match="the arena is gone"):
        Processes(replace(served.spec, arena=served.spec.arena.with_name("sida-nowhere")), served.plan, 60)
