"""`run` with experts that belong to one Executor each: answers as of one Executor, though ranks are killed; what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.errors import USER_ERRORS
from pipeline.run import run
from tests.conftest import SENTENCES, config_data, save_switch, write_tsv
from tests.pipeline.test_run import AtRow

ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(61)]
SHARED = {"placement": "greedy", "replicas": 1, "timeout_s": 60}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    save_switch(root / "model")
    write_tsv(root / "data.tsv", ROWS)
    (root / "arenas").mkdir()
    return root


def answer(root: Path, name: str, **changes) -> tuple[dict, list[dict]]:
    data = config_data(root / "model", root / "data.tsv", root / "arenas", root / name, **changes)
    metrics = run(parse(data, "test"))
    return metrics, [json.loads(line) for line in (root / name / "predictions.jsonl").read_text().splitlines()]


def ranks() -> list[psutil.Process]:
    """Those of this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith("ray::ExecutorRank"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_shared_experts_answer_as_one_executor_does_though_a_rank_is_killed(root, capsys):
    with cluster(None):
        _, alone = answer(root, "alone")
        killer = AtRow(root / "shared", 20, lambda: os.kill(ranks()[0].pid, signal.SIGKILL))
        store = {"budget": "60%", "directory": str(root / "arenas")}
        metrics, together = answer(root, "shared", executors=2, parallel=SHARED, store=store)
        killer.join()
    assert killer.done
    for mine, theirs in zip(together, alone, strict=True):
        assert (mine["index"], mine["label"]) == (theirs["index"], theirs["label"])
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    assert [one["batches"] for one in metrics["executors"]] == [16, 15]  # batches of 2 rows in turn
    assert sum(one["restarts"] for one in metrics["executors"]) == 2  # both were started again
    assert metrics["lost"]["executors"] == 1 and metrics["lost"]["batches_redone"] > 0
    assert metrics["parallel"]["restarts"] == 1 and metrics["parallel"]["most_experts"] == 14
    assert 0.5 <= metrics["parallel"]["avg_max_load"] <= metrics["parallel"]["max_load"] <= 1
    assert 0 < metrics["hit_rate"] <= 1.0  # a share of 60 % is all that a rank needs, but it comes while batches run
    assert "each expert belongs to one of 2 Executors (greedy): 14 at most, all of them in slots" in capsys.readouterr().out
    assert list((root / "arenas").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"predictor": {"kind": "none"}}, "goes by loads, and predictor.kind is none; name a trace in parallel.trace (what"),
        ({"predictor": {"kind": "random", "device": "executor"}}, "write predictor.device=cpu"),
        ({"parallel": SHARED | {"trace": "nowhere.safetensors"}}, "nowhere.safetensors: no such file"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_made(root, changes, said):
    data = config_data(root / "model", root / "data.tsv", root / "arenas", root / "refused", executors=2, parallel=SHARED)
    with pytest.raises(USER_ERRORS) as error:
        run(parse(data | changes, "test"))
    assert said in str(error.value)
    assert not (root / "refused").exists()
