"""The predictor that predicts nothing."""

from __future__ import annotations

import numpy as np
import torch

from predictor.nobody import Nobody
from predictor.registry import PredictorSpec, make
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from tests.predictor.made_traces import OnlyEmbedding

SHAPE = RoutingShape(experts=(8, 4), streams=(ENCODER, DECODER), top_k=2, vocab_size=50)
TOKENS = TokenBatch(((np.array([3, 4, 5]), np.array([6])), (np.array([7]), np.array([8, 9]))))


def test_its_tables_name_no_expert_for_any_token():
    table = Nobody(SHAPE).predict(TOKENS)
    assert [layer.shape for layer in table.experts] == [(4, 0), (3, 0)]
    assert table.uses == ((), ())
    assert table.expected_uses("exact") == 0


def test_it_needs_no_file():
    predictor = make(PredictorSpec("none", None, 3, SHAPE, "any model"), OnlyEmbedding(torch.empty(0)))
    assert isinstance(predictor, Nobody)
