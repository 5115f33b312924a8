"""`run` with its three Ray actors: whole answers, kills, resumption, warm starts, and errors that only actors can meet."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml

import runner
from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.plan.command import plan
from pipeline.run import run
from tests.conftest import ROOT, SENTENCES, config_data, read_jsonl, save_switch, write_tsv

pytestmark = pytest.mark.slow
ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(120)]


@pytest.fixture(scope="module")
def own_ray():
    """One Ray for the module; run() uses the connection that there is."""
    with cluster(None):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("run") / "switch"
    return directory, save_switch(directory)


@pytest.fixture
def settings(tmp_path, model):
    """Makes the config of a run over ROWS, one row a batch."""
    (tmp_path / "arenas").mkdir()
    data = write_tsv(tmp_path / "data.tsv", ROWS)

    def make(directory: Path = model[0], output: str = "out", **changes):
        changes = {"batch": {"size": 1, "order": "input"}} | changes
        return config_data(directory, data, tmp_path / "arenas", tmp_path / output, **changes)

    return make


def arenas(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "arenas").iterdir())


def actor_process(name: str) -> psutil.Process:
    """The process of an actor of this test's own Ray."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no {name} among this process's children")


class AtRow(threading.Thread):
    """Calls something once so many rows are in the journal."""

    def __init__(self, output: Path, rows: int, action):
        super().__init__()
        self.journal, self.rows, self.action, self.done = output / "journal.jsonl", rows, action, False
        self.start()

    def run(self) -> None:
        for _ in range(60000):  # a busy machine takes minutes to start Ray
            if self.journal.exists() and self.journal.read_bytes().count(b"\n") >= self.rows:
                self.action()
                self.done = True
                return
            time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(own_ray, tmp_path_factory, model) -> str:
    """predictions.jsonl of a run that nothing disturbs."""
    root = tmp_path_factory.mktemp("reference")
    (root / "arenas").mkdir()
    data = write_tsv(root / "data.tsv", ROWS)
    plain = config_data(model[0], data, root / "arenas", root / "out", batch={"size": 1, "order": "input"})
    run(parse(plain, "test"))
    return (root / "out" / "predictions.jsonl").read_text()


def test_answers_every_row_in_order_and_leaves_its_evidence_and_memory_is_as_planned(own_ray, settings, tmp_path, model):
    config = parse(settings(batch={"size": 7, "order": "length"}), "test")
    planned = plan(config)
    metrics = run(config)
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    assert {row["label"] for row in rows} <= {0, 1}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.json", "plan.json", "predictions.jsonl", "report.html", "run.json", "timeline.json",
    ]  # fmt: skip
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["samples"] == len(ROWS)
    assert abs(planned["bytes"]["arena"] / metrics["arena"]["bytes"] - 1) < 0.02
    assert planned["bytes"]["experts"] == metrics["expert_bytes"]["total"]
    slots = int(0.4 * planned["bytes"]["experts"]) // planned["bytes"]["slot"]
    assert metrics["expert_bytes"]["budget"] == slots * planned["bytes"]["slot"]
    assert torch.cuda.is_available() or metrics["device_memory_peak_bytes"] is None
    assert 0 < metrics["expert_bytes"]["resident_peak"] <= metrics["expert_bytes"]["budget"]
    moved, used = sum(metrics["copied_bytes"].values()), metrics["hit_rate"]
    assert moved > 0 and 0 <= used <= 1
    lanes = {
        event["cat"] for event in json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"] if "cat" in event
    }
    assert lanes == {"predict", "copy", "compute"}
    assert arenas(tmp_path) == []


def test_killed_actors_cost_no_row_and_no_second_reading_of_the_checkpoint(reference, settings, tmp_path, model):
    copy = tmp_path / "model"
    shutil.copytree(model[0], copy)

    def kill(name: str) -> None:
        shutil.rmtree(copy, ignore_errors=True)  # whoever restarts cannot read it again
        os.kill(actor_process(name).pid, signal.SIGKILL)

    killed = {10: "Executor", 35: "Predictor", 60: "ExpertStore", 85: "Executor"}
    killers = [AtRow(tmp_path / "out", rows, lambda name=name: kill(name)) for rows, name in killed.items()]
    metrics = run(parse(settings(copy), "test"))
    for killer in killers:
        killer.join()
        assert killer.done
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == reference
    assert metrics["executor_restarts"] == metrics["lost"]["executors"] == 2
    assert metrics["lost"]["predictors"] == metrics["lost"]["stores"] == 1
    assert arenas(tmp_path) == []


def launch(tmp_path: Path, plain: dict, *arguments: str, **environment: str) -> subprocess.Popen:
    """The launcher as its user starts it, with a Ray of its own. Ctrl-C counts, also where these tests run in a shell's background,
    which has its children ignore it."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment
    command = [sys.executable, str(ROOT / "runner.py"), "run", str(tmp_path / "config.yaml"), *arguments]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
    finally:
        signal.signal(signal.SIGINT, heard)


def test_a_killed_runner_is_resumed_by_the_same_command_and_leaves_nothing_that_clean_does_not_know(reference, settings, tmp_path):
    killed = launch(tmp_path, settings())
    AtRow(tmp_path / "out", 20, killed.kill).join()
    killed.communicate()
    done = (tmp_path / "out" / "journal.jsonl").read_bytes().count(b"\n")
    assert 20 <= done < len(ROWS)
    assert len(arenas(tmp_path)) == 1
    for _ in range(100):  # its Ray notices, and its actors go
        assert runner.main(["clean", str(tmp_path / "arenas")]) == 0
        if not arenas(tmp_path):
            break
        time.sleep(0.2)
    assert arenas(tmp_path) == []
    resumed = launch(tmp_path, settings())
    text, _ = resumed.communicate()
    assert resumed.returncode == 0, text
    assert "resuming" in text
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == reference
    assert arenas(tmp_path) == []


OVERLAP = {"size": 2, "order": "overlap", "window": 24}


def terminate(command: subprocess.Popen) -> None:
    """As `timeout` does: the command, then all of its group, Ray's own processes among them."""
    command.terminate()
    os.killpg(command.pid, signal.SIGTERM)


def test_overlap_order_changes_no_answer_and_a_run_of_it_that_sigterm_ends_goes_on_with_the_same_batches(
    own_ray, settings, tmp_path
):
    run(parse(settings(output="input", batch={"size": 2, "order": "input"}), "test"))
    run(parse(settings(output="whole", batch=OVERLAP), "test"))
    plain, whole = (read_jsonl(tmp_path / name / "predictions.jsonl") for name in ("input", "whole"))
    assert [row["index"] for row in whole] == list(range(len(ROWS)))
    assert [row["label"] for row in whole] == [row["label"] for row in plain]
    for mine, theirs in zip(whole, plain, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    ended = launch(tmp_path, settings(batch=OVERLAP))
    AtRow(tmp_path / "out", 22, lambda: terminate(ended)).join()
    text, _ = ended.communicate()
    assert ended.returncode == 143, text
    assert text.splitlines()[-1] == "stopped by SIGTERM; the same command does what is left"
    assert "Traceback" not in text
    assert arenas(tmp_path) == []
    lines = read_jsonl(tmp_path / "out" / "journal.jsonl")
    groupings = {line["window"]: line["rows"] for line in lines if "window" in line}
    assert groupings and all(rows != sorted(rows) for rows in groupings.values())
    resumed = launch(tmp_path, settings(batch=OVERLAP))
    text, _ = resumed.communicate()
    assert resumed.returncode == 0, text
    assert "resuming" in text
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()


def test_an_interrupted_run_says_how_to_go_on(settings, tmp_path):
    interrupted = launch(tmp_path, settings())
    AtRow(tmp_path / "out", 5, lambda: interrupted.send_signal(signal.SIGINT)).join()
    text, _ = interrupted.communicate()
    assert interrupted.returncode == 130, text
    assert text.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in text
    assert arenas(tmp_path) == []


def test_a_finished_run_can_be_run_again_into_its_directory_and_a_kept_arena_makes_that_start_warm(
    own_ray, settings, tmp_path, capsys
):
    keep = {"store": {"budget": "40%", "directory": str(tmp_path / "arenas"), "keep": True}, "batch": {"size": 16}}
    first = run(parse(settings(**keep), "test"))
    assert not first["arena"]["warm_start"] and len(arenas(tmp_path)) == 1
    before = (tmp_path / "out" / "predictions.jsonl").read_text()
    second = run(parse(settings(**keep), "test"))
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == before
    assert second["arena"]["warm_start"] and second["arena"]["name"] == first["arena"]["name"]
    assert "warm arena" in capsys.readouterr().out
    assert runner.main(["clean", str(tmp_path / "arenas")]) == 0
    assert "freed" in capsys.readouterr().out and arenas(tmp_path) == []


def test_hash_routing_reports_its_fidelity_to_exact(reference, settings, tmp_path):
    metrics = run(parse(settings(routing="hash", batch={"size": 4, "order": "input"}), "test"))
    exact = [json.loads(line) for line in reference.splitlines()]
    hashed = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    same = sum(a["label"] == b["label"] for a, b in zip(exact, hashed, strict=True)) / len(exact)
    assert metrics["fidelity"]["same_label"] == pytest.approx(same)
    assert metrics["prediction"]["top1"] is not None, "the second pass asks the routers"


def refuse(settings: dict, tmp_path: Path, capsys) -> str:
    """Runs the launcher in this process; returns its one line of complaint."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert runner.main(["run", str(tmp_path / "config.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines)
    assert arenas(tmp_path) == []
    return errors[0]


def test_nan_weights_are_refused_by_name(own_ray, settings, tmp_path, capsys):
    model = save_switch(tmp_path / "nan")
    with torch.no_grad():
        model.encoder.block[1].layer[-1].mlp.experts["expert_3"].wi.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    assert "expert_3.wi.weight holds NaN" in refuse(settings(tmp_path / "nan"), tmp_path, capsys)


def test_a_predictor_of_another_model_is_refused(own_ray, settings, tmp_path, capsys):
    for name, seed in (("one", 1), ("two", 2)):
        save_switch(tmp_path / name, seed=seed)
    table = {"kind": "token_table", "path": str(tmp_path / "table.safetensors")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(tmp_path / "one", predictor=table)))
    assert runner.main(["train", str(tmp_path / "train.yaml")]) == 0
    assert "made for another model" in refuse(settings(tmp_path / "two", predictor=table), tmp_path, capsys)


def test_a_missing_predictor_says_how_to_make_one(own_ray, settings, tmp_path, capsys):
    error = refuse(settings(predictor={"kind": "lstm", "path": str(tmp_path / "none.safetensors")}), tmp_path, capsys)
    assert "runner.py train" in error


def test_an_input_that_breaks_the_executor_is_an_error_and_no_hang(own_ray, settings, monkeypatch, tmp_path):
    """Exit code 1: what broke, with its traceback, after all was given back."""

    class Broken:
        forwards = 1

        def inputs(self, batch, padded):
            raise ZeroDivisionError("broken task")

    from pipeline import run as module

    def prepare(config, original=module.prepare):
        prepared = original(config)
        object.__setattr__(prepared, "task", Broken())
        return prepared

    monkeypatch.setattr(module, "prepare", prepare)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ray.exceptions.RayTaskError, match="broken task"):
        run(parse(settings(), "test"))
    assert arenas(tmp_path) == []
