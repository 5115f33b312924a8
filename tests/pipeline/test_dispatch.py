"""Which Executor gets a batch: by the experts that it will hold, by how much it has to do, and by how quick it has been."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data import Batch
from pipeline.dispatch import IMBALANCE, Job, Lane, choose
from pipeline.plan.several import moves
from predictor.tokens import TokenBatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lanes(clock: Clock, count: int = 2, slots: int = 4, lookahead: int = 8) -> list[Lane]:
    return [Lane(f"executor {number}", slots, lookahead, clock) for number in range(count)]


def job(*experts: int, tokens: int = 10, p: float = 0.9) -> Job:
    """A batch whose table names these experts of MoE layer 1."""
    batch = Batch(0, np.array([0]), TokenBatch(((np.zeros(tokens, dtype=np.int64),),)))
    return Job(batch, None, uses=((), tuple((expert, p) for expert in experts)))


def answer(lane: Lane, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    lane.answered(1.0)


def test_a_batch_goes_to_whoever_was_sent_most_of_its_experts(clock):
    one, two = lanes(clock)
    one.sent(job(1, 2))
    two.sent(job(5, 6))
    assert choose([one, two], job(5, 1, 6)) is two
    assert choose([one, two], job(1, 2, 5)) is one


def test_of_equals_the_less_busy_one_is_taken(clock):
    one, two = lanes(clock)
    one.sent(job())
    assert choose([one, two], job()) is two


def test_an_executor_holds_no_more_than_its_slots_and_forgets_what_was_named_longest_ago(clock):
    (lane,) = lanes(clock, 1, slots=3)
    for experts in ((1, 2), (3, 1), (4,)):
        lane.sent(job(*experts))
    assert [lane.overlap(job(e, p=1.0).uses) for e in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_what_is_likelier_not_needed_will_not_be_there(clock):
    (lane,) = lanes(clock, 1)
    lane.sent(job(1, p=0.4))
    assert lane.overlap(job(1).uses) == 0


def test_overlap_counts_experts_by_how_likely_they_are_needed_and_layers_are_not_mixed_up(clock):
    (lane,) = lanes(clock, 1)
    lane.sent(job(1, 2))
    assert lane.overlap(job(1, 2, p=0.25).uses) == 0.5
    assert lane.overlap((((1, 1.0),), ())) == 0


def test_overlap_buys_no_more_imbalance_than_the_bound(clock):
    one, two = lanes(clock)
    one.sent(job(1))
    ahead = 1
    while choose([one, two], job(1)) is one:
        one.sent(job(1))
        ahead += 1
    assert ahead == IMBALANCE + 1
    assert choose([one, two], job(1)) is two


def test_a_few_experts_more_are_not_worth_being_ahead(clock):
    one, two = lanes(clock, slots=100)
    experts = tuple(range(50))
    one.sent(job(*experts[:25]))
    two.sent(job(*experts[:24]))
    one.sent(job())
    assert choose([one, two], job(*experts)) is two
    one.sent(job(*experts[:40]))
    assert choose([one, two], job(*experts)) is one


def test_a_long_batch_weighs_more_than_a_short_one(clock):
    one, two = lanes(clock)
    one.sent(job(tokens=100))
    two.sent(job(tokens=10))
    two.sent(job(tokens=10))
    assert choose([one, two], job()) is two


def shares(clock: Clock, paces: list[float], batches: int = 60) -> list[int]:
    """How many of so many batches each gets, each needing so many seconds for one."""
    every = lanes(clock, len(paces))
    ends = [0.0] * len(paces)
    counts = [0] * len(paces)
    left = batches
    while left or any(lane.under_way for lane in every):
        while left and (lane := choose(every, job())) is not None:
            number = every.index(lane)
            if not lane.under_way:
                ends[number] = clock.now + paces[number]
            lane.sent(job())
            counts[number] += 1
            left -= 1
        number = min((n for n, lane in enumerate(every) if lane.under_way), key=lambda n: ends[n])
        clock.now = max(clock.now, ends[number])
        every[number].answered(1.0)
        ends[number] = clock.now + paces[number]
    return counts


def test_equally_quick_ones_get_equally_many(clock):
    counts = shares(clock, [1.0, 1.0, 1.0])
    assert sum(counts) == 60 and max(counts) - min(counts) <= 2 * IMBALANCE


def test_a_slow_one_gets_less(clock):
    quick, slow = shares(clock, [1.0, 4.0])
    assert quick + slow == 60
    assert slow <= 60 / 5 + 2 * IMBALANCE
    assert slow >= 2


def test_one_that_does_not_answer_any_more_gets_nothing_more(clock):
    one, two = lanes(clock)
    for lane in (one, two):
        lane.sent(job())
    clock.now += 1
    for lane in (one, two):
        lane.answered(1.0)
    one.sent(job(1, 2))
    clock.now += 60
    for _ in range(8):
        assert choose([one, two], job(1, 2)) is two
        two.sent(job(1, 2))
        answer(two, clock, 1.0)


def test_nobody_is_sent_more_than_the_look_ahead_and_the_bound(clock):
    every = lanes(clock, lookahead=3)
    sent = 0
    while (lane := choose(every, job())) is not None:
        lane.sent(job())
        sent += 1
    assert sent == 2 * (3 + 1 + IMBALANCE)


def test_choosing_by_experts_moves_fewer_of_them():
    """Two kinds of batches, in an order that gives the least busy one now the one, now the other."""
    kinds = [[[(0, expert) for expert in range(start, start + 4)]] for start in (0, 4)]
    order = [int(bit) for bit in "011010011001011010010110011010010110100110010110"]
    batch = job().batch
    batches, used = [batch] * len(order), [kinds[kind] for kind in order]
    blind, informed = (moves(batches, used, 2, 4, known) for known in (False, True))
    assert informed[0] < 0.5 * blind[0]
    assert informed[1] <= 1.15
