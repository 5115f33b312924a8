"""What a token's neighbours say of its expert: seen where it is so, and not where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.predicting.neighbours import main, neighbours
from predictor.tokens import ENCODER, RoutingShape
from predictor.traces import Trace, select
from tests.predictor.made_traces import ragged, trace_by_rule

VOCAB, EXPERTS = 4, 8
SHAPE = RoutingShape(experts=(EXPERTS,) * 3, streams=(ENCODER,) * 3, top_k=1, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """By the token, by the two beside it, and by the one that is three before it; in two parts."""
    tokens = ragged(np.random.default_rng(0), rows=500, vocab=VOCAB, shortest=4, longest=9)

    def beside(row: np.ndarray) -> np.ndarray:
        around = np.pad(row, 1)
        return (around[:-2] + 2 * around[2:]) % EXPERTS

    rules = [lambda row: row % EXPERTS, beside, lambda row: np.pad(row, (3, 0))[:-3] % EXPERTS]
    whole = trace_by_rule(tokens, SHAPE, rules, [np.ones(VOCAB)] * 3)
    return [select(whole, rows, SHAPE) for rows in (np.arange(400), np.arange(400, 500))]


def test_a_wider_context_helps_where_the_choice_depends_on_it(traces):
    by_token, by_both, by_one_far = (neighbours(*traces, SHAPE, layer) for layer in range(3))
    assert [hits.top1 for hits in by_token] == [1, 1, 1]
    assert by_both[0].top1 < 0.5 and by_both[1].top1 > 0.95 and by_both[2].top1 > 0.9
    assert by_both[1].often_top1 == 1 and 0.5 < by_both[1].often < 1
    assert all(hits.top1 < 0.65 for hits in by_one_far)


def test_a_context_that_was_never_seen_leans_on_the_narrower_one(traces):
    few = select(traces[0], np.arange(20), SHAPE)
    hits = neighbours(few, traces[1], SHAPE, 0)
    assert hits[2].often < 0.3 and hits[2].top1 == hits[0].top1 == 1


def test_bad_input_is_one_line(tmp_path, capsys):
    sheet = tmp_path / "sheet.yaml"
    sheet.write_text("{rows: {one: {}}, predictors: {}, directory: x}")
    assert main([str(sheet)]) == main([str(sheet), "absent"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: say SHEET.yaml ROW",
        f"error: {sheet}: rows: there is no 'absent'; there are one",
    ]
