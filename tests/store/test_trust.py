"""What tables say is believed as far as it has come true."""

from __future__ import annotations

import random

import pytest

from store.trust import Trust

EXPERTS = 40


def told(trust: Trust, batches: int, used: int, says, seed: int = 0) -> None:
    """Batches that each use so many experts by chance; `says(rng, used)` is their table."""
    rng = random.Random(seed)
    for _ in range(batches):
        truth = set(rng.sample(range(EXPERTS), used))
        trust.learn(0, says(rng, truth), truth)


def test_who_is_always_right_is_believed_to_the_last_digit():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)
    said = [(3, 1.0), (5, 0.999999), (7, 0.95)]
    assert trust.worth(0, said) == said
    told(trust, 100, 10, lambda rng, truth: [(expert, 0.999999) for expert in truth])
    assert trust.worth(0, said) == said


def test_who_is_right_more_often_than_it_says_is_believed_more():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)
    told(trust, 200, 8, lambda rng, truth: [(expert, 0.6) for expert in truth])
    ((_, probability),) = trust.worth(0, [(1, 0.6)])
    assert 0.95 < probability <= 1


def test_who_guesses_is_believed_no_more():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)
    said = [(3, 1.0), (5, 1.0)]
    told(trust, 50, 8, lambda rng, truth: [(rng.randrange(EXPERTS), 1.0) for _ in range(10)])
    assert trust.worth(0, said) == []
    told(trust, 300, 8, lambda rng, truth: [(expert, 1.0) for expert in truth])
    assert len(trust.worth(0, said)) == 2, "and again when it has got better"


def test_each_degree_of_sureness_is_judged_apart():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)
    told(trust, 200, 8, lambda rng, truth: [(expert, 1.0) for expert in truth] + [(rng.randrange(EXPERTS), 0.7)])
    ((expert, probability),) = trust.worth(0, [(1, 1.0), (2, 0.7)])
    assert (expert, probability) == (1, 1.0)


def test_probabilities_that_come_true_stay_as_they_are_and_others_become_what_they_are_worth():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)

    def half(rng, truth):
        return [(rng.choice(sorted(truth)) if rng.random() < 0.5 else -1, 0.8)]

    told(trust, 600, 4, half)
    ((_, probability),) = trust.worth(0, [(1, 0.8)])
    assert probability == pytest.approx(0.5, abs=0.06)


def test_a_name_that_says_no_more_than_that_most_experts_are_used_says_nothing_unless_it_is_sure():
    trust = Trust([EXPERTS], least=0.3, sure=0.9)
    told(trust, 200, 28, lambda rng, truth: [])  # seven tenths of them
    assert trust.worth(0, [(1, 0.7)]) == []
    assert trust.worth(0, [(1, 0.9)]) == [(1, 0.9)]
    every = Trust([EXPERTS], least=0.5, sure=0.5)  # a GPU's: a copy ahead is worth it all the same
    told(every, 200, 28, lambda rng, truth: [])
    assert every.worth(0, [(1, 0.7)]) == [(1, 0.7)]


def test_layers_are_judged_apart():
    trust = Trust([EXPERTS, EXPERTS], least=0.3, sure=0.9)
    told(trust, 50, 8, lambda rng, truth: [(rng.randrange(EXPERTS), 1.0) for _ in range(10)])
    assert trust.worth(0, [(3, 1.0)]) == [] and trust.worth(1, [(3, 1.0)]) == [(3, 1.0)]
