"""The Predictor's class, called plainly: made when first asked, the same table for the same batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictor.actor import Predictor
from predictor.errors import PredictorError
from predictor.hash_function import HashFunction
from predictor.registry import PredictorSpec, save_lstm
from predictor.tokens import ENCODER, RoutingShape
from tests.predictor.made_traces import OnlyEmbedding, ragged

SHAPE = RoutingShape(experts=(8,), streams=(ENCODER,), top_k=1, vocab_size=30)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


MODEL = OnlyEmbedding(torch.randn(30, 12, generator=torch.Generator().manual_seed(0)))


def write(path, identity):
    torch.manual_seed(0)
    save_lstm(HashFunction(SHAPE, 12, 16), path, SHAPE, identity, None)
    return PredictorSpec("lstm", path, 3, SHAPE, "id")


def test_ready_and_not_the_constructor_refuses_a_wrong_file(tmp_path):
    path = tmp_path / "lstm.safetensors"
    missing = Predictor(PredictorSpec("lstm", path, 3, SHAPE, "id"), MODEL)
    with pytest.raises(PredictorError, match="no such file"):
        missing.ready()
    other = Predictor(write(path, "another"), MODEL)
    with pytest.raises(PredictorError, match="another model"):
        other.ready()


def test_a_batch_has_one_table_whoever_is_asked_and_however_often(tmp_path):
    spec = write(tmp_path / "lstm.safetensors", "id")
    tokens, others = (ragged(np.random.default_rng(seed), rows=3, vocab=30) for seed in (0, 1))
    one, restarted = Predictor(spec, MODEL), Predictor(spec, MODEL)
    one.ready()
    first = one.predict(tokens)
    one.predict(others)
    for again in (one.predict(tokens), restarted.predict(tokens)):  # out of order, and without ready()
        np.testing.assert_array_equal(first.table.experts[0], again.table.experts[0])
        np.testing.assert_array_equal(first.table.scaling[0], again.table.scaling[0])
        assert again.end >= again.start


def test_the_predictor_takes_the_threads_that_it_is_given(tmp_path):
    Predictor(write(tmp_path / "lstm.safetensors", "id"), MODEL, threads=2)
    assert torch.get_num_threads() == 2
