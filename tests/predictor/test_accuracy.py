"""Accuracy of tables: top-1 and top-3 per MoE layer, adding up over batches."""

from __future__ import annotations

import numpy as np
import pytest

from predictor.accuracy import Accuracy, compare
from predictor.hash_table import HashTable


def table(*experts: list[list[int]]) -> HashTable:
    arrays = tuple(np.array(e, dtype=np.int16) for e in experts)
    return HashTable(arrays, arrays, arrays)


def test_a_token_is_right_when_its_expert_is_among_the_first_one_or_three():
    found = compare(
        table([[3, 1, 2, 0], [3, 1, 2, 0], [3, 1, 2, 0], [0, 1, 2, 3]], [[5], [6]]),
        [np.array([3, 2, 0, 0]), np.array([5, 5])],
    )
    assert found.top1 == [2, 1]
    assert found.top3 == [3, 1]  # the fourth guess does not count
    assert found.tokens == [4, 2]
    assert found.rates() == {"top1": [0.5, 0.5], "top3": [0.75, 0.5]}
    assert found.mean_top1 == pytest.approx(3 / 6)
    assert found.mean_top3 == pytest.approx(4 / 6)


def test_accuracies_of_batches_add_up_to_that_of_all_tokens():
    total = Accuracy()
    total.add(compare(table([[1]] * 3), [np.array([1, 1, 0])]))
    total.add(compare(table([[1]]), [np.array([0])]))
    assert (total.top1, total.tokens) == ([2], [4])
    assert total.mean_top1 == 0.5


def test_nothing_compared_is_nothing_right():
    assert Accuracy().mean_top1 == 0
    assert Accuracy().rates() == {"top1": [], "top3": []}
