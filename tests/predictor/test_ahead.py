"""Who is asked of together, who waits, and what becomes of those that wait when something goes wrong."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from predictor.ahead import POSITIONS, RESERVE, ROWS, Ahead
from predictor.hash_table import HashTable
from predictor.tokens import TokenBatch


def batch(rows: int = 1, tokens: int = 3) -> TokenBatch:
    return TokenBatch((tuple(np.full(tokens, rows) for _ in range(rows)),))


class Together:
    """Remembers the rows of every call; refuses a batch of `bad` rows."""

    def __init__(self, bad: int = 0):
        self.calls: list[list[int]] = []
        self.bad = bad

    def predict(self, tokens: TokenBatch) -> HashTable:
        return self.predict_all([tokens])[0]

    def predict_all(self, batches: list[TokenBatch]) -> list[HashTable]:
        self.calls.append([tokens.size for tokens in batches])
        if self.bad in self.calls[-1]:
            raise ValueError("bad")
        one = np.ones((1, 1), dtype=np.float32)
        return [HashTable((np.full((1, 1), tokens.size, dtype=np.int16),), (one,), (one,)) for tokens in batches]


def taken(ahead: Ahead, number: int) -> int:
    return int(ahead.take(number).table.experts[0][0, 0])


@pytest.fixture
def made():
    predictor = Together()
    return predictor, Ahead(lambda: predictor)


def test_those_that_wait_are_asked_of_together_and_each_gets_its_own(made):
    predictor, ahead = made
    for number in range(5):
        ahead.ask(number, batch(rows=number + 1))
        ahead.ask(number, batch(rows=number + 1))  # calls may be repeated
    assert [taken(ahead, number) for number in range(5)] == [1, 2, 3, 4, 5]
    assert predictor.calls == [[1, 2, 3, 4, 5]]


def test_tables_may_be_taken_in_another_order(made):
    _, ahead = made
    for number in (2, 0, 1):
        ahead.ask(number, batch(rows=number + 1))
    assert [taken(ahead, number) for number in (0, 1, 2)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("asked", "calls"),
    [
        ([(ROWS - 1, 1), (1, 1), (1, 1)], [[ROWS - 1, 1], [1]]),
        ([(2 * ROWS, 1), (1, 1)], [[2 * ROWS], [1]]),
        ([(1, POSITIONS // 2), (2, 1), (1, 1)], [[1], [2, 1]]),  # three rows as long as the first would be
    ],
)
def test_rows_and_padded_tokens_of_one_go_are_bounded(made, asked, calls):
    predictor, ahead = made
    for number, (rows, tokens) in enumerate(asked):
        ahead.ask(number, batch(rows, tokens))
    for number in range(len(asked)):
        ahead.take(number)
    assert predictor.calls == calls


def test_whoever_asks_for_itself_is_not_mixed_with_others(made):
    predictor, ahead = made
    for number, alone in enumerate((False, True, True, False)):
        ahead.ask(number, batch(rows=number + 1), alone)
    assert [taken(ahead, number) for number in range(4)] == [1, 2, 3, 4]
    assert predictor.calls == [[1], [2], [3], [4]]


def test_while_there_is_enough_to_do_others_may_still_come(made):
    predictor, ahead = made
    for number in range(RESERVE + 1):
        ahead.begun(number)
    ahead.ask(9, batch())
    thread = threading.Thread(target=ahead.take, args=(9,))
    thread.start()
    time.sleep(0.05)
    assert not predictor.calls, "there are tables enough, and it is alone"
    ahead.finished(0)
    thread.join(10)
    assert predictor.calls == [[1]]


def test_one_bad_batch_fails_alone():
    predictor = Together(bad=2)
    ahead = Ahead(lambda: predictor)
    for number in range(3):
        ahead.ask(number, batch(rows=number + 1))
    assert taken(ahead, 0) == 1
    with pytest.raises(ValueError, match="bad"):
        ahead.take(1)
    assert taken(ahead, 2) == 3


def test_a_predictor_that_cannot_be_made_is_everybodys_error():
    def cannot() -> Together:
        raise OSError("no file")

    ahead = Ahead(cannot)
    for number in range(2):
        ahead.ask(number, batch())
    for number in range(2):
        with pytest.raises(OSError, match="no file"):
            ahead.take(number)


def test_nobody_waits_after_the_end_nor_for_what_was_not_asked(made):
    _, ahead = made
    ahead.begun(0)
    failed = []

    def take() -> None:
        try:
            ahead.take(7)
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    ahead.close()
    thread.join(10)
    assert len(failed) == 1 and failed[0].startswith("batch 7: its table was not asked for")
