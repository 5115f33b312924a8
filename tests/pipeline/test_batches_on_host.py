"""Batches through a GPU's Executor on the host (host_gpu.py): eager, whole and in pieces, they answer as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.tasks.score import ScoreText
from predictor.actor import Prediction, timed
from predictor.baselines import Random
from predictor.hash_table import HashTable
from predictor.tokens import TokenBatch
from tests.pipeline.test_families import Served
from tests.pipeline.tiny_families import save_tiny

SCORE = ScoreText(0, None)
LENGTHS = [(9, 5, 3), (7, 8, 2), (4, 9, 8)]
"""Of batches that are padded to one shape, or not at all."""


def batches(count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        rows = tuple(rng.integers(3, 100, length) for length in LENGTHS[index % len(LENGTHS)])
        made.append(Batch(index, np.arange(3), TokenBatch((rows,)), tuple(row[1:] for row in rows)))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("qwen") / "model"
    save_tiny("qwen3_moe", directory, num_hidden_layers=4)
    return directory


@contextmanager
def executors(model: Path, arenas: Path, share: float, **how) -> Iterator[tuple[Executor, Executor]]:
    """A GPU's and a CPU's, over one arena. A GPU's slots are NaN."""
    from tests.pipeline.host_gpu import host_gpu  # needs Triton

    arenas.mkdir(exist_ok=True)
    served = Served(model, arenas)
    slots = int(share * served.layout.expert_bytes) // served.layout.slot_bytes
    spec = ExecutorSpec(served.spec, SCORE, served.arena, slots, "lookahead", "cpu", 1, **how)
    with served.store():
        cpu = Executor(replace(spec, background=False))
        cpu.ready()
        with host_gpu():
            gpu = Executor(spec)
            gpu.ready()
            if share < 1:
                gpu._device.engine.slots.memory.fill_(255)
            try:
                yield gpu, cpu
            finally:
                gpu.close()
                cpu.close()


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    np.testing.assert_allclose([row["logprob"] for row in ours], [row["logprob"] for row in theirs], rtol=1e-5)


def uneven(prediction: Prediction, number: int) -> Prediction:
    """The same table, in which some layers name fewer experts than others: other layers from batch to batch."""
    table = prediction.table
    every = (table.experts, table.probability, table.scaling)
    fields = ([part[:, : 1 + (layer + number) % 2] for layer, part in enumerate(parts)] for parts in every)
    return replace(prediction, table=HashTable(*map(tuple, fields)))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("width", ["even", "uneven"])
def test_where_tables_decide_a_gpus_answers_are_a_cpus(tmp_path, model, share, width):
    with executors(model, tmp_path / "arenas", share) as (gpu, cpu):
        predictor, ways = Random(gpu._spec.model.shape, top_k=2, seed=0), set()
        for batch in batches(9):
            table = timed(predictor, batch.tokens)
            table = uneven(table, batch.index) if width == "uneven" else table
            if share < 1:  # else there is one way
                gpu._device.engine.is_ready = lambda index: index % 2 == 0
            ours, theirs = (executor.execute(batch, table, "hash") for executor in (gpu, cpu))
            assert_same(ours.results, theirs.results)
            uses = [hits + misses for hits, misses in zip(ours.stats.hits, ours.stats.misses, strict=True)]
            assert uses == [len(np.unique(layer)) for layer in table.table.experts]
            ways.add(ours.stats.how)
        assert ways == {"eager: first of its shape", "whole", "pieces"} - ({"pieces"} if share == 1 else set())


def test_batches_that_are_handed_over_at_once_do_not_mix(tmp_path, model):
    """Their tensors wait in memory of their own until it is their turn."""
    with executors(model, tmp_path / "arenas", 0.4) as (gpu, cpu):
        predictor = Random(gpu._spec.model.shape, top_k=2, seed=0)
        tables = [timed(predictor, batch.tokens) for batch in batches(9)]
        waiting = [gpu.submit(batch, table, "hash") for batch, table in zip(batches(9), tables, strict=True)]
        for batch, table, done in zip(batches(9), tables, waiting, strict=True):
            assert_same(done.result().results, cpu.execute(batch, table, "hash").results)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_where_routers_decide_a_gpus_answers_are_a_cpus(tmp_path, model, share):
    with executors(model, tmp_path / "arenas", share) as (gpu, cpu):
        predictor = Random(gpu._spec.model.shape, top_k=2, seed=0)
        for batch in batches(9):
            table = timed(predictor, batch.tokens)
            assert_same(gpu.execute(batch, table).results, cpu.execute(batch, table).results)


def test_a_trace_on_a_gpu_is_a_cpus(tmp_path, model):
    with executors(model, tmp_path / "arenas", 0.4) as (gpu, cpu), torch.inference_mode():
        for batch in batches(3):
            ours, theirs = gpu.trace(batch, 3), cpu.trace(batch, 3)
            for one, other in zip(ours.layers, theirs.layers, strict=True):
                assert np.array_equal(one.top[:, 0], other.top[:, 0])


def test_routers_are_asked_while_tables_are_doubted(tmp_path, model):
    """And their experts come into slots, as none of the table's does; with trust, batches run as before."""
    from pipeline.gpu.on_gpu import ASKED

    with executors(model, tmp_path / "arenas", 0.4) as (gpu, cpu):
        predictor, engine = Random(gpu._spec.model.shape, top_k=2, seed=0), gpu._device.engine
        for batch in batches(12):
            engine._doubt.asks = 3 <= batch.index < 9
            ours, theirs = (executor.execute(batch, timed(predictor, batch.tokens)) for executor in (gpu, cpu))
            assert_same(ours.results, theirs.results)
            assert (ours.stats.how == ASKED) == engine._doubt.asks
            if ours.stats.how == ASKED:
                assert sum(ours.stats.misses) == 0, "a layer has fewer experts than there are slots"
                assert ours.stats.demand_bytes > 0
                if batch.index > 3:
                    assert ours.stats.prefetch_bytes == 0


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_layer_of_more_experts_than_slots_is_exact_in_doubt(tmp_path, model, share):
    with executors(model, tmp_path / "arenas", share) as (gpu, cpu):
        predictor = Random(gpu._spec.model.shape, top_k=2, seed=0)
        gpu._device.engine._doubt.asks = True
        for batch in batches(6):
            table = timed(predictor, batch.tokens)
            assert_same(gpu.execute(batch, table).results, cpu.execute(batch, table).results)
