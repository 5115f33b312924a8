"""Several Executors on one machine: one arena, every row answered once, whoever answers it, and less for a slow one."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.prepare import Prepared
from pipeline.run import run
from tests.conftest import SENTENCES, config_data, save_switch, write_tsv
from tests.pipeline.test_run import AtRow

pytestmark = pytest.mark.slow
ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(100)]


@pytest.fixture(scope="module")
def own_ray():
    with cluster(None):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("executors")
    save_switch(root / "model")
    write_tsv(root / "data.tsv", ROWS)
    (root / "arenas").mkdir()
    return root


@pytest.fixture(scope="module")
def answer(own_ray, place):
    """answer(name, **changes) -> (metrics, predictions.jsonl)."""

    def make(name: str, **changes):
        changes = {"batch": {"size": 1, "order": "input"}} | changes
        metrics = run(parse(config_data(place / "model", place / "data.tsv", place / "arenas", place / name, **changes), "test"))
        return metrics, (place / name / "predictions.jsonl").read_text()

    return make


@pytest.fixture(scope="module")
def alone(answer) -> str:
    return answer("alone")[1]


def executors() -> list[psutil.Process]:
    """Those of this test's own Ray, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Executor"):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def arenas_of(process: psutil.Process) -> set[str]:
    return {Path(mapped.path).name for mapped in process.memory_maps() if "/arenas/sida-" in mapped.path}


def test_two_executors_share_the_work_and_one_arena_and_answer_as_one_does(answer, alone, place):
    mapped: list[set[str]] = []
    looker = AtRow(place / "two", 30, lambda: mapped.extend(arenas_of(process) for process in executors()))
    metrics, predictions = answer("two", executors=2)
    looker.join()
    assert predictions == alone
    assert len(mapped) == 2 and mapped[0] == mapped[1] and len(mapped[0]) == 1
    assert [one["executor"] for one in metrics["executors"]] == [0, 1]
    assert sum(one["batches"] for one in metrics["executors"]) == len(ROWS)
    assert min(one["batches"] for one in metrics["executors"]) > len(ROWS) / 5
    for key in ("prefetch", "demand", "read_in_place"):
        assert sum(one["copied_bytes"][key] for one in metrics["executors"]) == metrics["copied_bytes"][key]
    assert sum(one["uses"] for one in metrics["executors"]) == metrics["uses"]
    assert sum(one["resident_peak_bytes"] for one in metrics["executors"]) == metrics["expert_bytes"]["resident_peak"]
    assert metrics["expert_bytes"]["resident_peak"] <= metrics["expert_bytes"]["budget"]
    assert metrics["executor_restarts"] == 0
    names = {
        event["args"]["name"].split(",")[0]
        for event in json.loads((place / "two" / "timeline.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {"Executor 0", "Executor 1"}
    page = (place / "two" / "report.html").read_text()
    assert "compute 0" in page and "compute 1" in page
    assert list((place / "arenas").iterdir()) == []


def test_predictors_in_the_executors_processes_and_batches_put_together_by_tables_work_for_two(answer, alone):
    overlap = {"size": 2, "order": "overlap", "window": 24}
    metrics, predictions = answer("overlap", executors=2, batch=overlap, predictor={"kind": "random", "device": "executor"})
    for mine, theirs in zip(map(json.loads, predictions.splitlines()), map(json.loads, alone.splitlines()), strict=True):
        assert (mine["index"], mine["label"]) == (theirs["index"], theirs["label"])
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    assert len(metrics["executors"]) == 2


def test_one_is_held_up_and_gets_less_then_the_other_is_killed_and_no_row_is_lost(answer, alone, place):
    held: list[psutil.Process] = []

    def hold() -> None:
        held.extend(executors())
        held[0].suspend()

    def go_on_without_the_other() -> None:  # so many rows came from the other one alone
        held[0].resume()
        os.kill(held[1].pid, signal.SIGKILL)

    disturbers = [AtRow(place / "disturbed", 10, hold), AtRow(place / "disturbed", 60, go_on_without_the_other)]
    metrics, predictions = answer("disturbed", executors=2, predictor={"kind": "random", "top_k": 2, "lookahead": 2})
    for disturber in disturbers:
        disturber.join()
        assert disturber.done
    assert predictions == alone
    assert Counter(one["restarts"] for one in metrics["executors"]) == {0: 1, 1: 1}
    assert metrics["executor_restarts"] == 1


def test_more_executors_than_gpus_are_refused(own_ray, place, monkeypatch):
    """On a machine whose torch finds a GPU; this Ray has none to give."""
    real = Prepared.executor_spec
    monkeypatch.setattr(Prepared, "executor_spec", lambda self: replace(real(self), device="cuda:0"))
    config = config_data(place / "model", place / "data.tsv", place / "arenas", place / "refused", executors=2)
    with pytest.raises(ConfigError, match="2 take 2 GPUs, and this Ray has none"):
        run(parse(config, "test"))
