"""A rehearsal of a real model: right where its stand-ins are whole, wherever it runs; and what is kept on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Config, parse
from pipeline.executor import Executor
from pipeline.predicting import stand_ins
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.predicting.train import record
from pipeline.prepare import Prepared, check_predictor, made_stand_ins, own_predictor, prepare
from predictor.distil import Distillation
from predictor.errors import PredictorError
from predictor.hash_table import Width
from predictor.rehearsal import Rehearsal
from predictor.settings import TrainSettings
from predictor.stand_ins import Plan, load
from predictor.tokens import TokenBatch
from predictor.traces import Trace, save_atomically
from predictor.training import evaluate, fit
from store.actor import ExpertStore
from store.arena import Arena
from store.errors import SpaceError
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv

TEXTS = [*SENTENCES, *(" ".join(SENTENCES[i:]) for i in range(len(SENTENCES))), "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("rehearsal") / "switch"
    return directory, save_switch(directory, expert_capacity=6)


def config(tmp_path: Path, directory: Path, kind: str = "4bit", budget: str = "100%", **changes) -> Config:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    data = write_tsv(tmp_path / "data.tsv", TEXTS)
    predictor = {"kind": "rehearsal", "stand_ins": {"kind": kind, "budget": budget}} | changes.pop("predictor", {})
    return parse(config_data(directory, data, tmp_path / "arenas", tmp_path / "out", predictor=predictor, **changes), "test")


@contextmanager
def opened(config: Config) -> Iterator[tuple[Prepared, Arena]]:
    prepared = prepare(config)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    arena = Arena.attach(prepared.arena)
    try:
        yield prepared, arena
    finally:
        arena.close()
        store.close(keep=False)


def accuracy(prepared: Prepared, arena: Arena, trace: Trace) -> dict[str, list[float]]:
    return evaluate(own_predictor(prepared, arena.identity), trace, prepared.model.shape).rates()


@pytest.mark.parametrize("changes", [{}, {"task": "score", "data": {"target": "sentence"}}])
def test_with_stand_ins_of_full_rank_a_rehearsal_says_what_the_routers_will_decide(tmp_path, model, changes):
    with opened(config(tmp_path, model[0], "svd", **changes)) as (prepared, arena):
        rates = accuracy(prepared, arena, record(prepared))
        assert rates["top1"][0] == 1
        assert min(rates["top1"]) > 0.98  # factors are of float16
        assert min(rates["top3"]) == 1


def test_a_classification_head_is_rehearsed_as_well(tmp_path):
    save_switch(tmp_path / "head", head=True, num_labels=2)
    with opened(config(tmp_path, tmp_path / "head", "svd")) as (prepared, arena):
        assert min(accuracy(prepared, arena, record(prepared))["top1"]) > 0.98


def test_better_stand_ins_predict_better_and_the_first_router_needs_none(tmp_path, model):
    found = {}
    for kind, budget in (("none", "100%"), ("svd", "25%"), ("2bit", "100%"), ("4bit", "100%")):
        with opened(config(tmp_path, model[0], kind, budget)) as (prepared, arena):
            found[kind] = accuracy(prepared, arena, record(prepared))["top1"]
    assert {rates[0] for rates in found.values()} == {1.0}
    later = {kind: sum(rates[1:]) for kind, rates in found.items()}
    assert later["none"] < later["2bit"] < later["4bit"]
    assert later["none"] < later["svd"] < later["4bit"]


def test_padding_and_the_rows_beside_it_change_nothing(tmp_path, model):
    with opened(config(tmp_path, model[0])) as (prepared, arena):
        predictor = own_predictor(prepared, arena.identity)
        rows = [row for batch in prepared.batches for row in zip(*batch.tokens.streams, strict=True)]
        together = predictor.predict(TokenBatch(tuple(zip(*rows, strict=True))))
        alone = [predictor.predict(TokenBatch(tuple((ids,) for ids in row))) for row in rows]
        for layer in range(prepared.model.shape.layers):
            expected = np.concatenate([table.experts[layer][:, 0] for table in alone])
            assert (together.experts[layer][:, 0] == expected).mean() > 0.99
            np.testing.assert_allclose(
                together.scaling[layer][:, 0], np.concatenate([table.scaling[layer][:, 0] for table in alone]), atol=2e-2
            )


def test_hash_routing_by_a_faithful_rehearsal_is_nearly_exact(tmp_path):
    """Where no router is over its capacity, which hash routing does not know."""
    whole = save_switch(tmp_path / "roomy")
    with opened(config(tmp_path, tmp_path / "roomy", "svd", routing="hash")) as (prepared, arena):
        predictor = own_predictor(prepared, arena.identity)
        executor = Executor(prepared.executor_spec())
        from predictor.actor import timed

        apart, largest = [], []
        for batch in prepared.batches:
            ours = executor.execute(batch, timed(predictor, batch.tokens), "hash").results
            theirs = answers(prepared.task, whole, batch)
            apart += [np.abs(np.array(a["scores"]) - b["scores"]).max() for a, b in zip(ours, theirs, strict=True)]
            largest += [np.abs(b["scores"]).max() for b in theirs]
        executor.close()
        assert np.median(apart) < 2e-3 * np.median(largest)


def test_on_a_cpu_the_backbone_is_the_arenas_own_pages(tmp_path, model):
    with opened(config(tmp_path, model[0], "none")) as (prepared, arena):
        made = load(made_stand_ins(prepared), prepared.model.shape.layers, arena.identity)
        rehearser = ArenaModel(prepared.model, prepared.arena, arena).rehearser(made, "cpu")
        inside = range(arena.memory.data_ptr(), arena.memory.data_ptr() + arena.memory.numel())
        assert all(p.data_ptr() in inside for p in rehearser.model.parameters())


# where stand-ins are kept


def test_stand_ins_are_made_once_and_found_again(tmp_path, model):
    with opened(config(tmp_path, model[0])) as (prepared, arena):
        path = stand_ins.cached(prepared.stand_ins, arena, "cpu", tmp_path / "cache")
        before = path.stat()
        assert stand_ins.cached(prepared.stand_ins, arena, "cpu", tmp_path / "cache") == path
        assert path.stat() == before
        assert os.listdir(tmp_path / "cache") == [path.name]


def test_other_weights_and_other_budgets_have_files_of_their_own(tmp_path, model):
    save_switch(tmp_path / "other", seed=1)
    paths = set()
    for directory, kind, budget in ((model[0], "svd", "20%"), (model[0], "svd", "40%"), (tmp_path / "other", "svd", "20%")):
        with opened(config(tmp_path, directory, kind, budget)) as (prepared, arena):
            paths.add(stand_ins.cached(prepared.stand_ins, arena, "cpu", tmp_path / "cache"))
    assert len(paths) == 3


def test_a_kept_file_that_was_cut_short_is_said_and_made_anew(tmp_path, model, capsys):
    with opened(config(tmp_path, model[0])) as (prepared, arena):
        path = stand_ins.cached(prepared.stand_ins, arena, "cpu", tmp_path / "cache")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert stand_ins.cached(prepared.stand_ins, arena, "cpu", tmp_path / "cache") == path
        load(path, prepared.model.shape.layers, arena.identity)
        said = capsys.readouterr().out
        assert f"{path}: truncated" in said and "making it anew" in said and said.count("\n") == 1


def test_a_path_that_holds_another_kind_of_predictor_is_refused(tmp_path, model):
    path = tmp_path / "lstm.safetensors"
    save_atomically({}, path, {"kind": "lstm"})
    with pytest.raises(PredictorError, match="holds a lstm") as error:
        check_predictor(prepare(config(tmp_path, model[0], predictor={"path": str(path)})))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_left_to_itself_it_takes_what_fits_and_on_the_executors_device_a_fifth_of_the_budget(tmp_path, model):
    def planned(device: str, budget: str):
        predictor = {"device": device, "stand_ins": {}}
        return prepare(config(tmp_path, model[0], predictor=predictor, store={"budget": budget} | arenas(tmp_path)))

    assert planned("cpu", "5%").stand_ins.method == "4bit"
    small = planned("executor", "20%")
    assert (small.stand_ins.method, small.stand_ins.size > 0) == ("svd", True)
    assert small.stand_ins.nbytes <= 0.2 * 0.2 * small.layout.expert_bytes
    assert planned("executor", "1%").stand_ins == Plan("none", 0, 0)


def test_as_a_gpu_runs_it_it_names_the_same_experts_for_one_batch_and_for_several_together(tmp_path, model):
    for kind in ("svd", "none"):
        with opened(config(tmp_path, model[0], kind, "30%")) as (prepared, arena):
            made = load(made_stand_ins(prepared), prepared.model.shape.layers, arena.identity)
            rehearser = ArenaModel(prepared.model, prepared.arena, arena).rehearser(made, "cpu")
            shape = prepared.model.shape
            alone = Rehearsal(rehearser, None, shape, Width(3))
            batches = [batch.tokens for batch in prepared.batches]
            expected = [alone.predict(tokens) for tokens in batches]
            fast = Rehearsal(rehearser, None, shape, Width(3), rehearser.on_device())
            for tables in (fast.predict_all(batches), [fast.predict(tokens) for tokens in batches]):
                for mine, theirs in zip(tables, expected, strict=True):
                    for layer in range(shape.layers):
                        assert (mine.experts[layer] == theirs.experts[layer]).mean() > 0.99
                        np.testing.assert_allclose(mine.probability[layer], theirs.probability[layer], atol=1e-3)
                        np.testing.assert_allclose(mine.scaling[layer], theirs.scaling[layer], atol=1e-3)


# where it runs


def test_in_the_executors_process_it_makes_the_same_tables_and_answers_are_exact(tmp_path, model):
    directory, whole = model
    settings = config(
        tmp_path, directory, budget="40%", predictor={"device": "executor"}, store={"budget": "60%"} | arenas(tmp_path)
    )
    with opened(settings) as (prepared, arena):
        assert prepared.predictor_device == "executor"
        spec = prepared.predictor_spec(arena.identity, made_stand_ins(prepared))
        outside = own_predictor(prepared, arena.identity)
        executor = Executor(replace(prepared.executor_spec(), predictor=spec))
        executor.ready()
        for batch in prepared.batches:
            result = executor.execute(batch, None)
            assert result.stats.predict_span is not None
            assert result.stats.predicted_uses == pytest.approx(outside.predict(batch.tokens).expected_uses("exact"), rel=1e-3)
            for mine, theirs in zip(result.results, answers(prepared.task, whole, batch), strict=True):
                assert np.abs(np.array(mine["scores"]) - theirs["scores"]).max() <= 1e-5 * max(1, np.abs(theirs["scores"]).max())
        executor.execute(prepared.batches[0], None, "hash")
        executor.close()


def arenas(tmp_path: Path) -> dict:
    return {"directory": str(tmp_path / "arenas")}


def test_on_the_executors_device_stand_ins_count_in_the_budget(tmp_path, model):
    def slots(device: str, budget: str) -> int:
        settings = config(
            tmp_path, model[0], "4bit", "40%", predictor={"device": device}, store={"budget": budget} | arenas(tmp_path)
        )
        return prepare(settings).slots

    prepared = prepare(config(tmp_path, model[0], "4bit", "40%"))
    taken = prepared.stand_ins.nbytes
    assert slots("cpu", "60%") * prepared.layout.slot_bytes + prepared.layout.slot_bytes > 0.6 * prepared.layout.expert_bytes
    whole = int(0.6 * prepared.layout.expert_bytes)
    assert slots("executor", "60%") == (whole - taken) // prepared.layout.slot_bytes < slots("cpu", "60%")
    with pytest.raises(SpaceError, match=r"stand-ins on the same device take \d+: \d+ bytes short"):
        slots("executor", "5%")


def test_on_a_machine_without_a_gpu_auto_is_the_predictor_actor(tmp_path, model):
    assert prepare(config(tmp_path, model[0])).predictor_device == "cpu"


# distilling


def test_distilled_stand_ins_of_low_rank_predict_better_than_the_best_of_their_rank(tmp_path, model):
    with opened(config(tmp_path, model[0], "svd", "10%", data={"limit": 12})) as (prepared, arena):
        trace, shape = record(prepared), prepared.model.shape
        access = ArenaModel(prepared.model, prepared.arena, arena)
        made = stand_ins.make(prepared.stand_ins, arena, "cpu")

        def judged(of) -> float:
            return evaluate(Rehearsal(access.rehearser(of, "cpu"), None, shape, Width(3)), trace, shape).mean_top1

        def under_way(of):
            rehearser = access.rehearser(of, "cpu")
            return rehearser.logits, Rehearsal(rehearser, None, shape, Width(3))

        settings = TrainSettings(epochs=12, lr=1e-2, batch_size=4)
        learner = Distillation(made, under_way, shape, settings)
        history = fit(learner, trace, trace, shape, settings, 0)
        after = learner.stand_ins()
        assert after.nbytes == made.nbytes
        assert judged(after) > judged(made) + 0.03
        assert judged(after) == pytest.approx(max(epoch.top1 for epoch in history), abs=0.01)
