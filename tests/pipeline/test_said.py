"""What a run says: before it starts, of settings that do nothing; at the end, whose budget it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import parse
from pipeline.data import Row
from pipeline.reports.metrics import batch_metrics
from pipeline.reports.said import say_plan, say_results
from tests.conftest import config_data
from tests.pipeline.test_report import batches


@pytest.mark.parametrize(("task", "kind", "is_told"), [("score", "recent", 1), ("score", "none", 0), ("generate", "recent", 0)])
def test_a_predictor_that_has_nothing_to_say_of_a_task_is_told_with_one_that_has(capsys, task, kind, is_told):
    config = parse(config_data(Path(), Path(), Path(), Path(), task=task, predictor={"kind": kind}), "test")
    prepared = SimpleNamespace(
        config=config,
        rows=[Row("a")],
        batches=[None],
        model=SimpleNamespace(shape=SimpleNamespace(experts=(4,), layers=1)),
        layout=SimpleNamespace(expert_bytes=4),
        slots=1,
        budget_bytes=1,
        truncated=0,
        stand_ins=None,
    )
    say_plan(prepared, [])
    assert capsys.readouterr().out.count("predictor.kind=rehearsal predictor.path=null predicts here") == is_told


@pytest.mark.parametrize(("executors", "said"), [(1, "of 9.0 MB\n"), (2, "of 9.0 MB; budget 20% for each of 2 Executors\n")])
def test_the_end_tells_the_budget_of_each_and_blames_no_predictor_that_makes_no_tables(capsys, executors, said):
    stats = batches()
    for number, each in enumerate(stats):
        each.executor = number % executors
    metrics = batch_metrics(stats, 30, 1.0)
    metrics["prediction"]["kind"] = "recent"
    metrics |= {
        "quality": {},
        "expert_bytes": {"resident_peak": 0, "total": 9_000_000, "budget": 4},
        "lost": {f"{kind}s": 0 for kind in ("driver", "machine", "store", "executor", "predictor", "member")},
        "config": {"executors": executors, "store": {"budget": "20%"}},
    }
    say_results(metrics, Path("out"))
    out = capsys.readouterr().out
    assert said in out and "train it" not in out
