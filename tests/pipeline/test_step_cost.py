"""What a wrong prediction costs while a model writes: names are wrong as often as asked for, and answers stay right."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.bench.step_cost import SHARES, Told, compare
from predictor.tokens import RoutingShape
from tests.pipeline.test_bench_decoding import small

SHAPE = RoutingShape(streams=(0, 0), experts=(6, 4), top_k=2, vocab_size=9)
STEPS = [[[0, 1, 2, 3], [3]], [[1, 2], [0, 1, 2]], [[0, 5], [2, 3]]]  # a prompt, and two steps


def names(told: Told) -> list[list[list[int]]]:
    return [[[expert for expert, _ in layer] for layer in told.uses(np.zeros(1), np.ones(1, dtype=bool))] for _ in STEPS[1:]]


def test_with_none_wrong_the_steps_names_are_told_in_their_order():
    told = Told(SHAPE, STEPS, 0.0, np.random.default_rng(0))
    assert names(told) == STEPS[1:]
    assert (told.named, told.replaced) == (9, 0)


def test_with_all_wrong_nobody_is_named_who_is_needed_as_far_as_there_are_others():
    told = Told(SHAPE, STEPS, 1.0, np.random.default_rng(0))
    for said, true in zip(names(told), STEPS[1:], strict=True):
        for layer, (mine, theirs, count) in enumerate(zip(said, true, SHAPE.experts, strict=True)):
            assert len(set(mine)) == len(theirs), layer
            assert len({*mine} & {*theirs}) == max(0, 2 * len(theirs) - count), layer
    assert told.replaced == 2 + 1 + 2 + 2


def test_shares_take_turns_and_each_has_as_many_wrong_names(tmp_path):
    report = compare(small(tmp_path, "bench.batch_sizes=[1]", "bench.prompts=[5]", "bench.budgets=[25%]", "bench.rounds=1"))
    assert [row["share"] for row in report["rows"]] == list(SHARES)
    wrong = [row["wrong"] / row["named"] for row in report["rows"]]
    assert wrong == pytest.approx(SHARES, abs=0.2) and wrong[0] == 0 and wrong[-1] == 1
    assert all(row["ms"] > 0 and row["moves"] > 0 for row in report["rows"])
    assert not list((tmp_path / "arenas").iterdir())
