"""Exact means exact: against transformers on the whole model, for the same batches, whatever budget, policy and predictor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Config, parse
from pipeline.executor import Executor
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.prepare import Prepared, made_stand_ins, prepare
from predictor.actor import Predictor
from predictor.hash_function import HashFunction
from predictor.hash_table import Width
from predictor.registry import save_lstm, save_token_table
from predictor.token_table import TokenTable
from predictor.traces import join
from store.actor import ExpertStore
from store.errors import SpaceError
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv

FILES = ("lstm", "token_table")
TEXTS = [*SENTENCES, *(" ".join(SENTENCES[i:]) for i in range(len(SENTENCES))), "x", "one two three " * 30, "fine, really"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("exact") / "switch"
    return directory, save_switch(directory, expert_capacity=6)  # small enough that tokens are dropped


def config(tmp_path: Path, directory: Path, **changes) -> Config:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    data = write_tsv(tmp_path / "data.tsv", TEXTS)
    return parse(config_data(directory, data, tmp_path / "arenas", tmp_path / "out", **changes), "test")


@contextmanager
def served(config: Config, background: bool = True) -> Iterator[tuple[Prepared, Executor, Predictor]]:
    """The three actors' classes in one process, slots poisoned."""
    prepared = prepare(config)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    arena = store.open()
    make_predictor_file(config, prepared, arena.identity)
    model = ArenaModel(prepared.model, arena.path)
    predictor = Predictor(prepared.predictor_spec(arena.identity, made_stand_ins(prepared)), model)
    executor = Executor(prepared.executor_spec(background))
    executor._device._engine.slots.memory.fill_(255)  # NaN in every float dtype: an expert that was not copied shows
    try:
        yield prepared, executor, predictor
    finally:
        executor.close()
        assert store.close(keep=False)


def make_predictor_file(config: Config, prepared: Prepared, identity: str) -> None:
    shape, path = prepared.model.shape, Path(config.predictor.path or "")
    if config.predictor.kind == "lstm":
        torch.manual_seed(1)
        save_lstm(HashFunction(shape, prepared.model.config["d_model"], 16), path, shape, identity, None)
    if config.predictor.kind == "token_table":
        executor = Executor(prepared.executor_spec())
        trace = join([executor.trace(batch, 30) for batch in prepared.batches])
        executor.close()
        save_token_table(TokenTable.fit(trace, shape, Width(3)), path, identity, None)


def assert_equal_results(ours: list[dict], theirs: list[dict]) -> None:
    """DESIGN's contract for float32."""
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["index"] == reference["index"]
        a = np.array(mine.get("scores", [mine.get("logprob")]))
        b = np.array(reference.get("scores", [reference.get("logprob")]))
        tolerance = 1e-5 * max(1.0, np.abs(b).max())
        assert np.abs(a - b).max() <= tolerance
        if "label" in mine and np.sort(b)[-1] - np.sort(b)[-2] > tolerance:
            assert mine["label"] == reference["label"]


def run_and_compare(config: Config, whole: torch.nn.Module, ahead: int = 3) -> list:
    """Runs all batches with tables made `ahead`; compares each with the whole model; returns the statistics."""
    with served(config) as (prepared, executor, predictor):
        tables = [predictor.predict(batch.tokens) for batch in prepared.batches]
        stats = []
        for i, batch in enumerate(prepared.batches):
            for j in range(i, min(i + ahead, len(tables))):
                executor.plan(prepared.batches[j].index, tables[j])
            result = executor.execute(batch, tables[i])
            with torch.inference_mode():
                assert_equal_results(result.results, answers(prepared.task, whole, batch))
            stats.append(result.stats)
        assert sum(len(batch.rows) for batch in prepared.batches) == len(TEXTS)
        return stats


@pytest.mark.parametrize("kind", ["lstm", "token_table", "rehearsal", "random"])
@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead"])
@pytest.mark.parametrize("budget", ["0", "10%", "37%", "100%"])
def test_equals_the_whole_model_for_every_budget_policy_and_predictor(tmp_path, model, budget, policy, kind):
    directory, whole = model
    run_and_compare(
        config(
            tmp_path,
            directory,
            store={"budget": budget, "policy": policy, "directory": str(tmp_path / "arenas")},
            predictor={"kind": kind, "top_k": 3} | ({"path": str(tmp_path / "p.safetensors")} if kind in FILES else {}),
        ),
        whole,
    )


@pytest.mark.parametrize("order", ["input", "length"])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_equals_the_whole_model_for_unequal_lengths_in_any_batch_size(tmp_path, model, size, order):
    directory, whole = model
    run_and_compare(config(tmp_path, directory, batch={"size": size, "order": order, "max_tokens": 60}), whole)


def test_an_executor_may_be_closed_twice(tmp_path, model):
    with served(config(tmp_path, model[0])) as (_, executor, _):
        executor.close()


def test_tokens_over_an_experts_capacity_are_dropped_as_in_transformers(tmp_path, model):
    directory, whole = model
    dropped = []
    for layer in whole.encoder.block:
        router = getattr(getattr(layer.layer[-1], "mlp", None), "router", None)
        if router is not None:
            router.register_forward_hook(lambda m, i, o: dropped.append(int((o[0].sum(-1) == 0).sum())))
    run_and_compare(config(tmp_path, directory, batch={"size": 4}), whole)
    assert sum(dropped) > 0, "the test must meet a full expert"


def test_a_classification_head_equals_the_whole_model(tmp_path):
    whole = save_switch(tmp_path / "head", head=True, num_labels=2)
    run_and_compare(config(tmp_path, tmp_path / "head"), whole)


def test_scores_equal_the_whole_model(tmp_path, model):
    directory, whole = model
    run_and_compare(config(tmp_path, directory, task="score", data={"target": "sentence"}, batch={"size": 3}), whole)


def test_sharded_bfloat16_checkpoints_are_served_as_transformers_loads_them(tmp_path):
    from transformers import SwitchTransformersForConditionalGeneration

    save_switch(tmp_path / "f32")
    model = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bf16" / name).write_bytes((tmp_path / "f32" / name).read_bytes())
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) >= 2
    whole = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    run_and_compare(config(tmp_path, tmp_path / "bf16"), whole)


def test_resident_bytes_are_counted_and_not_the_budget_repeated(tmp_path, model):
    directory, _ = model
    settings = config(tmp_path, directory, store={"budget": "100%", "directory": str(tmp_path / "arenas")}, data={"limit": 1})
    with served(settings, background=False) as (prepared, executor, predictor):
        batch = prepared.batches[0]
        prediction = predictor.predict(batch.tokens)
        stats = executor.execute(batch, prediction).stats
        stayed = sum(stats.misses) * prepared.layout.slot_bytes  # whoever missed a slot got one: there is room for all
        assert stats.resident_peak_bytes == stats.prefetch_bytes + stayed == sum(stats.resident) * prepared.layout.slot_bytes
        assert stats.resident_peak_bytes < prepared.budget_bytes


@pytest.mark.parametrize("budget", ["0", "5%", "20%", "60%"])
def test_resident_bytes_never_exceed_the_budget(tmp_path, model, budget):
    directory, whole = model
    settings = config(tmp_path, directory, store={"budget": budget, "policy": "lru", "directory": str(tmp_path / "arenas")})
    stats = run_and_compare(settings, whole)
    with served(settings) as (prepared, _, _):
        assert prepared.budget_bytes <= float(budget.rstrip("%")) / 100 * prepared.layout.expert_bytes
        assert max(s.resident_peak_bytes for s in stats) <= prepared.budget_bytes


def test_statistics_of_a_batch_are_plain_data(tmp_path, model):
    directory, _ = model
    with served(config(tmp_path, directory)) as (prepared, executor, predictor):
        batch = prepared.batches[0]
        entry = executor.execute(batch, predictor.predict(batch.tokens)).to_dict()
        assert json.loads(json.dumps(entry)) == entry


class TestHashRouting:
    """The paper's mode: the table is the routing."""

    def reference(self, whole, table, prepared, batch):
        """The whole model with each MoE layer replaced by its definition, over dense tensors."""

        class Dense(torch.nn.Module):
            def __init__(self, mlp, layer):
                super().__init__()
                self.mlp, self.layer = mlp, layer

            def forward(self, hidden):
                stream = prepared.model.shape.streams[self.layer]
                lengths, out, token = batch.tokens.lengths[stream], torch.zeros_like(hidden), 0
                for row, length in enumerate(lengths):
                    for position in range(length):
                        for k in range(table.experts[self.layer].shape[1]):
                            expert = self.mlp.experts[f"expert_{table.experts[self.layer][token, k]}"]
                            scale = float(table.scaling[self.layer][token, k])
                            out[row, position] += scale * expert(hidden[row, position][None])[0]
                        token += 1
                return out

        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        places = [n for n, m in whole.named_modules() if isinstance(m, SwitchTransformersSparseMLP)]
        places.sort(key=lambda name: name.startswith("decoder"))
        originals = [whole.get_submodule(name) for name in places]
        try:
            for layer, (name, mlp) in enumerate(zip(places, originals, strict=True)):
                whole.set_submodule(name, Dense(mlp, layer))
            with torch.inference_mode():
                return answers(prepared.task, whole, batch)
        finally:
            for name, mlp in zip(places, originals, strict=True):
                whole.set_submodule(name, mlp)

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_equals_its_definition(self, tmp_path, model, top_k):
        directory, whole = model
        path = str(tmp_path / "predictor.safetensors")
        settings = config(tmp_path, directory, predictor={"kind": "lstm", "path": path, "top_k": top_k}, batch={"size": 3})
        with served(settings) as (prepared, executor, predictor):
            for batch in prepared.batches[:3]:
                prediction = predictor.predict(batch.tokens)
                result = executor.execute(batch, prediction, "hash")
                assert_equal_results(result.results, self.reference(whole, prediction.table, prepared, batch))

    def test_runs_no_router(self, tmp_path, model):
        directory, _ = model
        with served(config(tmp_path, directory)) as (prepared, executor, predictor):
            asked = []
            for name, module in executor._device.model.named_modules():
                if name.endswith("router"):
                    module.register_forward_hook(lambda m, i, o: asked.append(1))
            batch = prepared.batches[0]
            prediction = predictor.predict(batch.tokens)
            executor.execute(batch, prediction, "hash")
            assert not asked
            executor.execute(batch, prediction, "exact")
            assert asked


def test_an_executor_that_cannot_stand_says_so_when_asked_and_gives_all_back(tmp_path, model, monkeypatch):
    directory, _ = model
    refusal = SpaceError("no room")

    def refuse(spec, arena):
        raise refusal

    with served(config(tmp_path, directory)) as (prepared, _, _):
        monkeypatch.setattr("pipeline.executor._make_device", refuse)
        executor = Executor(prepared.executor_spec())
        with pytest.raises(SpaceError, match="no room"):
            executor.ready()
        executor.close()
        executor.close()
