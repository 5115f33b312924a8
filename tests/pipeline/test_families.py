"""Every family that transformers routes through its door for experts, from disk at a budget of 30 %: exact, or listed.

The whole model and its greedy tokens are transformers' own (`from_pretrained`, `generate`). Slots are poisoned, so that an expert
that was not copied shows; and routers, gates and experts are random and wide, so that an expert that is wrong shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bench.whole import whole_model
from pipeline.config import ModelConfig, RandomConfig
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.inputs import padded_inputs
from pipeline.models import ModelSpec, describe
from pipeline.tasks.generate import Generate
from pipeline.tasks.sampling import Sampling
from pipeline.weights.reference import named_tensors
from predictor.actor import timed
from predictor.baselines import Oracle, Random
from predictor.nobody import Nobody
from predictor.tokens import TokenBatch
from predictor.traces import join
from store.actor import ExpertStore
from store.arena import Arena
from tests.pipeline.family_table import NOT_SERVED, NOT_WRITING
from tests.pipeline.tiny_families import SEEING, architecture, families, save_tiny, tiny_config

CPU = torch.device("cpu")
NEW_TOKENS = 6
STOP = 1


class Logits:
    """A task that answers with all logits of real tokens, row after row (pipeline.tasks.registry.Task)."""

    forwards = 1

    def inputs(self, batch, padded):
        return padded_inputs(batch, 0, padded)

    def forward(self, model, inputs, hear=None):
        return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]

    def results(self, batch, outputs):
        return [{"logits": outputs}]


def writing() -> Generate:
    return Generate(Sampling(max_new_tokens=NEW_TOKENS), 0, (STOP,), None, None, None, Path("unused"), 0)


class Written(Generate):
    """Without a tokenizer."""

    def text(self, ids: list[int]) -> str:
        return ""


def make_batches(seed: int = 0) -> list[Batch]:
    """Two of three rows of unequal lengths."""
    rng = np.random.default_rng(seed)
    rows = [[rng.integers(3, 100, n) for n in lengths] for lengths in ((9, 5, 3), (7, 11, 2))]
    return [Batch(i, np.arange(3), TokenBatch((tuple(ids),))) for i, ids in enumerate(rows)]


class Served:
    """A checkpoint in an arena, and Executors over it."""

    def __init__(self, directory: Path, arenas: Path, dtype: str = "float32"):
        self.spec: ModelSpec
        self.spec, weights = describe(ModelConfig(str(directory), dtype), CPU)
        self.layout = self.spec.placement.layout(weights)
        self.arena = self.spec.placement.arena_path(weights, arenas)
        self.slots = int(0.3 * self.layout.expert_bytes) // self.layout.slot_bytes

    @contextmanager
    def store(self) -> Iterator[None]:
        store = ExpertStore(self.arena, self.spec.source, self.spec.placement)
        store.open()
        try:
            yield
        finally:
            assert store.close(keep=False)

    @contextmanager
    def executor(self, task) -> Iterator[Executor]:
        executor = Executor(ExecutorSpec(self.spec, task, self.arena, self.slots, "lru", "cpu", 1, background=False))
        executor._device._engine.slots.memory.fill_(255)  # NaN
        try:
            yield executor
        finally:
            executor.close()

    def run(self, task, batches: list[Batch], predictor=None) -> list:
        """All batches with tables of random experts, as wrong as can be."""
        predictor = predictor or Random(self.spec.shape, self.spec.shape.top_k, 0)
        with self.executor(task) as executor:
            return [executor.execute(batch, timed(predictor, batch.tokens)) for batch in batches]


def assert_exact(served: Served, whole, batches: list[Batch]) -> None:
    """DESIGN's contract for float32: every real token's logits."""
    hits = misses = 0
    for batch, result in zip(batches, served.run(Logits(), batches), strict=True):
        ours = result.results[0]["logits"]
        with torch.inference_mode():
            theirs = Logits().forward(whole, Logits().inputs(batch, lambda longest: longest))
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
        hits, misses = hits + sum(result.stats.hits), misses + sum(result.stats.misses)
    assert hits > 0, "some experts must come from slots"
    assert misses > 0, "and some be read where they lie"


def assert_experts_matter(whole, batch: Batch) -> None:
    """Else their part of the contract would hold whatever they compute."""
    inputs = Logits().inputs(batch, lambda longest: longest)
    with torch.inference_mode():
        before = Logits().forward(whole, inputs)
        down = [(p, p.clone()) for n, p in whole.named_parameters() if n.endswith("experts.down_proj")]
        for parameter, _ in down:
            parameter.zero_()
        apart = (Logits().forward(whole, inputs) - before).abs().max()
        for parameter, values in down:
            parameter.copy_(values)
    assert apart > 1e-3 * max(1.0, before.abs().max().item())


def greedy(whole, batch: Batch) -> list[list[int]]:
    """transformers' own, each row up to its stop token."""
    ids, mask = batch.pad(0, 0, left=True)
    with torch.inference_mode():
        out = whole.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in rows]


def assert_writes(served: Served, whole, batches: list[Batch]) -> None:
    for batch, result in zip(batches, served.run(Written(**vars(writing())), batches), strict=True):
        assert [row["token_ids"] for row in result.results] == greedy(whole, batch)


def listed(family: str, table: dict[str, str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=table[family])] if family in table else []


@pytest.mark.parametrize("family", [pytest.param(f, marks=listed(f, NOT_SERVED)) for f in families()])
def test_answers_as_transformers_at_a_budget_of_30_percent(tmp_path, family):
    whole = save_tiny(family, tmp_path / "model").from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    served, batches = Served(tmp_path / "model", tmp_path), make_batches()
    with served.store():
        assert_exact(served, whole, batches)
    assert_experts_matter(whole, batches[0])


@pytest.mark.parametrize("family", [pytest.param(f, marks=listed(f, NOT_WRITING)) for f in families() if f not in NOT_SERVED])
def test_writes_what_transformers_writes(tmp_path, family):
    whole = save_tiny(family, tmp_path / "model").from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    served = Served(tmp_path / "model", tmp_path)
    with served.store():
        assert_writes(served, whole, make_batches())


@pytest.mark.parametrize("family", SEEING)
def test_a_class_with_a_vision_tower_is_served_on_text(tmp_path, family):
    if family == "inkling":
        pytest.importorskip("scipy", reason="inkling's vision tower is made with scipy")
    cls = save_tiny(family, tmp_path / "model", seeing=True)
    whole = cls.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    served = Served(tmp_path / "model", tmp_path)
    with served.store():
        assert_exact(served, whole, make_batches())
        assert_writes(served, whole, make_batches())


# one family, in every way that it may be run


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("olmoe") / "model"
    return directory, save_tiny("olmoe", directory).from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("predictor", [Random, Nobody])
@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead"])
@pytest.mark.parametrize("slots", [0, 1, 5, 16])
def test_any_budget_policy_and_predictor_gives_the_same_logits_and_tokens(tmp_path, olmoe, slots, policy, predictor):
    directory, whole = olmoe
    served = Served(directory, tmp_path)
    shape = served.spec.shape
    made = Random(shape, shape.top_k, 0) if predictor is Random else Nobody(shape)
    with served.store():
        for task in (Logits(), Written(**vars(writing()))):
            executor = Executor(ExecutorSpec(served.spec, task, served.arena, slots, policy, "cpu", 1))  # copies in a thread
            executor._device._engine.slots.memory.fill_(255)
            for batch in make_batches():
                results = executor.execute(batch, timed(made, batch.tokens)).results
                if isinstance(task, Logits):
                    with torch.inference_mode():
                        theirs = task.forward(whole, task.inputs(batch, lambda longest: longest))
                    assert (results[0]["logits"] - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
                else:
                    assert [row["token_ids"] for row in results] == greedy(whole, batch)
            executor.close()


def test_hash_routing_with_the_true_table_answers_as_the_router_would(tmp_path, olmoe):
    """The table decides at the door too; its weights are float16, hence not to the last digit."""
    directory, whole = olmoe
    served, batches = Served(directory, tmp_path), make_batches()
    with served.store(), served.executor(Logits()) as executor:
        shape = served.spec.shape
        oracle = Oracle(join([executor.trace(batch, 30) for batch in batches]), shape, shape.top_k)
        wrong = Random(shape, shape.top_k, 0)
        for batch in batches:
            with torch.inference_mode():
                theirs = Logits().forward(whole, Logits().inputs(batch, lambda longest: longest))
            apart = [
                (executor.execute(batch, timed(p, batch.tokens), "hash").results[0]["logits"] - theirs).abs().max()
                for p in (oracle, wrong)
            ]
            assert apart[0] < 0.01 < apart[1]


def test_a_trace_says_what_the_router_chose(tmp_path, olmoe):
    directory, whole = olmoe
    served, batch = Served(directory, tmp_path), make_batches()[0]
    with served.store(), served.executor(Logits()) as executor:
        trace = executor.trace(batch, 30)
    inputs = Logits().inputs(batch, lambda longest: longest)
    with torch.inference_mode():
        logits = whole(**inputs, use_cache=False, output_router_logits=True).router_logits
    real = inputs["attention_mask"].reshape(-1).bool()
    for layer, theirs in zip(trace.layers, logits, strict=True):
        probabilities, order = theirs[real].softmax(-1).topk(8)  # all of them
        assert layer.top.tolist() == order.tolist()
        assert layer.probabilities == pytest.approx(probabilities.numpy(), abs=1e-3)
        assert layer.weight == pytest.approx(probabilities[:, : served.spec.shape.top_k].sum(-1).numpy(), abs=1e-3)


# what stands beside the server


def test_the_whole_model_beside_an_arena_is_transformers_own(tmp_path):
    """What the benchmark compares with: its 3-D parameters are views of the arena's blocks."""
    whole = save_tiny("gpt_oss", tmp_path / "model").from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    served = Served(tmp_path / "model", tmp_path)
    with served.store():
        arena = Arena.attach(served.arena)
        beside = whole_model(served.spec, arena.layout, arena.memory, CPU)
        experts = beside.model.layers[1].mlp.experts.gate_up_proj
        assert arena.memory.data_ptr() <= experts.data_ptr() < arena.memory.data_ptr() + arena.memory.numel()
        theirs = whole.state_dict()
        assert beside.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in beside.state_dict().items())
        arena.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_random_weights_make_the_same_model_here_and_in_plain_transformers(tmp_path, family):
    cls = architecture(family)
    config = tiny_config(cls.config_class)
    config.architectures = [cls.__name__]
    config.save_pretrained(tmp_path)
    served = Served.__new__(Served)
    random = ModelConfig(None, "float32", str(tmp_path / "config.json"), RandomConfig("switch", 3), str(tmp_path))
    served.spec, weights = describe(random, CPU)
    served.layout = served.spec.placement.layout(weights)
    served.arena, served.slots = served.spec.placement.arena_path(weights, tmp_path), 4
    whole = cls(tiny_config(cls.config_class)).eval()
    missing, unexpected = whole.load_state_dict(dict(named_tensors(served.spec)), strict=False)
    assert not unexpected
    assert set(missing) <= set(whole.all_tied_weights_keys)
    with served.store():
        assert_exact(served, whole, make_batches())
