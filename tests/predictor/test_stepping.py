"""What is said of a token that has just been written, against what is said of whole texts, and counts done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictor.calibration import Calibration, inclusion
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import Width
from predictor.nobody import Nobody
from predictor.registry import BY_TOKEN, KINDS, SILENT, STEPPING, TRAINED
from predictor.stepping import HALF_LIFE, Foresight, LSTMSteps, TokenSteps, source_of, together
from predictor.token_table import TokenTable
from predictor.tokens import RoutingShape, TokenBatch
from tests.predictor.made_traces import ragged, random_trace

SHAPE = RoutingShape(experts=(6, 8), streams=(0, 0), top_k=2, vocab_size=50)


def test_what_a_kind_of_predictor_can_do_is_said_of_kinds_that_there_are():
    assert {*TRAINED, *SILENT} < {*KINDS} and not {*TRAINED} & {*SILENT}
    assert {*BY_TOKEN} < {*TRAINED} < {*STEPPING} and {*STEPPING} - {*TRAINED} < {*SILENT}


def tokens(*rows: list[int]) -> TokenBatch:
    return TokenBatch((tuple(np.array(row) for row in rows),))


def hash_function() -> LSTMPredictor:
    torch.manual_seed(0)
    calibration = Calibration((0.5, 2.0), (0.0, 0.0), (0.0, 0.0))
    return LSTMPredictor(HashFunction(SHAPE, 12, 16), SHAPE, torch.randn(50, 12), Width(3), calibration)


def test_the_hash_function_goes_on_as_if_it_read_the_whole_text():
    """Rows of unequal lengths; after every token, the last token's scores are those of one reading."""
    predictor = hash_function()
    steps = LSTMSteps(predictor)
    rows = [[3, 9, 4, 7], [5], [8, 1, 2]]
    steps.begin(tokens(*rows))
    for new in ([11, 12, 13], [21, 22, 23], [31, 3, 33]):
        said = steps.step(np.array(new), 2)
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        for at, row in enumerate(rows):
            for layer, (logits, temperature) in enumerate(zip(predictor.logits(tokens(row)), (0.5, 2.0), strict=True)):
                right = inclusion(logits[-1:], temperature, 2)[0]
                assert said[layer][at] == pytest.approx(right, abs=1e-5)


def test_only_the_layers_that_are_asked_for_are_said_something_of():
    steps = LSTMSteps(hash_function())
    steps.begin(tokens([1, 2]))
    assert [len(layer[0]) for layer in steps.step(np.array([3]), 1)] == [6]


def test_a_token_table_says_the_shares_of_the_token():
    rng = np.random.default_rng(0)
    trace = random_trace(rng, ragged(rng, 6, SHAPE.vocab_size), SHAPE)
    table = TokenTable.fit(trace, SHAPE, Width(2))
    said = TokenSteps(table).step(np.array([7, 8]), 2)
    for layer, experts in enumerate(SHAPE.experts):
        for at, token in enumerate((7, 8)):
            right = np.zeros(experts)
            right[table.experts[layer][token]] = np.minimum(table.shares[layer][token].astype(float) * 2, 1)
            assert said[layer][at] == pytest.approx(right, abs=1e-3)


def test_a_rows_past_counts_its_recent_tokens_more():
    foresight = Foresight(SHAPE, None)
    first = np.array([[0, 1], [0, 2], [5, 4]])  # two tokens of row 0, one of row 1
    foresight.begin(tokens([1, 2], [3]), [first, first])
    keep = 0.5 ** (1 / HALF_LIFE)
    likely = foresight.likely(np.array([9, 9]))
    assert likely[0][0] == pytest.approx([1, keep / (1 + keep), 1 / (1 + keep), 0, 0, 0])
    assert likely[0][1] == pytest.approx([0, 0, 0, 0, 1, 1])
    foresight.learn([np.array([[3, 2]])] * 2, np.array([True, False]))
    after = foresight.likely(np.array([9, 9]))
    weight = 1 + keep + keep**2
    assert after[0][0] == pytest.approx([(keep + keep**2) / weight, keep**2 / weight, (1 + keep) / weight, 1 / weight, 0, 0])
    assert after[0][1] == pytest.approx(likely[0][1]), "a row that is done learns nothing"


def test_uses_are_those_of_the_rows_that_go_on():
    foresight = Foresight(SHAPE, None)
    chosen = np.array([[0, 1], [2, 3]])
    foresight.begin(tokens([1], [2]), [chosen, chosen])
    uses = foresight.uses(np.array([5, 5]), np.array([False, True]))
    assert [sorted(expert for expert, _ in layer) for layer in uses] == [[2, 3], [2, 3]]
    foresight.layers = 1
    assert len(foresight.uses(np.array([5, 5]), np.array([True, True]))) == 2, "what has been counted is said"


def test_rows_join_their_probabilities():
    assert dict(together(np.array([[0.5, 0.0], [0.5, 0.2]]))) == pytest.approx({0: 0.75, 1: 0.2})


def test_who_sees_whole_texts_only_says_nothing_of_a_token():
    assert source_of(Nobody(SHAPE)) is None
    assert source_of(None) is None
    assert isinstance(source_of(hash_function()), LSTMSteps)
