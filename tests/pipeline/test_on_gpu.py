"""A GPU answers as transformers does with the whole model on it, whatever lies in slots, and however it got there.

Slots are NaN before anything is copied into them, in every test: an expert that is read from where it is not shows.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batch_result import BatchResult
from pipeline.config import BatchConfig, parse
from pipeline.data import Batch, Encoded, make_batches
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.gpu.work import GPUWork
from pipeline.prepare import ACTIVATION_BYTES, Prepared, prepare
from pipeline.tasks.registry import HeadClassify, Result, Score, TextToTextClassify
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle, Random, Worsened
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import Width
from predictor.registry import HashPredictor
from predictor.traces import Trace, join
from store import cuda
from store.actor import ExpertStore
from store.arena import clean
from store.lanes import CudaMark
from store.schedule import WORTH_COPYING
from tests.conftest import SENTENCES, TOKENIZER, VOCABULARY, answers, config_data, save_switch, switch_config, write_tsv
from tests.pipeline.test_exactness import assert_equal_results
from tests.pipeline.test_generate import save_decoder
from tests.store.pages import evict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda:0")
CLEAR = 2e-5
"""Between a router's best two probabilities, in float32: rounding cannot turn them around, and answers can be compared."""
LARGE = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_heads": 8, "num_experts": 32}
MODELS = {
    "text": {},
    "score": {},
    "head": {"head": True, "num_labels": 2},
    "large": {**LARGE},
    "large head": {"head": True, "num_labels": 32, **LARGE},
}


# What tests are made of


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch leaves uninitialised is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """A model in an arena, and beside it the whole of it on the GPU, as transformers has it.

    Attributes:
        whole: float32; with the arena's values, rounded or not.
        batches: of 1, 7 and 16 rows of unequal lengths.
        margin: the least that one of `whole`'s routers has left between its best two probabilities so far.
        dropped: tokens that these routers have left without an expert so far.
    """

    prepared: Prepared
    identity: str
    whole: torch.nn.Module
    batches: list[Batch]
    margin: float = 1.0
    dropped: int = 0

    def __post_init__(self) -> None:
        def look(router: torch.nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            best = output[2].float().softmax(dim=-1).topk(2).values
            self.margin = min(self.margin, (best[..., 0] - best[..., 1]).min().item())
            self.dropped += int((output[0].sum(dim=-1) == 0).sum())

        for name, module in self.whole.named_modules():
            if name.endswith("router"):
                module.register_forward_hook(look)

    def answers(self, batches: list[Batch]) -> list[list[Result]]:
        """What transformers says; and nobody can say that rounding decides about an expert."""
        said = [answers(self.prepared.task, self.whole, batch) for batch in batches]
        assert self.margin > CLEAR, "two experts are as good as equal: choose another seed"
        return said

    @cached_property
    def expected(self) -> list[list[Result]]:
        said = self.answers(self.batches)
        assert self.dropped > 0, "no expert was full"
        return said

    @property
    def experts(self) -> int:
        return sum(layer.experts for layer in self.prepared.layout.layers)

    def slots(self, percent: int) -> int:
        return self.experts * percent // 100

    def spec(self, slots: int, policy: str = "lru", demand: bool = False) -> ExecutorSpec:
        return replace(self.prepared.executor_spec(), slots=slots, policy=policy, demand=demand)

    @contextmanager
    def executor(self, slots: int, policy: str = "lru", demand: bool = False) -> Iterator[Executor]:
        with poisoned():
            executor = Executor(self.spec(slots, policy, demand))
        try:
            yield executor
        finally:
            executor.close()

    @contextmanager
    def on_cpu(self, slots: int = 0) -> Iterator[Executor]:
        executor = Executor(replace(self.spec(slots), device="cpu"))
        try:
            yield executor
        finally:
            executor.close()

    def trace(self, batches: list[Batch]) -> list[Trace]:
        """What the routers decide, as a CPU says."""
        with self.on_cpu() as executor:
            return [executor.trace(batch, 2) for batch in batches]

    @cached_property
    def traces(self) -> list[Trace]:
        return self.trace(self.batches)

    def predictor(self, kind: str, traces: list[Trace]) -> HashPredictor:
        shape = self.prepared.model.shape
        if kind == "random":
            return Random(shape, top_k=2, seed=0)
        if kind == "lstm":
            torch.manual_seed(1)
            width = self.prepared.model.config["d_model"]
            return LSTMPredictor(HashFunction(shape, width, 16), shape, torch.randn(shape.vocab_size, width), Width(2))
        oracle = Oracle(join(traces), shape, shape.top_k)
        return oracle if kind == "oracle" else Worsened(oracle, shape, {"half wrong": 0.5, "wrong": 0.0}[kind], seed=0)

    def tables(self, kind: str) -> list[Prediction]:
        return [timed(self.predictor(kind, self.traces), batch.tokens) for batch in self.batches]


def make_some(task, sizes: list[int], longest: int = 40, seed: int = 0) -> list[Batch]:
    """Batches of random tokens, so many rows each; where there are several, the first is the longest."""
    rng = np.random.default_rng(seed)

    def row(tokens: int) -> np.ndarray:
        return rng.integers(2, VOCABULARY, tokens)

    batches = []
    for index, size in enumerate(sizes):
        rows = []
        for i in range(size):
            source = row(longest if i == 0 and size > 1 else int(rng.integers(1, longest, endpoint=True)))
            target = row(int(rng.integers(1, 20)))
            if isinstance(task, Score):
                rows.append(Encoded((source, np.concatenate([[task.start], target[:-1]])), target))
            elif isinstance(task, TextToTextClassify):
                rows.append(Encoded((source, np.array([task.start]))))
            else:
                assert isinstance(task, HeadClassify)
                rows.append(Encoded((source,)))
        batches += [replace(batch, index=index) for batch in make_batches(rows, BatchConfig(size, order="input"))]
    return batches


def make_case(name: str, place: Path, arenas: Path, dtype: str = "float32") -> tuple[Case, ExpertStore]:
    place.mkdir()
    path = place / "model"
    whole = save_switch(path, **{"expert_capacity": 3} | MODELS[name])
    changes = {"task": "score", "data": {"target": "sentence"}} if name == "score" else {}
    settings = config_data(path, write_tsv(place / "rows.tsv"), arenas, place / "out", device=DEVICE.type, **changes)
    if "num_labels" in MODELS[name]:
        settings["labels"] = {str(i): f"label {i}" for i in range(MODELS[name]["num_labels"])}
    prepared = prepare(parse(settings | {"model": {"path": str(path), "dtype": dtype}}, "test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    whole = whole.to(getattr(torch, dtype)).to(DEVICE, torch.float32)
    return Case(prepared, store.open().identity, whole, make_some(prepared.task, [1, 7, 16])), store


@pytest.fixture
def shm() -> Iterator[Path]:
    """A store.directory of shared memory, as a GPU wants it; empty again when the test is over."""
    directory = Path(tempfile.mkdtemp(prefix="test-on-gpu-", dir="/dev/shm"))
    yield directory
    left = list(directory.iterdir())
    shutil.rmtree(directory)
    assert not left


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Iterator[Callable[[str], Case]]:
    """case(name): one of MODELS, made on first use."""
    made: dict[str, tuple[Case, ExpertStore]] = {}
    arenas = Path(tempfile.mkdtemp(prefix="test-on-gpu-", dir="/dev/shm"))

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, tmp_path_factory.mktemp("on-gpu") / "case", arenas)
        return made[name][0]

    yield get
    gone = [store.close(keep=False) for _, store in made.values()]
    shutil.rmtree(arenas)
    assert sum(gone) == len({case.prepared.arena for case, _ in made.values()})  # nobody else holds one


@pytest.fixture
def paths(monkeypatch) -> list[str]:
    """How each batch was run, in order: "eager", as one graph, "whole", or in "pieces": as many graphs as came to be replayed."""
    taken: list[str] = []
    replays = itertools.count()
    start, launch = GPUWork.start, cuda.launch

    def told(self):
        before = next(replays)
        start(self)
        replayed = next(replays) - before - 1
        taken.append("eager" if replayed == 0 else "whole" if replayed == 1 else "pieces")

    def counted(graph, stream):
        next(replays)
        launch(graph, stream)

    monkeypatch.setattr(GPUWork, "start", told)
    monkeypatch.setattr(cuda, "launch", counted)
    return taken


def force(executor: Executor, whole: bool | None) -> None:
    """Makes the next batches run as one graph or in pieces, whatever is in slots: both are right. None: as it comes."""
    engine = executor._device.engine
    vars(engine).pop("is_ready", None)
    if whole is not None:
        engine._doubt = None  # bad tables would end it
        engine.is_ready = lambda batch: whole


def complete(executor: Executor) -> None:
    """Waits until every expert has come into its slot."""
    engine = executor._device.engine
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine.is_complete or engine._failure, timeout=30) is True


def assert_counted(result: BatchResult, trace: Trace, experts: tuple[int, ...]) -> None:
    """What the GPU found on its way, against a CPU's trace: tokens of each expert, experts read."""
    firsts = [layer.top[:, 0] for layer in trace.layers]
    if result.stats.load:
        assert result.stats.load == [np.bincount(first, minlength=n).tolist() for first, n in zip(firsts, experts, strict=True)]
    read = [hits + misses for hits, misses in zip(result.stats.hits, result.stats.misses, strict=True)]
    assert read == [len(np.unique(first)) for first in firsts]


def never_fit(table: Prediction, slots: int) -> bool:
    """Whether a batch's table names more experts than there are slots; all are wanted as long as tables come true."""
    return sum(p >= WORTH_COPYING for layer in table.table.uses for _, p in layer) > slots


def assert_exact(case: Case, percent: int, policy: str, kind: str | None, paths: list[str]) -> None:
    """Every batch four times: as the first of its shape, as it comes, as one graph, in pieces."""
    slots, count, shape = case.slots(percent), len(case.batches), case.prepared.model.shape
    tables = case.tables(kind) if kind else [None] * count
    with case.executor(slots, policy, demand=kind is None) as executor:
        assert executor._device.engine.slots.memory.numel() == slots * case.prepared.layout.slot_bytes
        for turn, whole in enumerate((None, None, True, False)):
            if percent < 100:
                force(executor, whole)
            elif turn == 1:
                complete(executor)  # from now on there is one way
            for i, batch in enumerate(case.batches):
                index = turn * count + i
                for ahead in range(index, min(index + 3, 4 * count)):
                    if kind:
                        executor.plan(ahead, tables[ahead % count])
                result = executor.execute(replace(batch, index=index), tables[i])
                assert_equal_results(result.results, case.expected[i])
                assert_counted(result, case.traces[i], shape.experts)
                assert result.stats.resident_peak_bytes <= slots * case.prepared.layout.slot_bytes
                if not slots:
                    assert sum(result.stats.hits) == 0
                if percent == 100 and turn:
                    assert sum(result.stats.misses) == result.stats.read_in_place_bytes == 0
        assert executor._device.eager_because == {"first of its shape": count}
    first, second, third, fourth = (paths[turn * count : (turn + 1) * count] for turn in range(4))
    assert first == ["eager"] * count
    if percent == 100:
        assert {*second, *third, *fourth} <= ({"whole", "pieces"} if kind is None else {"whole"})
    elif kind is None:
        assert {*second, *third, *fourth} == {"pieces"}
    else:
        assert third == ["whole"] * count and fourth == ["pieces"] * count
        for path, table in zip(second, tables, strict=True):
            assert path == "pieces" if kind == "oracle" and never_fit(table, slots) else path in ("pieces", "whole")
        if kind == "random":
            assert any(never_fit(table, slots) for table in tables), "or the way in pieces is only taken by force"
            assert "pieces" in second, "they were believed, to begin with"
    assert len(paths) == 4 * count


# Exact means exact


@pytest.mark.parametrize("kind", ["lstm", "random", "oracle", None])
@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead"])
@pytest.mark.parametrize("percent", [0, 10, 37, 100])
def test_equals_the_whole_model_for_every_budget_policy_and_predictor(case, paths, percent, policy, kind):
    assert_exact(case("text"), percent, policy, kind, paths)


@pytest.mark.parametrize(
    ("percent", "policy", "kind"),
    [(0, "lru", "random"), (10, "lookahead", "oracle"), (37, "fifo", None), (37, "lookahead", "random"), (100, "lru", "oracle")],
)
@pytest.mark.parametrize("name", ["score", "head", "large"])
def test_every_task_and_a_larger_model_equal_the_whole_model(case, paths, name, percent, policy, kind):
    assert_exact(case(name), percent, policy, kind, paths)


def test_experts_may_still_be_coming_although_all_have_a_slot(case, paths, monkeypatch):
    case, count, gate, wait = case("large"), 3, threading.Event(), CudaMark.wait
    monkeypatch.setattr(CudaMark, "wait", lambda mark: wait(mark) if gate.wait(60) else None)
    with case.executor(case.experts) as executor, ExitStack() as stack:
        stack.callback(gate.set)
        for turn in range(5):
            force(executor, (None, False, True, None, None)[turn])
            if turn == 3:
                gate.set()
            if turn == 4:
                complete(executor)
            for i, batch in enumerate(case.batches):
                result = executor.execute(replace(batch, index=turn * count + i), None)
                assert_equal_results(result.results, case.expected[i])
                assert_counted(result, case.traces[i], case.prepared.model.shape.experts)
                if turn < 3:
                    assert sum(result.stats.misses) > 0
        assert sum(result.stats.misses) == result.stats.read_in_place_bytes == 0
    assert paths == ["eager"] * count + ["pieces"] * count + ["whole"] * 3 * count


def test_without_tables_all_is_read_in_place(case, paths):
    case = case("large")
    with case.executor(case.slots(37)) as executor:
        for index in range(2 * len(case.batches)):
            i = index % len(case.batches)
            stats = executor.execute(replace(case.batches[i], index=index), None).stats
            assert sum(stats.hits) == stats.prefetch_bytes == 0
            assert stats.read_in_place_bytes >= sum(stats.misses) * case.prepared.layout.slot_bytes > 0
    assert paths == ["eager"] * 3 + ["whole"] * 3


def test_what_the_router_names_is_copied_on_demand_and_then_read_from_slots(case):
    case = case("large")
    with case.executor(case.experts // 2, demand=True) as executor:
        for index, (batch, expected) in enumerate(zip(case.batches[:2], case.expected, strict=False)):
            result = executor.execute(replace(batch, index=index), None)
            assert_equal_results(result.results, expected)
            assert sum(result.stats.misses) == 0, "its layers have fewer experts than there are slots"
            assert result.stats.demand_bytes > 0


def test_in_bfloat16_the_error_is_transformers_own(tmp_path, shm, paths):
    made, store = make_case("large head", tmp_path / "case", shm, "bfloat16")
    count = 200
    batches = make_some(made.prepared.task, [16] * count, longest=32, seed=3)  # of one shape
    tables = [timed(made.predictor("random", []), batch.tokens) for batch in batches]
    own = deepcopy(made.whole).to(torch.bfloat16)

    def scores(results: list[Result]) -> np.ndarray:
        return np.array([row["scores"] for row in results])

    right = [scores(answers(made.prepared.task, made.whole, batch)) for batch in batches]

    def median_error(said: list[np.ndarray]) -> float:
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(said, right, strict=True)]
        assert np.isfinite(errors).all()
        return float(np.median(errors))

    theirs = median_error([scores(answers(made.prepared.task, own, batch)) for batch in batches])
    for percent in (0, 37, 100):
        paths.clear()
        said = []
        with made.executor(made.slots(percent), "lookahead") as executor:
            for i, batch in enumerate(batches):
                if percent < 100:
                    force(executor, i % 2 == 0)
                said.append(scores(executor.execute(batch, tables[i]).results))
        ours = median_error(said)
        print(f"bfloat16, {percent} %: median relative error {ours:.4g}, transformers' own {theirs:.4g}")
        assert 0 < ours <= 1.1 * theirs
        assert set(paths) >= {"eager", "whole"} and ("pieces" in paths or percent == 100)
    assert store.close(keep=False)


def test_nothing_is_read_that_was_not_written(case, paths):
    """Not slots alone: all that any kernel finds uninitialised is NaN, and so it is again in each replay of a graph."""
    case = case("large")
    expected, tables = case.expected, case.tables("random")
    with poisoned(), case.executor(case.slots(37), "lru") as executor:
        torch.use_deterministic_algorithms(True, warn_only=True)  # until the end: making the executor has ended it
        for turn, whole in enumerate((None, True, False)):
            force(executor, whole)
            for i, batch in enumerate(case.batches):
                result = executor.execute(replace(batch, index=turn * len(case.batches) + i), tables[i])
                assert np.isfinite([row["scores"] for row in result.results]).all()
                assert_equal_results(result.results, expected[i])
        assert executor._device.eager_because == {"first of its shape": 3}
    assert paths == ["eager"] * 3 + ["whole"] * 3 + ["pieces"] * 3


# Whatever is predicted, in whatever order


@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead"])
def test_predictions_that_are_all_wrong_change_no_answer(case, paths, policy):
    assert_exact(case("text"), 37, policy, "wrong", paths)


@pytest.mark.parametrize("policy", ["lru", "lookahead"])
def test_batches_may_come_in_any_order_or_again_or_not_at_all(case, paths, policy):
    """As when an Executor has died: what was planned is elsewhere, what was done comes again."""
    case = case("text")
    tables, count = case.tables("half wrong"), len(case.batches)
    for order, planned in (
        ((5, 3, 3, 0, 9, 4, 9, 1, 20), (3, 4, 5, 6, 7, 8, 12, 13, 5, 21, 22, 40)),
        ((20, 21, 19, 2, 22), (2, 20, 30, 21)),  # another Executor, with the rest
    ):
        with case.executor(case.slots(37), policy) as executor:
            for batch in planned[: len(planned) // 2]:
                executor.plan(batch, tables[batch % count])
            for turn, index in enumerate(order):
                result = executor.execute(replace(case.batches[index % count], index=index), tables[index % count])
                assert result.batch == index
                assert_equal_results(result.results, case.expected[index % count])
                if turn == 2:
                    for batch in planned[len(planned) // 2 :]:
                        executor.plan(batch, tables[batch % count])


class NoGraphs(dict):
    """In the place of an OnGPU's graphs: no forward can be recorded."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> None:
        return None


def roughen(executor: Executor) -> None:
    """Makes both lanes late, more or less, and each slot NaN before a copy into it: nobody can come too early unseen.

    Every third batch runs as one graph, though not all is in slots.
    """
    engine = executor._device.engine
    engine._doubt = None
    lanes, stage, fill = engine._lanes, engine.stage, engine._lanes.fill
    computing, copying = np.random.default_rng(1), np.random.default_rng(2)  # one for each thread
    cycles = 300_000  # up to 0.2 ms

    def late_stage(batch: int, layer: int) -> bool:
        in_parts = stage(batch, layer)
        torch.cuda._sleep(int(computing.integers(cycles)))
        return in_parts

    def late_fill(key, slot: int):
        with torch.cuda.stream(lanes._copy_stream):
            engine.slots._slots[slot].fill_(255)
            torch.cuda._sleep(int(copying.integers(cycles)))
        return fill(key, slot)

    def is_ready(batch: int) -> bool:
        torch.cuda._sleep(int(computing.integers(cycles)))
        return batch % 3 == 0

    engine.stage, engine.is_ready, lanes.fill = late_stage, is_ready, late_fill


@pytest.mark.parametrize(
    ("slots", "policy", "graphs", "count"),
    [
        (3, "fifo", True, 1000),
        (3, "lookahead", True, 300),
        (8, "lru", True, 300),
        (16, "lookahead", True, 300),
        (3, "lru", False, 200),
    ],
)
def test_experts_are_evicted_while_layers_compute_and_every_batch_is_exact(case, paths, slots, policy, graphs, count):
    case = case("text")
    batches = make_some(case.prepared.task, [1, 4, 8] * 8, longest=24, seed=5)
    expected, traces, shape = case.answers(batches), case.trace(batches), case.prepared.model.shape
    oracle = Oracle(join(traces), shape, shape.top_k)
    makers = [Worsened(oracle, shape, 0.5, seed) for seed in range(3)]
    tables = [timed(makers[i // len(batches)], batches[i % len(batches)].tokens) for i in range(3 * len(batches))]
    hits, misses, copied = 0, 0, 0
    with case.executor(slots, policy) as executor:
        if not graphs:
            executor._device._graphs = NoGraphs()
        if slots == 16:  # as if reading in place were dear: who is in doubt, as all are here, comes at others' cost
            executor._device.engine.worth_an_eviction = 0.0
        roughen(executor)
        for index in range(count):
            for ahead in range(index, index + 4):
                executor.plan(ahead, tables[ahead % len(tables)])
            i = index % len(batches)
            result = executor.execute(replace(batches[i], index=index), tables[index % len(tables)])
            assert_equal_results(result.results, expected[i])
            assert_counted(result, traces[i], shape.experts)
            hits, misses = hits + sum(result.stats.hits), misses + sum(result.stats.misses)
            copied += result.stats.prefetch_bytes // case.prepared.layout.slot_bytes
    every_layer = slots == 3 and policy != "lookahead"  # which would rather read in place than evict one wanted sooner
    assert copied > count * (shape.layers if every_layer else 1), "an eviction for every layer of every batch, or for every batch"
    assert hits > count // 2 and misses > 0
    assert set(paths) == ({"eager", "whole", "pieces"} if graphs else {"eager"})


def test_a_recording_that_breaks_is_tried_again_and_breaks_no_other(case):
    case = case("text")
    tables = case.tables("oracle")
    with case.executor(case.experts) as executor:
        complete(executor)

        def turn(number: int) -> list[str]:
            count, hows = len(case.batches), []
            for i, batch in enumerate(case.batches):
                result = executor.execute(replace(batch, index=number * count + i), tables[i])
                assert_equal_results(result.results, case.expected[i])
                hows.append(result.stats.how)
            return hows

        count = len(case.batches)
        assert turn(0) == ["eager: first of its shape"] * count
        graphed, _ = next(iter(executor._device._graphs.values()))
        forward = graphed._forward

        def asks(inputs):
            torch.cuda.synchronize()  # CUDA breaks the recording off
            return forward(inputs)

        graphed._forward = asks
        first, *others = turn(1)
        assert first.startswith("eager: not recordable: ") and others == ["whole"] * (count - 1)
        graphed._forward = forward
        assert turn(2) == ["whole"] * count
        assert gc.isenabled()


def serve(case: Case, executor: Executor, tables: list[Prediction] | None, count: int) -> list[BatchResult]:
    """All batches, again and again; every answer is right."""
    results = []
    for index in range(count):
        i = index % len(case.batches)
        for ahead in range(index, min(index + 4, count) if tables else index):
            executor.plan(ahead, tables[ahead % len(tables)])
        result = executor.execute(replace(case.batches[i], index=index), tables[index % len(tables)] if tables else None)
        assert_equal_results(result.results, case.expected[i])
        assert_counted(result, case.traces[i], case.prepared.model.shape.experts)
        results.append(result)
    return results


def moves(results: list[BatchResult], slot_bytes: int) -> int:
    copied = sum(result.stats.prefetch_bytes + result.stats.demand_bytes for result in results)
    return copied // slot_bytes + sum(sum(result.stats.misses) for result in results)


@pytest.mark.parametrize(("kind", "worth"), [("random", None), ("wrong", None), ("wrong", 0.0)])
def test_tables_that_do_worse_than_none_are_heeded_no_more(case, kind, worth):
    """Nor do they cost more moves than a cache on demand. Tables that guess are hardly believed after a while, and who is named in
    doubt is not worth an eviction, so that little of what they say is copied. Were it worth one (`worth`), routers are asked.
    """
    case, percent, count = case("large"), 50, 120
    slot_bytes = case.prepared.layout.slot_bytes
    shape, traces = case.prepared.model.shape, case.traces
    makers = [case.predictor(kind, traces)]
    if kind != "random":  # others each time, so that nobody learns what is wrong
        oracle = Oracle(join(traces), shape, shape.top_k)
        makers = [Worsened(oracle, shape, 0.0, seed) for seed in range(8)]
    tables = [timed(maker, batch.tokens) for maker in makers for batch in case.batches]
    with case.executor(case.slots(percent), "lru", demand=True) as executor:
        none = serve(case, executor, None, count)
    with case.executor(case.slots(percent), "lookahead") as executor:
        if worth is not None:
            executor._device.engine.worth_an_eviction = worth
        ours = serve(case, executor, tables, count)
    tail = count // 2
    asked = [result.stats.how == "pieces: routers asked" for result in ours]
    moved, needed = moves(ours[tail:], slot_bytes), moves(none[tail:], slot_bytes)
    print(f"{kind}: {sum(asked)} of {count} batches asked, moves {moved / needed:.3f} times those on demand")
    assert moved <= 1.05 * needed
    assert not any(asked[:3])
    assert worth is None or all(asked[tail:])


def test_right_tables_are_never_doubted(case):
    case = case("large")
    with case.executor(case.slots(20), "lookahead") as executor:
        results = serve(case, executor, case.tables("oracle"), 60)
        assert not any(result.stats.how == "pieces: routers asked" for result in results)


# Hash routing, traces


@pytest.mark.parametrize("kind", ["lstm", "oracle"])
@pytest.mark.parametrize("percent", [0, 37])
def test_hash_routing_answers_as_on_a_cpu_and_runs_no_router(case, paths, percent, kind):
    case = case("text")
    tables, count, asked = case.tables(kind), len(case.batches), []
    with case.on_cpu() as other:
        expected = [other.execute(batch, table, "hash").results for batch, table in zip(case.batches, tables, strict=True)]
    with case.executor(case.slots(percent), "lookahead") as executor:
        for name, module in executor._device.model.named_modules():
            if name.endswith("router"):
                module.register_forward_hook(lambda *_: asked.append(1))
        for turn, whole in enumerate((None, True, False)):
            force(executor, whole)
            for i, batch in enumerate(case.batches):
                result = executor.execute(replace(batch, index=turn * count + i), tables[i], "hash")
                assert_equal_results(result.results, expected[i])
                read = [hits + misses for hits, misses in zip(result.stats.hits, result.stats.misses, strict=True)]
                assert read == [len(np.unique(experts)) for experts in tables[i].table.experts]
        assert not asked
        assert paths == ["eager"] * count + ["whole"] * count + ["pieces"] * count
        assert_equal_results(executor.execute(replace(case.batches[0], index=99), tables[0]).results, case.expected[0])
        assert asked


@pytest.mark.parametrize("name", ["score", "large"])
def test_a_trace_says_what_a_cpu_says(case, name):
    case = case(name)
    with case.executor(case.slots(37)) as executor, case.on_cpu() as other:
        index = itertools.count()
        for batch, expected in zip(case.batches, case.expected, strict=True):
            wanted = other.trace(batch, 5)
            for _ in range(3):  # also when its shape has a graph
                mine = executor.trace(replace(batch, index=next(index)), 5)
                for stream in range(len(batch.tokens.streams)):
                    assert np.array_equal(mine.tokens.flat(stream), wanted.tokens.flat(stream))
                for ours, theirs in zip(mine.layers, wanted.layers, strict=True):
                    best = theirs.probabilities.astype(np.float32)
                    clear = best[:, 0] - best[:, 1] > 1e-3
                    assert clear.mean() > 0.9
                    assert np.array_equal(ours.top[clear, 0], theirs.top[clear, 0])
                    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=2e-3)
                    np.testing.assert_allclose(ours.weight, theirs.weight, atol=2e-3)
                assert_equal_results(executor.execute(replace(batch, index=next(index)), None).results, expected)
        assert executor._device.eager_because == {"traced": 3 * len(case.batches), "first of its shape": len(case.batches)}


# Without registered memory


@pytest.fixture
def unregistered(monkeypatch) -> None:
    """CUDA refuses to register anything."""

    def refuse(*arguments, **more) -> int:
        raise cuda.CudaError("cuMemHostRegister_v2: CUDA_ERROR_NOT_SUPPORTED (801)")

    monkeypatch.setattr(cuda, "register", refuse)


def staged_budgets(case: Case) -> list[int]:
    """Slots: none, one, few, some, all but one, all."""
    return [0, 1, 3, case.experts * 37 // 100, case.experts - 1, case.experts]


def assert_staged(
    case: Case,
    executor: Executor,
    kind: str | None,
    paths: list[str],
    routing: str = "exact",
    hashed: list[list[Result]] | None = None,
) -> None:
    """Every batch three times; nothing is read that is in no slot, and the host's entries of the table are null."""
    device, count = executor._device, len(case.batches)
    tables = case.tables(kind) if kind else [None] * count
    assert device.miss_path.startswith("staged: ")
    table = device.lanes._table
    assert not any(table.host_address((layer, 0)) for layer in range(case.prepared.model.shape.layers))
    slots = executor._spec.slots
    for index in range(3 * count):
        i = index % count
        for ahead in range(index, min(index + 3, 3 * count)):
            if kind:
                executor.plan(ahead, tables[ahead % count], routing)
        result = executor.execute(replace(case.batches[i], index=index), tables[i], routing)
        assert_equal_results(result.results, (hashed or case.expected)[i])
        if routing == "exact":
            assert_counted(result, case.traces[i], case.prepared.model.shape.experts)
        assert result.stats.resident_peak_bytes <= slots * case.prepared.layout.slot_bytes
        if slots:
            assert sum(result.stats.misses) == result.stats.read_in_place_bytes == 0
        else:
            assert sum(result.stats.hits) == result.stats.demand_bytes == 0
        assert result.stats.miss_path == device.miss_path
    assert device.eager_because == {"first of its shape": count}
    assert paths[:count] == ["eager"] * count
    assert set(paths[count:]) <= ({"pieces"} if slots < case.experts else {"pieces", "whole"})


@pytest.mark.parametrize(("policy", "kind"), [("lookahead", "half wrong"), ("fifo", "wrong"), ("lru", "random"), ("fifo", None)])
@pytest.mark.parametrize("budget", range(6))
def test_staged_equals_the_whole_model_for_every_budget(case, paths, unregistered, budget, policy, kind):
    case = case("text")
    with case.executor(staged_budgets(case)[budget], policy) as executor:
        assert executor._device.engine.slots.memory.device.type == ("cuda" if budget else "cpu")
        assert_staged(case, executor, kind, paths)


@pytest.mark.parametrize(("name", "policy", "budget"), [("score", "lru", 2), ("head", "priority", 3), ("large", "lookahead", 3)])
def test_staged_equals_the_whole_model_for_every_task_and_policy(case, paths, unregistered, name, policy, budget):
    case = case(name)
    with case.executor(staged_budgets(case)[budget], policy) as executor:
        assert_staged(case, executor, "half wrong", paths)


def test_staged_nothing_is_read_that_was_not_written(case, paths, unregistered):
    case = case("large")
    expected, tables = case.expected, case.tables("random")
    with case.executor(case.slots(10), "lru") as executor:
        torch.use_deterministic_algorithms(True, warn_only=True)
        for index in range(3 * len(case.batches)):
            i = index % len(case.batches)
            result = executor.execute(replace(case.batches[i], index=index), tables[i])
            assert np.isfinite([row["scores"] for row in result.results]).all()
            assert_equal_results(result.results, expected[i])
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_staged_hash_routing_answers_as_on_a_cpu(case, paths, unregistered, budget):
    case = case("text")
    with case.on_cpu() as other:
        expected = [
            other.execute(batch, table, "hash").results for batch, table in zip(case.batches, case.tables("oracle"), strict=True)
        ]
    with case.executor(staged_budgets(case)[budget], "lookahead") as executor:
        assert_staged(case, executor, "oracle", paths, "hash", expected)


@pytest.mark.parametrize(("slots", "graphs"), [(1, True), (3, True), (3, False), (8, True)])
def test_staged_experts_are_evicted_while_layers_compute_and_every_batch_is_exact(case, unregistered, slots, graphs):
    case = case("text")
    batches = make_some(case.prepared.task, [1, 4, 8] * 4, longest=24, seed=5)
    expected, traces, shape = case.answers(batches), case.trace(batches), case.prepared.model.shape
    oracle = Oracle(join(traces), shape, shape.top_k)
    tables = [timed(Worsened(oracle, shape, 0.5, 0), batch.tokens) for batch in batches]
    with case.executor(slots, "lookahead") as executor:
        if not graphs:
            executor._device._graphs = NoGraphs()
        roughen(executor)
        for index in range(100):
            for ahead in range(index, index + 4):
                executor.plan(ahead, tables[ahead % len(tables)])
            i = index % len(batches)
            result = executor.execute(replace(batches[i], index=index), tables[i])
            assert_equal_results(result.results, expected[i])
            assert sum(result.stats.misses) == 0


def test_an_arena_on_a_disk_is_not_registered_and_answers_are_exact(tmp_path, paths, monkeypatch):
    """tmp_path is RAM on some machines; then pages do not have to be read again, and all else is the same."""

    def never(*arguments, **more) -> int:
        raise AssertionError("registering a file would pin all of it")

    place = tmp_path / "arenas"
    place.mkdir()
    made, store = make_case("large", tmp_path / "case", place)
    monkeypatch.setattr(cuda, "register", never)
    spec, tables, count = replace(made.spec(made.slots(20), "lookahead"), read_ahead=True), made.tables("half wrong"), 3
    with poisoned():
        executor = Executor(spec)
    try:
        assert executor._device.miss_path == "staged: store.backing is file, and registering it would pin all of it"
        for index in range(4 * count):
            if index % count == 0:
                evict(executor._arena)
            for ahead in range(index, index + 3):
                executor.plan(ahead, tables[ahead % count])
            result = executor.execute(replace(made.batches[index % count], index=index), tables[index % count])
            assert_equal_results(result.results, made.expected[index % count])
            assert sum(result.stats.misses) == 0
    finally:
        executor.close()
    assert store.close(keep=False)


def test_staged_text_is_written_as_the_whole_model_writes_it(tmp_path, shm, unregistered):
    whole = save_decoder(tmp_path / "model").to(DEVICE)
    rows = tmp_path / "rows.txt"
    rows.write_text("".join(f"{sentence}\n" for sentence in SENTENCES))
    data = config_data(tmp_path / "model", rows, shm, tmp_path / "out", device=DEVICE.type, task="generate", batch={"size": 3})
    data |= {"data": {"path": str(rows)}, "generate": {"max_new_tokens": 8}}
    del data["labels"]
    prepared = prepare(parse(data, "test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    for slots in (0, 1, 5):
        executor = Executor(replace(prepared.executor_spec(), slots=slots))
        try:
            for batch in prepared.batches:
                ours, theirs = executor.execute(batch, None).results, answers(prepared.task, whole, batch)
                assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in theirs]
        finally:
            executor.close()
    assert store.close(keep=False)


# Memory


STATED_BYTES = 192 * 2**20
"""cuBLAS's workspaces, 32 MiB or twice that for each of two streams, and what a forward of a few hundred tokens holds."""


@pytest.mark.parametrize("budget", ["0", "37%", "100%"])
def test_device_memory_stays_within_backbone_budget_and_activations(tmp_path, shm, budget):
    """The experts take 256 MiB: a second copy of all of them, or twice a budget of all of them, would not go unnoticed."""
    model = switch_config(num_labels=2, **LARGE | {"d_ff": 2048}).to_dict()
    file = tmp_path / "model.json"
    file.write_text(json.dumps(model | {"architectures": ["SwitchTransformersForSequenceClassification"]}))
    random = {"config": str(file), "dtype": "float32", "random": {"recipe": "switch"}, "tokenizer": str(TOKENIZER)}
    settings = config_data(file, write_tsv(tmp_path / "rows.tsv"), shm, tmp_path / "out", device=DEVICE.type)
    prepared = prepare(parse(settings | {"model": random, "store": {"budget": budget, "directory": str(shm)}}, "test"))
    assert prepared.layout.expert_bytes == 2**28 > STATED_BYTES
    assert prepared.budget_bytes <= float(budget.rstrip("%")) / 100 * 2**28
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    batches, predictor = make_some(prepared.task, [1, 7, 16]), Random(prepared.model.shape, top_k=2, seed=0)

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    executor = Executor(prepared.executor_spec())
    assert executor._device.engine.slots.memory.numel() == prepared.budget_bytes
    warm = 0
    for turn in range(20):
        if budget != "100%":  # there all is in slots soon, and there is one way
            force(executor, (None, True, False)[turn % 3])
        for i, batch in enumerate(batches):
            result = executor.execute(replace(batch, index=turn * len(batches) + i), timed(predictor, batch.tokens))
            assert result.stats.resident_peak_bytes <= prepared.budget_bytes
        if turn == 2:
            warm = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= warm + 2**20, "it grows"
    stands = prepared.layout.backbone_bytes + prepared.budget_bytes
    print(f"{budget}: {(torch.cuda.max_memory_allocated() - allocated - stands) / 2**20:.0f} MiB beside backbone and budget")
    assert torch.cuda.max_memory_allocated() - allocated <= stands + STATED_BYTES
    assert torch.cuda.max_memory_reserved() - reserved <= stands + ACTIVATION_BYTES
    executor.close()
    assert store.close(keep=False)


# Several of them, and their deaths


def serve_until_killed(spec: ExecutorSpec, batches: list[Batch], tables: list[Prediction], pipe: Connection) -> None:
    """In a process of its own."""
    executor = Executor(spec)
    for index in itertools.count():
        i = index % len(batches)
        for ahead in range(index, index + 4):
            executor.plan(ahead, tables[ahead % len(batches)])
        executor.execute(replace(batches[i], index=index), tables[i])
        if index == 4 * len(batches):
            pipe.send(index)


def serve_after(go: Event, spec: ExecutorSpec, batches: list[Batch], tables: list[Prediction], pipe: Connection) -> None:
    """In a process of its own, which waits for a word before it looks at the arena."""
    assert go.wait(120)
    executor = Executor(spec)
    for turn in range(3):
        results = []
        for i, batch in enumerate(batches):
            results.append(executor.execute(replace(batch, index=turn * len(batches) + i), tables[i]).results)
        pipe.send(results)
    executor.close()


def receive(pipe: Connection):
    assert pipe.poll(120), "the other process says nothing"
    return pipe.recv()  # EOFError: it broke; its traceback is on stderr


def test_an_executor_that_is_killed_while_it_serves_leaves_an_arena_to_the_next_and_nothing_else(tmp_path, shm):
    made, store = make_case("text", tmp_path / "case", shm)
    spawn = multiprocessing.get_context("spawn")
    (here, there), (to_next, from_next), go = spawn.Pipe(), spawn.Pipe(), spawn.Event()
    work = (made.spec(made.slots(10)), made.batches, made.tables("half wrong"))
    first = spawn.Process(target=serve_until_killed, args=(*work, there), daemon=True)
    second = spawn.Process(target=serve_after, args=(go, *work, from_next), daemon=True)
    try:
        first.start()
        second.start()  # already now: it takes its time to begin
        there.close()
        from_next.close()
        assert receive(here) == 4 * len(made.batches)
        assert not store.close(keep=True)
        assert clean(shm) == ([], [made.prepared.arena]), "the one that serves holds it"
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        first.join(30)
        assert first.exitcode == -signal.SIGKILL
        go.set()
        for _ in range(3):
            for results, expected in zip(receive(to_next), made.expected, strict=True):
                assert_equal_results(results, expected)
        second.join(30)
        assert second.exitcode == 0
    finally:
        for process in (first, second):
            process.kill()
    removed, in_use = clean(shm)
    assert [gone.path for gone in removed] == [made.prepared.arena] and not in_use


def test_two_executors_in_one_process_share_an_arena(case):
    case = case("text")
    tables, count = case.tables("half wrong"), len(case.batches)
    wrong: list[BaseException] = []

    def serve(executor: Executor, first: int, turns: int) -> None:
        try:
            for index in range(first, first + turns * count):
                i = index % count
                result = executor.execute(replace(case.batches[i], index=index), tables[i])
                assert_equal_results(result.results, case.expected[i])
        except BaseException as error:
            wrong.append(error)

    with case.executor(case.slots(37), "lookahead") as other:
        with case.executor(case.slots(10), "lru") as one:
            for turn in range(4):  # in turns, until everything is recorded
                for executor in (one, other):
                    force(executor, turn % 2 == 0)
                    serve(executor, turn * count, turns=1)
            assert not wrong
            threads = [threading.Thread(target=serve, args=(executor, 4 * count, 20)) for executor in (one, other)]
            for executor in (one, other):
                force(executor, None)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
        serve(other, 24 * count, turns=1)  # its mapping is its own
        assert not wrong


def test_close_unregisters_the_arena(case):
    case = case("text")
    with case.executor(case.slots(10)) as executor:
        executor.execute(case.batches[0], None)
        memory = executor._arena.memory
        with pytest.raises(cuda.CudaError, match="REGISTERED"):
            cuda.register(memory.data_ptr(), memory.numel(), 0)
    cuda.register(memory.data_ptr(), memory.numel(), 0)
    cuda.unregister(memory.data_ptr())
    with case.executor(case.slots(10)) as executor:
        assert_equal_results(executor.execute(case.batches[0], None).results, case.expected[0])
