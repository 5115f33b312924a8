"""Ranks on GPUs, one each, tokens through NCCL: answers equal the whole model's, as on a CPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.bench.workload import record_batches
from pipeline.config import parse
from pipeline.parallel.group import Group
from pipeline.parallel.load import measured
from pipeline.parallel.placement import place
from pipeline.parallel.processes import Processes
from pipeline.prepare import prepare
from predictor.actor import timed
from predictor.baselines import Oracle, Random
from predictor.traces import join
from store.actor import ExpertStore
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv
from tests.pipeline.test_exactness import assert_equal_results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

TEXTS = [*SENTENCES, *(" ".join(SENTENCES[i:]) for i in range(len(SENTENCES)))]
SEED = 0


class Served:
    """A model in float32, its batches of 3, the last without a neighbour, and what transformers says of them on the GPU."""

    def __init__(self, base: Path):
        whole = save_switch(base / "model", seed=SEED).cuda()
        (base / "arenas").mkdir()
        rows = write_tsv(base / "rows.tsv", TEXTS)
        changes = {"batch": {"size": 3, "order": "input"}, "device": "cuda"}
        self.prepared = prepare(parse(config_data(base / "model", rows, base / "arenas", base / "out", **changes), "a test"))
        self.store = ExpertStore(self.prepared.arena, self.prepared.model.source, self.prepared.model.placement)
        self.store.open()
        self.traces = record_batches(self.prepared)
        self.expected = [answers(self.prepared.task, whole, batch) for batch in self.prepared.batches]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("gpus"))
    assert len(served.prepared.batches) % 2 == 1
    yield served
    assert served.store.close(False, patience_s=5)


@pytest.mark.parametrize(
    ("replicas", "percent", "tables", "kills"),
    [(0, 100, "none", False), (1, 100, "oracle", True), (0, 0, "random", False), (1, 40, "oracle", False)],
)
def test_answers_equal_the_whole_model(served, replicas, percent, tables, kills):
    shape = served.prepared.model.shape
    plan = place(measured(served.traces, shape), 2, "greedy", replicas)
    slots = plan.most * percent // 100
    makers = {"oracle": Oracle(join(served.traces), shape, shape.top_k), "random": Random(shape, 2, 0)}
    predictions = [timed(makers[tables], batch.tokens) if tables in makers else None for batch in served.prepared.batches]
    started: list[Processes] = []

    def start() -> Processes:
        spec = replace(served.prepared.executor_spec(), slots=slots, policy="lookahead", threads=1)
        started.append(Processes(spec, plan, timeout_s=60))
        return started[-1]

    group = Group(start, plan)
    try:
        results = []
        for result in group.run(zip(served.prepared.batches, predictions, strict=True), "exact", ahead=1):
            results.append(result)
            if kills and len(results) == 1:
                os.kill(started[0].pids[1], signal.SIGKILL)
        for result, expected in zip(results, served.expected, strict=True):
            assert_equal_results(result.results, expected)
        assert group.restarts == kills
        if percent == 100:
            assert not any(sum(result.stats.misses) for result in results)
        elif percent == 0:
            assert not any(sum(result.stats.hits) for result in results)
        assert all(traffic.sent > 0 for traffic in started[-1].traffic())
        started[-1].close()
    finally:
        group.stop()
