"""Executors of a run are killed by -9 in its middle, through Ray: on a GPU each registers the arena, and so does its successor.

Without Ray tests/pipeline/test_on_gpu.py has it; on a CPU test_run.py and test_executors.py do, and `-m thorough` this, too.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.cluster import cluster
from tests.conftest import SENTENCES, config_data, read_jsonl, save_switch, write_tsv
from tests.pipeline.clusters import Said, scripted_run
from tests.pipeline.test_executors import executors

ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(150)]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def shm() -> Iterator[Path]:
    """A store.directory of shared memory, as a GPU wants it."""
    directory = Path(tempfile.mkdtemp(prefix="test-killed-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.thorough), pytest.param("cuda", marks=GPU)])
def test_killed_executors_cost_no_row_and_the_next_ones_register_the_same_arena(device, tmp_path, shm, monkeypatch):
    count = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    save_switch(tmp_path / "model")
    rows = write_tsv(tmp_path / "rows.tsv", ROWS)
    changes = {"batch": {"size": 1, "order": "input"}, "device": device, "executors": count}
    killed: list[int] = []

    def kill() -> None:
        killed.append(executors()[0].pid)  # the oldest: not one that has just come in another's place
        os.kill(killed[-1], signal.SIGKILL)

    def answered(name: str, script: dict) -> tuple[dict, Path]:
        plain = config_data(tmp_path / "model", rows, shm, tmp_path / name, **changes)
        return scripted_run(monkeypatch, plain, script, Said()), tmp_path / name / "predictions.jsonl"

    with cluster(None):
        _, expected = answered("undisturbed", {})
        metrics, predictions = answered("killed", {20: kill, 80: kill})
    assert len(set(killed)) == 2
    print(f"{device}: {count} Executors, killed {killed}; lost {metrics['lost']}; {metrics['graphs']}")
    for mine, theirs in zip(read_jsonl(predictions), read_jsonl(expected), strict=True):
        assert (mine["index"], mine["label"]) == (theirs["index"], theirs["label"])
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    assert predictions.read_bytes() == expected.read_bytes()
    assert metrics["lost"]["executors"] == 2 and metrics["executor_restarts"] >= 1  # the run may end before the second is back
    assert [loss["what"] for loss in metrics["lost"]["each"]] == ["executor"] * 2
    assert (metrics["miss_path"], metrics["staged_because"]) == ("in_place", None), "whoever came next registered it again"
    assert list(shm.iterdir()) == []
