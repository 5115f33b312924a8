"""Writing on a GPU: recorded steps write what transformers' `generate` does on the same GPU, whatever is in slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.models import describe
from predictor.actor import timed
from predictor.nobody import Nobody
from predictor.registry import PredictorSpec
from predictor.tokens import TokenBatch
from store.actor import ExpertStore
from tests.pipeline.test_decoding_steps import NEW, batches, task
from tests.pipeline.tiny_families import save_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda:0")
WAYS = {
    "pieces": (0.3, "recent", False, 0, "pieces"),
    "whole, in place": (0.3, "recent", False, 2**40, "whole"),
    "whole, no slots": (0.0, None, False, 0, "whole"),
    "complete": (1.0, None, False, 0, "whole"),
    "on demand": (0.3, None, True, 0, "pieces"),
}
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v2", "olmoe")


def compare(tmp_path: Path, family: str, way: str, written, monkeypatch, made: list[Batch] | None = None) -> None:
    from pipeline.gpu import replays

    share, kind, demand, asked_above, ran = WAYS[way]
    monkeypatch.setattr(replays, "ASKED_ABOVE", asked_above)
    (tmp_path / "arenas").mkdir()
    torch.manual_seed(0)
    whole = save_tiny(family, tmp_path / "model").from_pretrained(tmp_path / "model", dtype=torch.float32).eval().to(CUDA)
    spec, weights = describe(ModelConfig(str(tmp_path / "model"), "float32"), CUDA)
    layout = spec.placement.layout(weights)
    arena = spec.placement.arena_path(weights, tmp_path / "arenas")
    store = ExpertStore(arena, spec.source, spec.placement)
    store.open()
    slots = int(share * layout.expert_bytes) // layout.slot_bytes
    serves = ExecutorSpec(spec, written, arena, slots, "lookahead", "cuda:0", 1, demand=demand)
    if kind is not None:
        serves = replace(serves, stepping=PredictorSpec(kind, None, spec.shape.top_k, spec.shape, "any"))
    executor = Executor(serves)
    try:
        executor.ready()
        if share < 1:
            executor._device.engine.slots.memory.fill_(255)  # NaN
            torch.cuda.synchronize()
        nobody, ways = Nobody(spec.shape), set()
        for batch in made or batches():
            done = executor.execute(batch, timed(nobody, batch.tokens))
            inputs = written.inputs(batch, lambda longest: longest)
            with torch.inference_mode():
                right = written.forward(whole, {name: tensor.to(CUDA) for name, tensor in inputs.items()})
            assert [row["token_ids"] for row in done.results] == [[t for t in row if t >= 0] for row in right.tolist()]
            ways |= set(done.stats.how)
            if share == 0 and not written.stop:
                assert sum(done.stats.hits) == 0
                assert min(done.stats.misses) >= NEW, "every step counts"
        assert ran in ways, ways
    finally:
        executor.close()
        store.close(keep=False)


@pytest.mark.parametrize("way", WAYS)
def test_steps_write_what_transformers_does(tmp_path, monkeypatch, way):
    compare(tmp_path, "qwen3_moe", way, task(stop=()), monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_write_what_transformers_does(tmp_path, monkeypatch, family):
    compare(tmp_path, family, "pieces", task(stop=()), monkeypatch)


def test_samples_are_those_of_transformers(tmp_path, monkeypatch):
    compare(tmp_path, "qwen3_moe", "whole, in place", task(stop=(), sample=True, temperature=0.8, top_k=20), monkeypatch)


def test_rows_end_by_themselves_and_late(tmp_path, monkeypatch):
    """Nobody asks for tokens in time there: the last step of all is one too many, and is not heard."""
    compare(tmp_path, "qwen3_moe", "whole, no slots", task(stop=tuple(range(1, 60))), monkeypatch)


@pytest.mark.parametrize("sample", (False, True), ids=("greedy", "sampled"))
def test_recorded_steps_come_and_go(tmp_path, monkeypatch, sample):
    """Only the newest shape is kept: the first one is recorded, let go, and recorded again."""
    from pipeline.gpu import replays

    monkeypatch.setattr(replays, "KEPT_BYTES", 0)
    rng = np.random.default_rng(1)
    shapes = [(9, 5, 3), (7,), (4, 6, 8), (3, 3), (8, 2, 5)]
    made = [
        Batch(i, np.arange(len(many)), TokenBatch((tuple(rng.integers(3, 100, n) for n in many),))) for i, many in enumerate(shapes)
    ]
    written = task(stop=(), sample=True, temperature=0.8, top_k=20) if sample else task(stop=())
    compare(tmp_path, "qwen3_moe", "pieces", written, monkeypatch, made)
