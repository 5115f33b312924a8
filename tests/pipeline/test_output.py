"""The output directory: what a killed run leaves and another takes up, and whose directory is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config import Config, parse
from pipeline.errors import ConfigError
from pipeline.reports.output import JOURNAL, METRICS, PREDICTIONS, STATE, InOrder, OutputDir, check_writable
from predictor.traces import save_atomically
from tests.conftest import ROOT, read_jsonl


def begin(run: OutputDir, inputs: str) -> list[dict]:
    """As run() does, when nothing can be refused any more."""
    entries = run.unfinished(inputs)
    if not entries:
        run.start_anew(inputs)
    return entries


def config(output: Path | str, **changes) -> Config:
    plain = {"model": {"path": "m"}, "data": {"path": "d.tsv"}, "labels": {"0": "bad", "1": "good"}, "output_dir": str(output)}
    return parse(plain | changes, "test")


def entry(batch: int) -> dict:
    return {"batch": batch, "results": [{"index": batch, "label": 1, "scores": [0.1, 1 / 3]}]}


def unfinished(output: Path, batches: int = 2, inputs: str = "inputs", **changes) -> None:
    """Leaves what a run that was killed after some batches leaves."""
    run = OutputDir(config(output, **changes))
    assert begin(run, inputs) == []
    for batch in range(batches):
        run.add(entry(batch))
    run.close()


def finished(output: Path) -> None:
    run = OutputDir(config(output))
    begin(run, "inputs")
    run.add(entry(0))
    run.finish({"samples": 1})


def refused(output: Path | str, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        OutputDir(config(output, **changes))
    assert str(error.value).startswith("output_dir: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_resumes_with_what_the_killed_one_had_done(tmp_path):
    unfinished(tmp_path / "new" / "out", batches=3)
    run = OutputDir(config(tmp_path / "new" / "out"))
    assert begin(run, "inputs") == [entry(0), entry(1), entry(2)]
    run.add(entry(3))
    run.close()
    assert read_jsonl(tmp_path / "new" / "out" / JOURNAL) == [entry(n) for n in range(4)]


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_line_that_the_killed_run_did_not_finish_is_dropped_and_written_again(tmp_path, lost):
    unfinished(tmp_path / "out", batches=3)
    journal = tmp_path / "out" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-lost])
    run = OutputDir(config(tmp_path / "out"))
    assert begin(run, "inputs") == [entry(0), entry(1)]
    run.add(entry(2))
    run.close()
    assert read_jsonl(journal) == [entry(0), entry(1), entry(2)]


def test_only_the_first_line_and_that_unfinished_is_a_fresh_start(tmp_path):
    unfinished(tmp_path / "out", batches=1)
    journal = tmp_path / "out" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:10])
    run = OutputDir(config(tmp_path / "out"))
    assert begin(run, "other inputs") == []  # nothing was done, so nothing is held against other inputs
    run.close()


KILLED = """
import os, signal, sys
from pipeline.config import parse
from pipeline.reports.output import OutputDir
plain = {"model": {"path": "m"}, "data": {"path": "d.tsv"}, "labels": {"0": "bad", "1": "good"}, "output_dir": sys.argv[1]}
run = OutputDir(parse(plain, "test"))
run.start_anew("inputs")
for batch in range(3):
    run.add({"batch": batch, "results": [{"index": batch, "label": 1, "scores": [0.1, 1 / 3]}]})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_added_survives_a_kill_and_so_does_not_the_lock(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=ROOT, env=environment)
    assert done.returncode == -signal.SIGKILL
    run = OutputDir(config(tmp_path / "out"))
    assert begin(run, "inputs") == [entry(0), entry(1), entry(2)]
    run.close()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"store": {"budget": "5%"}}, "store.budget"),
        ({"batch": {"size": 9}}, "batch.size"),
        ({"seed": 3}, "seed"),
        ({"model": {"path": "other"}}, "model.path"),
        ({"labels": {"0": "bad", "1": "great"}}, "labels.1"),
        ({"labels": {"0": "bad", "1": "good", "2": "so so"}}, "labels.2"),
        ({"data": {"path": "d.tsv", "text": ["a", "b"]}}, "data.text"),
        ({"routing": "hash"}, "routing"),
    ],
)
def test_a_run_of_another_config_is_refused_with_the_key_and_both_values(tmp_path, changes, key):
    unfinished(tmp_path / "out")
    before = (tmp_path / "out" / JOURNAL).read_bytes()
    message = refused(tmp_path / "out", **changes)
    assert f" {key} = " in message
    assert str(tmp_path / "out") in message
    assert (tmp_path / "out" / JOURNAL).read_bytes() == before


def test_labels_in_another_order_are_another_config(tmp_path):
    """Scores are in the order of the labels."""
    unfinished(tmp_path / "out")
    assert "labels" in refused(tmp_path / "out", labels={"1": "good", "0": "bad"})


def test_a_finished_run_of_another_config_is_refused_too(tmp_path):
    finished(tmp_path / "out")
    assert "seed" in refused(tmp_path / "out", seed=1)
    assert (tmp_path / "out" / METRICS).exists()


def test_keys_that_change_no_result_may_differ(tmp_path):
    unfinished(tmp_path / "out")
    other = {"store": {"keep": True, "directory": "/tmp"}, "cluster": {"address": "auto"}, "train": {"epochs": 1}}
    run = OutputDir(config(f"{tmp_path}/./out", **other))
    assert len(begin(run, "inputs")) == 2
    run.close()


def test_a_config_that_was_refused_before_anything_was_done_does_not_stand_in_the_way(tmp_path):
    """A run that ends before its first batch, on a predictor's missing file say, is mended by changing the config."""
    unfinished(tmp_path / "out", batches=0, predictor={"path": "mistyped.safetensors"})
    run = OutputDir(config(tmp_path / "out", predictor={"path": "right.safetensors"}))
    assert begin(run, "inputs") == []
    run.close()


@pytest.mark.parametrize("said", [{"loss": {"what": "executor", "name": "Executor-0"}}, {"window": 0, "rows": [[1, 0]]}])
def test_a_run_that_answered_no_row_does_not_stand_in_the_way_of_another_whatever_else_it_said(tmp_path, said):
    unfinished(tmp_path / "out", batches=0)
    with (tmp_path / "out" / JOURNAL).open("a") as journal:
        journal.write(json.dumps(said) + "\n")
    run = OutputDir(config(tmp_path / "out", seed=3))
    assert begin(run, "other inputs") == []
    run.add(entry(0))
    run.close()
    assert read_jsonl(tmp_path / "out" / JOURNAL) == [entry(0)]
    refused(tmp_path / "out", seed=4)


def test_changed_inputs_are_refused(tmp_path):
    unfinished(tmp_path / "out")
    before = (tmp_path / "out" / JOURNAL).read_bytes()
    run = OutputDir(config(tmp_path / "out"))
    with pytest.raises(ConfigError, match="other data or another model"):
        begin(run, "other inputs")
    run.close()
    assert (tmp_path / "out" / JOURNAL).read_bytes() == before


def test_two_runs_in_one_directory_at_once_are_refused(tmp_path):
    first = OutputDir(config(tmp_path / "out"))
    assert "being written by another run" in refused(tmp_path / "out")
    begin(first, "inputs")
    first.add(entry(0))
    assert "being written by another run" in refused(tmp_path / "out")
    first.close()
    second = OutputDir(config(tmp_path / "out"))
    assert begin(second, "inputs") == [entry(0)]
    second.close()


def test_a_finished_run_starts_anew(tmp_path):
    finished(tmp_path / "out")
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert json.loads((tmp_path / "out" / METRICS).read_text()) == {"samples": 1}
    again = OutputDir(config(tmp_path / "out"))
    assert (tmp_path / "out" / METRICS).exists()  # until the new run begins, the old results stand
    assert begin(again, "other inputs") == []
    assert not (tmp_path / "out" / METRICS).exists()
    again.add(entry(0))
    again.close()
    resumed = OutputDir(config(tmp_path / "out"))
    assert begin(resumed, "other inputs") == [entry(0)]
    resumed.close()


def test_a_kill_between_the_metrics_and_the_end_of_the_journal_is_a_finished_run(tmp_path):
    unfinished(tmp_path / "out")
    (tmp_path / "out" / METRICS).write_text("{}")
    run = OutputDir(config(tmp_path / "out"))
    assert begin(run, "inputs") == []
    run.close()
    assert (tmp_path / "out" / JOURNAL).read_bytes() == b""


def test_a_directory_with_foreign_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert "holds files that are not a run's" in refused(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_an_empty_directory_is_taken(tmp_path):
    OutputDir(config(tmp_path)).close()


def test_what_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(tmp_path / "file")
    refused(tmp_path / "file" / "below")


def test_a_relative_directory_in_rays_copy_of_the_project_is_refused_with_the_fix(tmp_path, monkeypatch):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123abcd"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    message = refused("runs/quickstart")
    assert "output_dir=/absolute/path" in message
    assert os.listdir(package) == []
    OutputDir(config(tmp_path / "absolute")).close()
    monkeypatch.chdir(tmp_path)
    OutputDir(config("runs/quickstart")).close()  # relative is fine anywhere else
    assert (tmp_path / "runs" / "quickstart").is_dir()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = OutputDir(config(tmp_path / "out"))
    begin(run, "inputs")
    run.write("report.html", "old")

    def full(source, target):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            run.write("report.html", "new")
    run.close()
    assert (tmp_path / "out" / "report.html").read_text() == "old"
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["report.html", STATE, JOURNAL])


@pytest.mark.parametrize("seed", range(5))
def test_predictions_appear_in_input_order_though_batches_complete_in_any(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(23)
    batches = np.split(rows, [4, 5, 11, 17])
    path = tmp_path / PREDICTIONS
    predictions, done = InOrder(path), set()
    for batch in batches:
        predictions.add([{"index": int(row), "label": int(row) % 2} for row in batch])
        done |= set(batch.tolist())
        whole = next(n for n in range(24) if n not in done)  # as far as the rows reach without a gap
        assert [row["index"] for row in read_jsonl(path)] == list(range(whole))
    predictions.close()
    assert read_jsonl(path) == [{"index": row, "label": row % 2} for row in range(23)]


def test_what_another_wrote_is_not_written_over(tmp_path):
    weights, own = tmp_path / "model.safetensors", tmp_path / "own.safetensors"
    save_file({"w": np.zeros(2)}, weights, {"format": "pt"})
    save_atomically({"w": np.zeros(2)}, own, {"kind": "trace"})
    check_writable(own, "trace.save")
    check_writable(tmp_path / "new.safetensors", "trace.save")
    with pytest.raises(ConfigError, match=r"predictor\.path: .*model\.safetensors is there, and neither"):
        check_writable(weights, "predictor.path")
