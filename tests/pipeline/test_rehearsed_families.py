"""Rehearsals of families behind transformers' door and of NLLB-MoE: their own gates, biases and layouts, computed on stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.predicting import stand_ins
from pipeline.predicting.rehearsal import ArenaModel
from predictor.errors import PredictorError
from predictor.hash_table import HashTable, Width
from predictor.registry import PredictorSpec
from predictor.rehearsal import Rehearsal
from predictor.stand_ins import StandIns, plan, save
from predictor.traces import Trace, join
from store.arena import Arena
from tests.pipeline import test_encoder_decoders
from tests.pipeline.test_families import Logits, Served, Written, make_batches, writing
from tests.pipeline.tiny_families import save_tiny

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "olmoe", "minimax_m2", "phimoe", "qwen3_next", "jamba", "nllb")
"""Experts fused and apart, transposed, with biases, with clamped gates; routers with softmax, sigmoids, groups and corrections."""
REFUSED = {"zaya": "does not hand out what it thinks of all experts", "ernie4_5_vl_moe": "text does not reach MoE layer 1"}


@contextmanager
def opened(tmp_path: Path, family: str) -> Iterator[tuple[Served, Arena, list[Batch]]]:
    if family == "nllb":
        test_encoder_decoders.save_nllb(tmp_path / "model")
    else:
        save_tiny(family, tmp_path / "model", **({"num_hidden_layers": 4} if family == "jamba" else {}))
    served = Served(tmp_path / "model", tmp_path)
    with served.store():
        arena = Arena.attach(served.arena)
        assert arena is not None
        try:
            yield served, arena, test_encoder_decoders.batches() if family == "nllb" else make_batches()
        finally:
            arena.close()


def made(arena: Arena, kind: str) -> StandIns:
    """As large as they get."""
    layers = arena.layout.layers
    return stand_ins.make(plan(kind, 2**40, tuple(layer.experts for layer in layers), stand_ins.shapes(arena.layout)), arena, "cpu")


def recorded(served: Served, batches: list[Batch]) -> Trace:
    logits = Logits() if served.spec.shape.streams[-1] == 0 else test_encoder_decoders.Logits()
    with served.executor(logits) as executor:
        return join([executor.trace(batch, 30) for batch in batches])


def alike(table: HashTable, truth: Trace, top_k: int) -> list[float]:
    """Per MoE layer the share of tokens whose first experts are the router's."""
    return [
        float(np.mean([set(named[:top_k]) == set(chosen) for named, chosen in zip(experts, layer.top[:, :top_k], strict=True)]))
        for experts, layer in zip(table.experts, truth.layers, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_stand_ins_of_full_rank_a_rehearsal_says_what_the_routers_decide_and_what_they_weigh(tmp_path, family):
    with opened(tmp_path, family) as (served, arena, batches):
        truth, shape = recorded(served, batches), served.spec.shape
        found = {}
        for kind in ("none", "svd", "4bit"):
            rehearser = ArenaModel(served.spec, served.arena, arena).rehearser(made(arena, kind), "cpu")
            table = Rehearsal(rehearser, None, shape, Width(max(3, shape.top_k))).predict(truth.tokens)
            found[kind] = alike(table, truth, shape.top_k)
            if kind == "svd":
                for scaling, layer in zip(table.scaling, truth.layers, strict=True):
                    np.testing.assert_allclose(scaling.sum(axis=1), layer.weight.astype(np.float32), atol=2e-2, rtol=1e-2)
        assert min(found["svd"]) > 0.96  # factors are of float16
        if shape.layers > 1:
            assert min(found["none"]) < 0.9 and sum(found["none"]) < sum(found["4bit"])


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_rehearsed_says_why_in_one_line_before_there_is_a_batch(tmp_path, family):
    with opened(tmp_path, family) as (served, arena, _):
        with pytest.raises(PredictorError, match=REFUSED[family]) as refused:
            ArenaModel(served.spec, served.arena, arena).rehearser(made(arena, "none"), "cpu")
        assert "\n" not in str(refused.value)


def test_a_decoder_writes_what_it_writes_anyway_and_its_prompts_are_predicted_and_traced(tmp_path):
    with opened(tmp_path, "olmoe") as (served, arena, batches):
        save(made(arena, "4bit"), tmp_path / "made", arena.identity)
        predictor = PredictorSpec("rehearsal", tmp_path / "made", 3, served.spec.shape, arena.identity, mass=0.9, most=served.slots)
        task = Written(**vars(writing()))
        spec = ExecutorSpec(served.spec, task, served.arena, served.slots, "lookahead", "cpu", 1)
        expected = [result.results for result in served.run(task, batches)]
        executor = Executor(replace(spec, predictor=predictor, top_t=4))
        results = [future.result() for future in [executor.submit(batch, None) for batch in batches]]
        executor.close()
        assert [result.results for result in results] == expected
        for result, batch in zip(results, batches, strict=True):
            assert result.trace is not None and result.stats.predicted_uses > 0
            assert all(layer.top.shape == (sum(map(len, batch.tokens.streams[0])), 4) for layer in result.trace.layers)
