"""A run on several machines: here nodes of a Ray cluster on one, each with its own arena; not all can see the checkpoint.

They join and leave, and by seeded schedules actors and whole nodes are killed: every row is answered once, and right. Three
seeds run with all tests, the others with `pytest -m slow tests/pipeline/test_machines.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import parse
from pipeline.run import run
from store.arena import clean
from tests.conftest import ROOT, SENTENCES, config_data, read_jsonl, save_switch, write_tsv
from tests.pipeline.clusters import Nodes, Said, scripted_run, several

pytestmark = pytest.mark.slow
ACTORS = ("Executor", "Executor", "Predictor", "ExpertStore")
KILLS = 3
SEEDS, WITH_ALL_TESTS = range(20), (7, 12, 19)
ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(200)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Nodes]:
    with several(tmp_path_factory.mktemp("nodes")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """config(name, model="model", **changes): plain data."""
    root = tmp_path_factory.mktemp("machines")
    save_switch(root / "model")
    write_tsv(root / "data.tsv", ROWS)
    (root / "arenas").mkdir()

    def make(name: str, model: str = "model", **changes) -> dict:
        changes = {"batch": {"size": 1, "order": "input"}} | changes
        return config_data(root / model, root / "data.tsv", root / "arenas", root / name, **changes)

    return make


def predictions(plain: dict) -> str:
    return (Path(plain["output_dir"]) / "predictions.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(nodes, config) -> str:
    run(parse(config("alone"), "test"))
    return predictions(config("alone"))


def test_machines_join_with_and_without_the_checkpoint_and_leave_in_the_middle(nodes, config, alone, monkeypatch):
    plain = config("three", model="copy", cluster={"nodes": "all"})
    shutil.copytree(config("x")["model"]["path"], plain["model"]["path"])
    nodes.add("first")
    nodes.add("no-room", has_directory=False)
    said = Said()

    def nobody_sees_the_checkpoint_any_more() -> None:
        said.wait_for("has joined")
        said.wait_for("is not used: ")
        shutil.rmtree(plain["model"]["path"])
        nodes.add("second")
        said.wait_for("has joined", 2)

    script = {20: nobody_sees_the_checkpoint_any_more, 120: lambda: nodes.kill("first")}
    metrics = scripted_run(monkeypatch, plain, script, said)
    assert predictions(plain) == alone
    assert [machine["came_by"] for machine in metrics["machines"]] == ["checkpoint", "checkpoint", "transfer"]
    assert [one["executor"] for one in metrics["executors"]] == [0, 1, 2]
    assert metrics["expert_bytes"]["resident_peak"] <= metrics["expert_bytes"]["budget"]
    assert "The budget was kept" in (Path(plain["output_dir"]) / "report.html").read_text()
    assert metrics["lost"]["machines"] == 1
    assert metrics["lost"]["executors"] <= 1  # it may have had nothing to do
    assert list(nodes.arenas("second").iterdir()) == []
    assert list(Path(plain["store"]["directory"]).iterdir()) == []
    left = list(nodes.arenas("first").iterdir())  # nobody could say goodbye there
    assert len(left) == 1
    removed, in_use = clean(nodes.arenas("first"))
    assert [one.path for one in removed] == left and not in_use
    nodes.kill("no-room")
    nodes.kill("second")


def test_figures_and_logs_of_a_run_are_where_ray_has_them(nodes, alone):
    def figure(name: str) -> float:
        return sum(float(line.split()[-1]) for line in nodes.figures().splitlines() if line.startswith(f"ray_sida_{name}{{"))

    for _ in range(100):
        if figure("rows_total") >= len(ROWS):
            break
        time.sleep(0.2)
    assert figure("rows_total") >= len(ROWS)
    assert figure("uses_total") > figure("found_total") > 0
    drawn = json.loads((ROOT / "docs" / "grafana.json").read_text())
    names = {
        name for panel in drawn["panels"] for target in panel["targets"] for name in re.findall(r"ray_(sida_\w+)", target["expr"])
    }
    there = set(re.findall(r"# TYPE ray_(sida_\w+)", nodes.figures()))
    assert names - there <= {"sida_lost_total", "sida_stall_ms_total"}, "all that has happened can be drawn"
    lines = [line for line in nodes.logs().splitlines() if f"batch {len(ROWS) - 1} of" in line]
    assert any("actor_name=Executor-0" in line for line in lines), "beside those of other tests' runs on the same machines"


class Faults:
    """What is killed when, by a seed. At most one node at a time, and it comes back under the same name."""

    def __init__(self, seed: int, nodes: Nodes):
        chance = random.Random(seed)
        rows = sorted(chance.sample(range(5, 150), KILLS))
        kinds = [chance.choice([*ACTORS, "node"]) for _ in rows]
        self._nodes, self._chance = nodes, chance
        self.killed: list[str] = []
        self.script: dict[int, Callable[[], None]] = {
            row: lambda kind=kind: self._kill(kind) for row, kind in zip(rows, kinds, strict=True)
        }

    def _kill(self, kind: str) -> None:
        if kind == "node":
            name = self._chance.choice(self._nodes.names)
            self._nodes.kill(name)
            self._nodes.add(name)
        else:
            there = self._nodes.processes(kind)
            if not there:  # on its way back from an earlier death
                return
            os.kill(self._chance.choice(there).pid, signal.SIGKILL)
        self.killed.append(kind)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in WITH_ALL_TESTS else pytest.mark.thorough) for seed in SEEDS]
)
def test_whatever_is_killed_every_row_is_answered_once_and_right(seed, nodes, config, alone, monkeypatch):
    for name in {"0", "1"} - set(nodes.names):
        nodes.add(name)
    faults, said, plain = Faults(seed, nodes), Said(), config(f"seed-{seed}", cluster={"nodes": "all"})
    faults.script[2] = lambda: said.wait_for("has joined", 2)  # both nodes
    metrics = scripted_run(monkeypatch, plain, faults.script, said)
    print(f"seed {seed}: killed {', '.join(faults.killed)}; {metrics['lost']}")
    assert predictions(plain) == alone
    assert sum(one["batches"] for one in metrics["executors"]) == len(ROWS)
    assert [row["index"] for row in read_jsonl(Path(plain["output_dir"]) / "predictions.jsonl")] == list(range(len(ROWS)))
    assert list(Path(plain["store"]["directory"]).iterdir()) == []
