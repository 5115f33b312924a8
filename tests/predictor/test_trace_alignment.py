"""Traces against transformers: per MoE layer and token, what hooks on the whole model's own routers say of the same batch."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from pipeline.config import parse
from pipeline.executor import Executor
from pipeline.predicting.train import record
from pipeline.prepare import prepare
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import Width
from predictor.settings import TrainSettings
from predictor.tokens import DECODER, ENCODER
from predictor.traces import Trace, join
from predictor.training import distillation_loss
from store.actor import ExpertStore
from tests.conftest import SENTENCES, answers, config_data, save_switch

TOP_T = 5


@contextmanager
def hooked(model: torch.nn.Module):
    """Collects (experts one-hot, weight, logits) of every router call, in the order of the calls."""
    calls: list[tuple[torch.Tensor, ...]] = []
    routers = [module for module in model.modules() if isinstance(module, SwitchTransformersTop1Router)]
    handles = [router.register_forward_hook(lambda module, inputs, output: calls.append(output)) for router in routers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module", params=["score", "classify with words", "classify with a head", "score, with a tight capacity"])
def world(request, tmp_path_factory):
    """A model, whole and served under a budget, and its data in batches of unequal rows: (whole model, prepared, store)."""
    root: Path = tmp_path_factory.mktemp("alignment")
    arenas = root / "arenas"
    arenas.mkdir()
    changes = {"expert_capacity": 2} if "tight" in request.param else {}
    # of this seed even the decoder's one token per row goes to several experts
    whole = save_switch(root / "model", seed=4, head="head" in request.param, **changes)
    data = root / "data.tsv"
    targets = list(reversed(SENTENCES))
    lines = [f"{text}\t{target}\t{i % 2}" for i, (text, target) in enumerate(zip(SENTENCES, targets, strict=True))]
    data.write_text("\n".join(["sentence\ttarget\tlabel", *lines]) + "\n")
    plain = config_data(root / "model", data, arenas, root / "out", batch={"size": 3, "order": "length"})
    if "score" in request.param:
        plain |= {"task": "score", "data": {"path": str(data), "text": "sentence", "target": "target"}}
    prepared = prepare(parse(plain, "test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    yield whole, prepared, store
    assert store.close(keep=False)


@pytest.fixture
def executor(world):
    _, prepared, _ = world
    executor = Executor(prepared.executor_spec(background=False))
    yield executor
    executor.close()


def test_every_token_has_the_decision_of_transformers_own_router(world, executor):
    whole, prepared, _ = world
    shape = prepared.model.shape
    tokens = 0
    assert len(prepared.batches) == 3
    for batch in prepared.batches:
        with hooked(whole) as calls, torch.inference_mode():
            answers(prepared.task, whole, batch)
        assert len(calls) == shape.layers
        trace = executor.trace(batch, TOP_T)
        assert trace.tokens is batch.tokens
        for layer, (stream, (_, weight, logits)) in enumerate(zip(shape.streams, calls, strict=True)):
            lengths = batch.tokens.lengths[stream].tolist()
            assert logits.shape[:2] == (len(lengths), max(lengths))
            # padding is on the right: the first tokens of each row are real
            real_logits = torch.cat([logits[row, :n] for row, n in enumerate(lengths)])
            real_weight = torch.cat([weight[row, :n, 0] for row, n in enumerate(lengths)])
            recorded = trace.layers[layer]
            assert len(recorded.top) == len(batch.tokens.flat(stream))
            np.testing.assert_array_equal(recorded.top[:, 0], real_logits.argmax(dim=-1).numpy())
            probabilities, top = real_logits.softmax(dim=-1).topk(TOP_T)
            np.testing.assert_array_equal(recorded.top, top.numpy())
            np.testing.assert_allclose(recorded.probabilities, probabilities.numpy(), atol=1e-3)
            np.testing.assert_allclose(recorded.weight, real_weight.numpy(), atol=1e-3)
            tokens += len(recorded.top)
    assert tokens == sum(len(row) for batch in prepared.batches for stream in shape.streams for row in batch.tokens.streams[stream])


def test_the_batches_are_a_fair_trial(world):
    """Unequal rows, so that padding could count; several experts, so that a shift by one would show."""
    _, prepared, _ = world
    assert prepared.slots < sum(prepared.model.shape.experts)
    ragged = [len(set(lengths.tolist())) > 1 for batch in prepared.batches for lengths in batch.tokens.lengths[:1]]
    assert any(ragged)
    trace = record(prepared)
    for layer in trace.layers:
        assert len(set(layer.top[:, 0].tolist())) > 1


def test_a_row_alone_has_the_labels_that_it_has_in_a_batch(world, executor):
    """The labels of a row do not move to its neighbours. (A tight capacity is counted per row: it changes nothing here.)"""
    _, prepared, _ = world
    shape = prepared.model.shape
    batch = next(b for b in prepared.batches if len(set(b.tokens.lengths[ENCODER].tolist())) > 1)
    together = executor.trace(batch, 1)
    for row in range(batch.tokens.size):
        tokens = type(batch.tokens)(tuple((stream[row],) for stream in batch.tokens.streams))
        targets = (batch.targets[row],) if batch.targets else None
        alone = executor.trace(type(batch)(0, batch.rows[row : row + 1], tokens, targets), 1)
        for layer, stream in enumerate(shape.streams):
            start = int(batch.tokens.lengths[stream][:row].sum())
            part = together.layers[layer].top[start : start + len(batch.tokens.streams[stream][row])]
            np.testing.assert_array_equal(part, alone.layers[layer].top)


def test_record_joins_the_batches_in_their_order(world, executor):
    _, prepared, _ = world
    joined: Trace = join([executor.trace(batch, 1) for batch in prepared.batches])
    recorded = record(prepared)
    for stream in range(len(joined.tokens.streams)):
        np.testing.assert_array_equal(joined.tokens.flat(stream), recorded.tokens.flat(stream))
    for a, b in zip(joined.layers, recorded.layers, strict=True):
        np.testing.assert_array_equal(a.top[:, 0], b.top[:, 0])


def test_a_hash_function_fits_the_trace_of_a_real_model_token_for_token(world):
    _, prepared, _ = world
    trace, shape = record(prepared), prepared.model.shape
    embedding = torch.zeros(shape.vocab_size, 8)
    network = HashFunction(shape, 8, 8)
    assert distillation_loss(network, trace, shape, embedding, TrainSettings()).isfinite()
    table = LSTMPredictor(network, shape, embedding, Width(3)).predict(trace.tokens)
    for layer in range(shape.layers):
        assert len(table.experts[layer]) == len(trace.layers[layer].top)
    assert set(shape.streams) <= {ENCODER, DECODER}
