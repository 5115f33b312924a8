"""The capacity-padded layer that `bench` compares with: exact where there is room, and dropping where there is not."""

from __future__ import annotations

import pytest
import torch

from pipeline.bench.command import bench
from pipeline.bench.static_gating import masks, static_model, waste_factor
from pipeline.config import parse
from pipeline.prepare import prepare
from store.load import load
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv


@pytest.fixture
def config(tmp_path, arena_dir):
    rows = write_tsv(tmp_path / "rows.tsv", SENTENCES)
    whole = save_switch(tmp_path / "model")

    def make(**changes):
        return parse(config_data(tmp_path / "model", rows, arena_dir, tmp_path / "out", **changes), "test")

    return make, whole


def test_with_places_for_all_answers_are_those_of_the_whole_model(config):
    make, whole = config
    prepared = prepare(make(batch={"size": 7}))
    arena = load(prepared.arena, prepared.weights, prepared.model.placement)
    model = static_model(prepared.model, arena, 1.0, torch.device("cpu"))
    (batch,) = prepared.batches
    for mine, theirs in zip(answers(prepared.task, model, batch), answers(prepared.task, whole, batch), strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    few = static_model(prepared.model, arena, 0.02, torch.device("cpu"))
    exact, dropped = (answers(prepared.task, m, batch) for m in (whole, few))
    assert any(abs(a["scores"][0] - b["scores"][0]) > 1e-3 for a, b in zip(exact, dropped, strict=True)), "tokens are dropped"
    arena.remove()


def test_first_choices_and_earlier_tokens_find_places_first():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [-1, 0]])  # of token 3 the router dropped the first choice
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    dispatch, combine = masks(experts, weights, count=3, places=2)
    assert dispatch.shape == combine.shape == (4, 3, 2)
    assert dispatch.nonzero().tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 2, 0], [2, 1, 1]]
    assert combine.sum((1, 2)).tolist() == pytest.approx([1.0, 1.0, 0.3, 0.0])
    assert dispatch.sum(0).max() == 1, "no place is taken twice"


def test_the_waste_is_the_papers():
    assert waste_factor(512, 2, 0.05) == pytest.approx(12.8)
    assert waste_factor(128, 2, 1) == pytest.approx(64)


def test_it_is_a_column_of_a_bench(config):
    make, _ = config
    systems = {"systems": ["transformers", "static-gating", "resident"], "rounds": 1, "batches": 2}
    report = bench(make(bench=systems, predictor={"top_k": 1}))
    rows = {row["system"]: row for row in report["rows"]}
    assert rows.keys() == {"transformers", "static-gating", "resident"}
    assert rows["static-gating"]["budget"] is None
    assert rows["static-gating"]["max_error"] < 1e-5
