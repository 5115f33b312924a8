"""The comparison of gatings, at a tiny size: both compute the same where nobody is dropped; the report says what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipeline.bench import gating
from pipeline.bench.gating_layer import SETTINGS, Gating, Setting
from tests.pipeline.interpreted import Interpreter

TINY = Setting("lm", 8, 32, 64, 2, 4, 0.5, SETTINGS["lm"].paper)
CPU = torch.device("cpu")


def test_both_gatings_compute_the_same_where_every_token_finds_a_place():
    torch.manual_seed(0)
    layer = Gating(replace(TINY, capacity=1.0), CPU, torch.float32)
    hidden = torch.randn(3, 4, TINY.d_model)
    assert torch.allclose(layer.static(hidden), layer.dynamic(hidden), atol=1e-5)
    assert layer.dynamic(hidden).abs().max() > 0.01
    cramped = Gating(replace(TINY, capacity=1 / 12), CPU, torch.float32)
    assert not torch.allclose(cramped.static(hidden), cramped.dynamic(hidden), atol=1e-5), "tokens are dropped"


def kernels_beside_the_loop() -> float:
    torch.manual_seed(0)
    layer = Gating(TINY, CPU, torch.float32)
    hidden = torch.randn(6, TINY.d_model)
    routing = layer.route(hidden)
    return float((layer._grouped(hidden, routing) - layer._looped(hidden, routing)).abs().max())


def test_the_kernels_compute_what_the_loop_does():
    with Interpreter() as interpreted:
        assert interpreted(kernels_beside_the_loop) < 1e-5


def test_a_report_has_rows_for_both_and_the_papers_figures_beside_them(tmp_path):
    report = gating.run([TINY], tmp_path, CPU, torch.float32, most=8, seconds=60)
    rows = [(row["kind"], row["batch"]) for row in report["rows"]]
    assert rows == [(kind, batch) for kind in ("static", "dynamic") for batch in (1, 2, 4, 8)]
    assert all(row["layer_ms"] > 0 and row["slice_ms"] > 0 and row["tokens"] == 4 * row["batch"] for row in report["rows"])
    (one,) = json.loads((tmp_path / "gating.json").read_text())["settings"]
    assert one["largest_batch"] == {"static": 8, "dynamic": 8}
    assert one["times_as_fast"]["slice"].keys() == {"1", "2", "4", "8"}
    assert "| lm | 2.0 | 6.21 |" in (tmp_path / "gating.md").read_text()


def test_what_there_is_no_memory_or_time_for_is_said_and_does_not_end_the_sitting(tmp_path, monkeypatch):
    measured = gating._timed

    def small_device(forward, inputs, until):
        if inputs.shape[0] > 2:
            raise torch.OutOfMemoryError("of a test")
        return measured(forward, inputs, until)

    monkeypatch.setattr(gating, "_timed", small_device)
    report = gating.run([TINY], tmp_path, CPU, torch.float32, most=8, seconds=60)
    assert [row.get("left_out") for row in report["rows"]] == [None, None, "out of memory"] * 2
    assert report["settings"][0]["largest_batch"] == {"static": 2, "dynamic": 2}
    report = gating.run([TINY], tmp_path, CPU, torch.float32, most=8, seconds=0)
    assert {row["left_out"] for row in report["rows"]} == {"no time was left"}
    assert report["settings"][0]["largest_batch"] is None


def test_the_settings_waste_what_the_paper_says():
    assert [setting.waste for setting in SETTINGS.values()] == pytest.approx([12.8, 64, 64])
