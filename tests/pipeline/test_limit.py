"""The fewest moves, beside what trying every choice finds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import pytest

from pipeline.bench.limit import fewest_moves
from store.layout import Key


def fewest_by_trying(uses: Sequence[Sequence[Key]], slots: int, start: frozenset[Key] = frozenset()) -> int:
    """Behind every layer, all that may be in slots: any of those that were there and of those that it has read."""

    @cache
    def from_here(at: int, kept: frozenset[Key]) -> int:
        if at == len(uses):
            return 0
        have = kept.union(uses[at])
        choices = combinations(sorted(have), min(slots, len(have)))
        return len(have) - len(kept) + min(from_here(at + 1, frozenset(choice)) for choice in choices)

    return from_here(0, start)


def some_uses(seed: int) -> list[list[Key]]:
    """A few batches through two MoE layers."""
    rng = random.Random(seed)
    experts = rng.randint(2, 4)
    layers = rng.randint(1, 6)
    return [sorted((at % 2, e) for e in rng.sample(range(experts), rng.randint(1, min(3, experts)))) for at in range(layers)]


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_moves_fewer(seed):
    uses = some_uses(seed)
    sequence = [key for layer in uses for key in layer]
    for slots in range(len(set(sequence)) + 1):
        assert fewest_moves(uses, slots, rounds=1) == fewest_by_trying(uses, slots)


@pytest.mark.parametrize("seed", range(40))
def test_a_second_round_finds_what_the_first_has_left(seed):
    uses = some_uses(seed)
    sequence = [key for layer in uses for key in layer]
    for slots in range(len(set(sequence)) + 1):
        luckiest = min(fewest_by_trying(uses, slots, frozenset(start)) for start in combinations(set(sequence), slots))
        assert luckiest <= fewest_moves(uses, slots) <= fewest_moves(uses, slots, rounds=1)


def test_without_slots_every_use_is_a_move():
    uses = [[(0, 1), (0, 2)], [(1, 1)], [(0, 1)]]
    assert fewest_moves(uses, 0) == fewest_moves(uses, 0, rounds=1) == 4


def test_with_a_slot_for_every_expert_each_moves_once_and_then_never_again():
    uses = [[(0, 1), (0, 2)], [(1, 1)], [(0, 1)]]
    for slots in (3, 4, 100):
        assert fewest_moves(uses, slots, rounds=1) == 3
        assert fewest_moves(uses, slots) == 0


def test_an_expert_that_is_not_worth_keeping_empties_no_slot():
    """0 comes back and 1, 2, 3 do not: the one slot is its own, and in the second round it is still there."""
    uses = [[(0, 0)], [(0, 1)], [(0, 0)], [(0, 2)], [(0, 0)], [(0, 3)]]
    assert fewest_moves(uses, 1, rounds=1) == 4
    assert fewest_moves(uses, 1) == 3


def test_who_comes_may_have_the_slot_of_one_that_its_layer_has_read_whatever_their_numbers():
    assert fewest_moves([[(0, 1)], [(0, 0), (0, 1)], [(0, 0)]], 1, rounds=1) == 2
    assert fewest_moves([[(0, 0)], [(0, 0), (0, 1)], [(0, 1)]], 1, rounds=1) == 2


def test_the_same_expert_of_another_layer_is_another_expert():
    assert fewest_moves([[(0, 5)], [(1, 5)], [(0, 5)]], 1, rounds=1) == 2
