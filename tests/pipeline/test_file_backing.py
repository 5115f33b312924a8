"""`store.backing: file`: exact answers from an arena on a disk of which RAM holds a third."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch_result import BatchResult
from pipeline.config import StoreConfig, parse
from pipeline.executor import Executor
from pipeline.plan.footprint import footprint
from pipeline.predicting.watch import Watch
from pipeline.prepare import arena_directory, own_predictor, prepare
from predictor.actor import timed
from store.load import load
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv
from tests.pipeline.test_metrics import stats
from tests.store.pages import cached, evict


@pytest.fixture
def config(tmp_path, arena_dir):
    """A model of some megabytes, so that its arena is hundreds of pages."""
    rows = write_tsv(tmp_path / "rows.tsv", [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(24)])
    model = save_switch(tmp_path / "model", d_ff=512, num_experts=16)
    store = {"budget": "20%", "policy": "lookahead", "backing": "file", "directory": str(arena_dir)}
    return parse(config_data(tmp_path / "model", rows, arena_dir, tmp_path / "out", store=store), "test"), model


@pytest.mark.parametrize("background", [True, False])
def test_answers_are_exact_while_two_thirds_of_the_arena_are_out_of_ram(config, background):
    settings, whole = config
    prepared = prepare(settings)
    arena = load(prepared.arena, prepared.weights, prepared.model.placement)
    spec = prepared.executor_spec(background)
    assert spec.read_ahead
    executor = Executor(spec)
    executor.ready()
    held = executor._arena
    evict(held)
    if cached(held) > 0.9:
        pytest.skip(f"the filesystem of {prepared.arena} keeps its pages in RAM")
    predictor = own_predictor(prepared, arena.identity)
    evictions = 0
    for batch in prepared.batches:
        if cached(held) > 1 / 3:
            evict(held)
            evictions += 1
        result = executor.execute(batch, timed(predictor, batch.tokens))
        for mine, theirs in zip(result.results, answers(prepared.task, whole, batch), strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["scores"] == pytest.approx(theirs["scores"], rel=1e-5, abs=1e-5)
    assert evictions > len(prepared.batches) // 2
    executor.close()
    arena.remove()


def test_a_file_takes_no_ram_from_what_a_budget_may_have(config, monkeypatch):
    settings, _ = config
    monkeypatch.setattr("pipeline.prepare.available_memory", lambda: 2**20)
    on_disk = footprint(settings)
    assert on_disk.layout.nbytes > 2**20
    assert on_disk.free == 2**20
    in_ram = footprint(replace(settings, store=replace(settings.store, backing="shm")))
    assert in_ram.free == 0


def test_a_run_says_once_that_experts_are_staged_and_why(config, tmp_path, capsys):
    prepared = prepare(config[0])
    watch = Watch(prepared, tmp_path, prepared.predictor_spec("identity"))
    watch.saw(BatchResult(0, [], stats()))
    assert capsys.readouterr().out == ""
    for batch in (1, 2):
        watch.saw(BatchResult(batch, [], stats(miss_path="staged: no such luck")))
    assert capsys.readouterr().out == "experts come through a pinned ring, which is slower; staged: no such luck\n"


def test_without_a_directory_a_file_goes_to_the_users_cache_and_ram_to_dev_shm(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = arena_directory(StoreConfig(backing="file"))
    assert directory == tmp_path / "cache" / "sida-moe" / "arenas" and directory.is_dir()
    assert arena_directory(StoreConfig()) == Path("/dev/shm")
