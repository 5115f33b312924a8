"""A group answers as transformers does with the whole model, whatever lies where: experts at their owners, slots full of NaN."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batch_result import BatchResult
from pipeline.bench.workload import record_batches
from pipeline.config import parse
from pipeline.device import ExecutorSpec
from pipeline.parallel.group import Step
from pipeline.parallel.load import measured
from pipeline.parallel.membership import MeetingPlace, Membership
from pipeline.parallel.placement import EVERYWHERE, Assignment, place
from pipeline.parallel.rank import Rank, uses_of
from pipeline.prepare import Prepared, prepare
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle, Random, Worsened
from predictor.hash_table import HashTable
from predictor.traces import join
from store.actor import ExpertStore
from store.copies import CopyEngine
from tests.conftest import SENTENCES, TOKENIZER, VOCABULARY, answers, config_data, save_switch, write_tsv
from tests.pipeline.test_exactness import assert_equal_results
from tests.pipeline.tiny_families import save_tiny

TEXTS = [*SENTENCES, *(" ".join(SENTENCES[i:]) for i in range(len(SENTENCES))), "x", "one two three " * 20]
TIMEOUT_S = 60


def work(spec: ExecutorSpec, membership: Membership, calls: list[tuple]) -> tuple[list[BatchResult], int, int]:
    """A rank's life: its results, and the token-expert pairs that it sent and kept."""
    rank = Rank(spec, membership)
    rank._device._engine.slots.memory.fill_(255)  # type: ignore[attr-defined]  # NaN: an expert that was not copied shows
    try:
        results = [future.result() for future in [rank.step(*call) for call in calls]]
        return results, rank.traffic.sent, rank.traffic.kept
    finally:
        rank.close()


class Model:
    """A checkpoint, the whole model, its arena, and what its routers decide."""

    def __init__(self, base: Path, directory: Path, whole: torch.nn.Module, **changes):
        self.whole = whole
        (base / "arenas").mkdir()
        rows = write_tsv(base / "rows.tsv", TEXTS)
        settings = {"batch": {"size": 3, "order": "input"}} | changes
        self.prepared: Prepared = prepare(parse(config_data(directory, rows, base / "arenas", base / "out", **settings), "a test"))
        self.store = ExpertStore(self.prepared.arena, self.prepared.model.source, self.prepared.model.placement)
        self.store.open()
        self.traces = record_batches(self.prepared)
        self.expected = [answers(self.prepared.task, self.whole, batch) for batch in self.prepared.batches]

    @property
    def experts(self) -> int:
        return sum(self.prepared.model.shape.experts)

    def tables(self, kind: str) -> list[Prediction | None]:
        shape = self.prepared.model.shape
        oracle = Oracle(join(self.traces), shape, shape.top_k)
        makers = {"oracle": oracle, "worsened": Worsened(oracle, shape, 0.5, 0), "random": Random(shape, 2, 0)}
        return [timed(makers[kind], batch.tokens) if kind in makers else None for batch in self.prepared.batches]

    def place(self, ranks: int, placement: str, replicas: int = 0) -> Assignment:
        return place(measured(self.traces, self.prepared.model.shape), ranks, placement, replicas)

    def run(self, world, plan: Assignment, slots: int, tables: str = "oracle", routing: str = "exact", **changes):
        """All batches through a group; returns per rank what `work` does, and the results in order."""
        pairs = list(zip(self.prepared.batches, self.tables(tables), strict=True))
        steps = [Step(*zip(*pairs[i : i + plan.devices], strict=True), routing) for i in range(0, len(pairs), plan.devices)]
        calls = [step.calls(plan.devices) for step in steps]
        meeting = MeetingPlace(plan, TIMEOUT_S)
        spec = replace(self.prepared.executor_spec(), slots=slots, threads=1, **changes)
        said = world(work, [(spec, meeting.membership(r), [call[r] for call in calls]) for r in range(plan.devices)])
        results = [said[i % plan.devices][0][i // plan.devices] for i in range(len(pairs))]
        assert [result.batch for result in results] == [batch.index for batch, _ in pairs]
        return said, results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = tmp_path_factory.mktemp("rank")
    model = Model(base, base / "model", save_switch(base / "model", expert_capacity=6))  # so few that tokens are dropped
    yield model
    assert model.store.close(False)


def check(model: Model, results: list[BatchResult]) -> None:
    for result, expected in zip(results, model.expected, strict=True):
        assert_equal_results(result.results, expected)


@pytest.mark.parametrize(
    ("ranks", "placement", "replicas", "tables"),
    [
        (2, "greedy", 0, "oracle"),
        (3, "round_robin", 0, "none"),
        (3, "anti_correlation", 2, "random"),
    ],
)
def test_a_share_that_fits_is_resident_and_answers_equal_the_whole_model(world, model, ranks, placement, replicas, tables):
    plan = model.place(ranks, placement, replicas)
    assert plan.most < model.experts
    said, results = model.run(world, plan, plan.most, tables)
    check(model, results)
    slot = model.prepared.layout.slot_bytes
    for rank, (own, sent, kept) in enumerate(said):
        share = sum(map(len, plan.own(rank)))
        assert sum(result.stats.prefetch_bytes for result in own) == share * slot  # each came once, and no other
        assert not sum(sum(result.stats.misses) for result in own)
        assert own[-1].stats.resident_peak_bytes == share * slot
        assert sent > 0 and kept > 0


def resident_in_the_end(spec: ExecutorSpec, membership: Membership, call: tuple) -> int:
    """Experts that come to be in slots though no copy is made before the only batch has ended."""
    choose, late = CopyEngine._next_copy, threading.Event()
    CopyEngine._next_copy = lambda engine: choose(engine) if late.is_set() else None  # type: ignore[method-assign]
    rank = Rank(spec, membership)
    engine = rank._device._engine  # type: ignore[attr-defined]
    try:
        rank.step(*call).result()
        late.set()
        engine._proceed()
        for _ in range(6000):
            if engine.slots.ready_count == engine.slots.count:
                break
            time.sleep(0.01)
        return engine.slots.ready_count
    finally:
        CopyEngine._next_copy = choose  # type: ignore[method-assign]
        rank.close()


def test_a_share_comes_whole_however_late_its_copies_are(world, model):
    plan = model.place(2, "greedy")
    meeting = MeetingPlace(plan, TIMEOUT_S)
    calls = Step((model.prepared.batches[0],), (None,), "exact").calls(2)
    spec = replace(model.prepared.executor_spec(), threads=1)
    shares = [sum(map(len, plan.own(rank))) for rank in range(2)]
    given = [(replace(spec, slots=share), meeting.membership(r), calls[r]) for r, share in enumerate(shares)]
    assert world(resident_in_the_end, given) == shares


@pytest.mark.parametrize("tables", ["oracle", "worsened", "random", "none"])
@pytest.mark.parametrize("slots", [0, 3])
def test_a_share_that_does_not_fit_is_read_through_slots_and_answers_stay_equal(world, model, slots, tables):
    said, results = model.run(world, model.place(2, "greedy", 1), slots, tables, policy="lookahead")
    check(model, results)
    for own, _, _ in said:
        assert own[-1].stats.resident_peak_bytes <= slots * model.prepared.layout.slot_bytes
        assert sum(sum(result.stats.misses) for result in own) > 0
    if slots and tables == "oracle":
        assert sum(result.stats.prefetch_bytes for result in results) > 0


def test_tables_of_all_ranks_plan_the_share_of_each(world, model):
    """With the truth in every table, and one slot less than the share, next to nothing is missed."""
    plan = model.place(2, "greedy")
    _, with_tables = model.run(world, plan, plan.most - 1, "oracle", policy="lookahead")
    _, without = model.run(world, plan, plan.most - 1, "none", policy="lookahead")
    missed, all_of_them = (sum(sum(r.stats.misses) for r in results) for results in (with_tables, without))
    assert missed < all_of_them / 4


def table(*layers: dict[int, float]) -> Prediction:
    """One token that needs each expert so likely."""
    experts = tuple(np.array([list(layer)], dtype=np.int16) for layer in layers)
    likely = tuple(np.array([list(layer.values())], dtype=np.float32) for layer in layers)
    return Prediction(HashTable(experts, likely, likely), 0, 0)


def test_a_rank_wants_of_all_tables_what_it_owns_and_of_replicas_what_its_own_batch_needs():
    owner = np.array([0, 1, 0, EVERYWHERE], dtype=np.int16)
    plan = Assignment((owner, owner), 2)
    tables = [table({0: 0.5, 1: 0.9, 3: 0.25}, {2: 1.0}), table({0: 0.8, 2: 0.6, 3: 0.75}, {1: 0.5}), None]
    first = [dict(layer) for layer in uses_of(plan, 0, tables[:2], "exact")]
    assert first[0] == pytest.approx({0: 0.9, 2: 0.6, 3: 0.25}, abs=1e-5)
    assert first[1] == pytest.approx({2: 1.0}, abs=1e-5)
    second = uses_of(plan, 1, tables[:2], "exact")
    assert [expert for expert, _ in second[0]] == [1, 3]  # the likeliest first
    assert dict(second[0]) == pytest.approx({1: 0.9, 3: 0.75}, abs=1e-5)
    assert dict(second[1]) == pytest.approx({1: 0.5}, abs=1e-5)
    assert uses_of(plan, 1, [None, None], "exact") == [[], []]


def test_a_batch_uses_each_expert_once_wherever_its_tokens_are(world, model):
    """Hits and misses of a step are counted at the owners: each used expert once, as by one Executor with the same rows."""
    plan = model.place(2, "greedy")
    said, _ = model.run(world, plan, plan.most)
    top_k = model.prepared.model.shape.top_k
    for step in range(len(said[0][0])):
        together = model.traces[2 * step : 2 * step + 2]
        for layer in range(model.prepared.model.shape.layers):
            used = len(np.unique(np.concatenate([trace.layers[layer].top[:, :top_k] for trace in together])))
            served = sum(own[step].stats.hits[layer] + own[step].stats.misses[layer] for own, _, _ in said)
            assert served <= used and (served == used or layer < 2)  # tokens over a capacity reach nobody


def test_hash_routing_asks_the_tables_wherever_the_experts_are(world, model):
    _, alone = model.run(world, model.place(1, "greedy"), model.experts, "random", "hash")
    _, results = model.run(world, model.place(3, "greedy"), 4, "random", "hash")
    for one, other in zip(alone, results, strict=True):
        assert_equal_results(one.results, other.results)
    with pytest.raises(AssertionError):
        check(model, results)


def test_more_ranks_than_batches(world, model):
    one = model.prepared.batches[0]
    plan = model.place(3, "round_robin")
    meeting = MeetingPlace(plan, TIMEOUT_S)
    calls = Step((one,), (None,), "exact").calls(3)
    spec = replace(model.prepared.executor_spec(), slots=plan.most)
    said = world(work, [(spec, meeting.membership(r), [calls[r]]) for r in range(3)])
    assert_equal_results(said[0][0][0].results, model.expected[0])
    assert said[1][0][0].results == said[2][0][0].results == []


def test_generation_that_stops_at_different_steps(world, tmp_path):
    whole = save_switch(tmp_path / "model")
    model = Model(tmp_path, tmp_path / "model", whole, batch={"size": 2}, task="generate", generate={"max_new_tokens": 8})
    task, batches = model.prepared.task, model.prepared.batches[:5]
    written = [row["token_ids"] for batch in batches for row in answers(task, whole, batch)]
    task = replace(task, stop=(written[0][2], written[3][4]))  # rows now end at steps of their own
    expected = [answers(task, whole, batch) for batch in batches]
    assert len({max(len(row["token_ids"]) for row in rows) for rows in expected}) > 1
    plan = model.place(3, "greedy")
    meeting = MeetingPlace(plan, TIMEOUT_S)
    calls = [Step(tuple(part), (None,) * len(part), "exact").calls(3) for part in (batches[:3], batches[3:])]
    spec = replace(model.prepared.executor_spec(), task=task, slots=plan.most, threads=1)
    said = world(work, [(spec, meeting.membership(r), [call[r] for call in calls]) for r in range(3)])
    assert [said[i % 3][0][i // 3].results for i in range(5)] == expected
    assert model.store.close(False)


def test_a_family_behind_the_door_with_several_experts_per_token(world, tmp_path):
    directory = tmp_path / "model"
    cls = save_tiny("qwen3_moe", directory, vocab_size=VOCABULARY, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory)
    whole = cls.from_pretrained(directory, dtype=torch.float32).eval()
    model = Model(tmp_path, directory, whole, task="score", data={"label": None, "text": "sentence"})
    for plan, slots, tables in ((model.place(2, "greedy", 1), 5, "worsened"), (model.place(3, "anti_correlation"), 99, "none")):
        _, results = model.run(world, plan, slots, tables)
        check(model, results)
    assert model.store.close(False)
