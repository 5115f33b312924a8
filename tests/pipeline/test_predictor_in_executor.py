"""A predictor in the Executor's process: asked on a thread of its own, in the order of the batches, whatever happens to one."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import parse
from pipeline.executor import Executor
from pipeline.prepare import prepare
from predictor.actor import timed
from predictor.errors import PredictorError
from predictor.nobody import Nobody
from predictor.registry import PredictorSpec
from predictor.tokens import TokenBatch
from store.actor import ExpertStore
from tests.conftest import answers, config_data, save_switch, write_tsv


@pytest.fixture
def served(tmp_path: Path, arena_dir: Path):
    whole = save_switch(tmp_path / "model")
    prepared = prepare(
        parse(config_data(tmp_path / "model", write_tsv(tmp_path / "data.tsv"), arena_dir, tmp_path / "out"), "test")
    )
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    identity = store.open().identity
    executor = Executor(
        replace(prepared.executor_spec(), predictor=PredictorSpec("random", None, 2, prepared.model.shape, identity))
    )
    yield prepared, whole, executor
    executor.close()
    store.close(keep=False)


def assert_right(prepared, whole, batch, result) -> None:
    assert result.batch == batch.index
    for mine, theirs in zip(result.results, answers(prepared.task, whole, batch), strict=True):
        assert np.abs(np.array(mine["scores"]) - theirs["scores"]).max() <= 1e-5 * max(1, np.abs(theirs["scores"]).max())


def test_a_relative_file_is_found_after_the_jobs_working_directory_has_been_removed(tmp_path, arena_dir, monkeypatch):
    job = tmp_path / "job"
    job.mkdir()
    monkeypatch.chdir(job)
    save_switch(tmp_path / "model")
    settings = config_data(tmp_path / "model", write_tsv(tmp_path / "data.tsv"), arena_dir, tmp_path / "out")
    prepared = prepare(parse(settings | {"predictor": {"kind": "lstm", "path": "../lstm.safetensors"}}, "test"))
    job.rmdir()
    assert prepared.predictor_spec("identity").path == job / "../lstm.safetensors"


def test_submit_does_not_wait_for_a_prediction_and_none_overtakes_another(served, monkeypatch):
    prepared, whole, executor = served
    goes_on, asked, inner = threading.Event(), [], executor._predictor

    class Slow:
        def predict(self, tokens: TokenBatch):
            asked.append(threading.current_thread().name)
            goes_on.wait(60)
            return inner.predict(tokens)

    monkeypatch.setattr(Executor, "_predictor", Slow())
    first, *others = prepared.batches
    futures = [executor.submit(first, None)]
    table = timed(Nobody(prepared.model.shape), others[0].tokens)  # has its table, and waits for its turn all the same
    futures += [executor.submit(batch, table if batch is others[0] else None) for batch in others]
    assert not any(future.done() for future in futures)
    done: list[int] = []
    for future in futures:
        future.add_done_callback(lambda done_now: done.append(done_now.result().batch))
    goes_on.set()
    for batch, future in zip(prepared.batches, futures, strict=True):
        result = future.result(60)
        assert_right(prepared, whole, batch, result)
        assert result.stats.predict_span is not None
    assert sorted(done) == done == [batch.index for batch in prepared.batches]
    assert len(asked) == len(prepared.batches) - 1 and all(name.startswith("ahead") for name in asked)


def test_a_prediction_that_fails_is_that_batchs_error_and_no_other_batchs(served, monkeypatch):
    prepared, whole, executor = served
    inner, calls = executor._predictor, []

    class Failing:
        def predict(self, tokens: TokenBatch):
            calls.append(tokens)
            if len(calls) == 1:
                raise PredictorError("no")
            return inner.predict(tokens)

    monkeypatch.setattr(Executor, "_predictor", Failing())
    futures = [executor.submit(batch, None) for batch in prepared.batches]
    with pytest.raises(PredictorError, match="no"):
        futures[0].result(60)
    for batch, future in list(zip(prepared.batches, futures, strict=True))[1:]:
        assert_right(prepared, whole, batch, future.result(60))
    assert executor.spoken(prepared.batches[0].index) == []


def test_tables_can_be_had_before_there_are_batches(served):
    prepared, _, executor = served
    for batch in prepared.batches:
        prediction = executor.predict(batch.tokens)
        assert prediction.end >= prediction.start
        for mine, theirs in zip(prediction.table.experts, executor._predictor.predict(batch.tokens).experts, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_hash_routing_by_the_predictor_that_is_here(served):
    prepared, _, executor = served
    batch = prepared.batches[0]
    here = executor.execute(batch, None, "hash")
    there = executor.execute(replace(batch, index=100), executor.predict(batch.tokens), "hash")
    assert here.results == there.results
