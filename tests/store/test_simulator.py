"""The simulator beside the copy engine that it stands for, and beside what can be counted by hand."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.bench.limit import fewest_moves
from store.copies import CopyEngine
from store.eviction import POLICIES
from store.movement import Movement
from store.simulator import Moves, Tables, Uses, layout_of, simulate, simulate_on_demand, simulate_one_by_one
from store.slots import Slots
from tests.store.lane_model import make_arena

LAYERS, EXPERTS, BLOCK = 3, 12, 256
LAYOUT = layout_of([EXPERTS] * LAYERS, BLOCK)


def history(seed: int, batches: int = 40) -> Uses:
    """Some experts are used more often than others."""
    rng = random.Random(seed)
    return [
        [sorted({min(EXPERTS - 1, int(rng.expovariate(0.3))) for _ in range(rng.randint(1, 8))}) for _ in range(LAYERS)]
        for _ in range(batches)
    ]


def tables_of(uses: Uses, seed: int, right: float = 1.0) -> Tables:
    """Tables that name the experts used; some names are wrong, and some uncertain, unless all are right."""
    rng = random.Random(seed)

    def named(experts) -> list[tuple[int, float]]:
        if right == 1:
            return [(expert, 1.0) for expert in experts]
        wrong = {expert if rng.random() < right else rng.randrange(EXPERTS) for expert in experts}
        return sorted(((expert, rng.choice((0.3, 0.6, 0.9, 1.0))) for expert in wrong), key=lambda use: -use[1])

    return [[named(experts) for experts in batch] for batch in uses]


def by_the_engine(policy: str, slots: int, uses: Uses, tables: Tables, lookahead: int) -> list[Movement]:
    """Real slots, real bytes."""
    arena = make_arena([(EXPERTS, BLOCK)] * LAYERS)
    engine = CopyEngine(arena, Slots(arena, slots, torch.device("cpu")), POLICIES[policy](), background=False)
    moved = []
    for planned in range(len(uses) + lookahead):
        if planned < len(uses):
            engine.plan(planned, tables[planned])
        if (batch := planned - lookahead) >= 0:
            for layer, experts in enumerate(uses[batch]):
                with engine.reading(batch, layer, experts) as blocks:
                    for at, block in blocks:
                        assert torch.equal(block["w"], arena.block(layer, experts[at]))
            engine.finish(batch)
            moved.append(engine.take())
    return moved


def counts(moved: list[Movement]) -> list[tuple]:
    return [(m.hits, m.misses, m.prefetch_bytes, m.read_in_place_bytes, m.resident, m.resident_peak_bytes) for m in moved]


@pytest.mark.parametrize("right", [1.0, 0.6])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_batch_hits_and_moves_as_in_the_copy_engine(policy, right):
    for seed, (slots, lookahead) in enumerate([(0, 2), (1, 1), (4, 3), (9, 6), (20, 12), (36, 4)]):
        uses = history(seed)
        tables = tables_of(uses, seed, right)
        expected = by_the_engine(policy, slots, uses, tables, lookahead)
        assert counts(simulate(LAYOUT, slots, policy, uses, tables, lookahead)) == counts(expected)


def test_what_a_history_cost_adds_up():
    uses = history(1)
    moves = Moves.of(simulate(LAYOUT, 9, "lru", uses, tables_of(uses, 1, 0.6), 3))
    assert moves.uses == moves.hits + moves.misses == sum(len(layer) for batch in uses for layer in batch)
    assert moves.moves == moves.copies + moves.misses
    assert moves.nbytes == moves.moves * BLOCK
    assert min(moves.hits, moves.misses, moves.copies) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_moves_fewer_than_perfect_foresight(policy):
    for seed, slots in enumerate((1, 5, 12, 30)):
        uses = history(seed)
        fewest = fewest_moves([[(i, e) for e in layer] for batch in uses for i, layer in enumerate(batch)], slots, rounds=1)
        for right in (1.0, 0.6):
            assert Moves.of(simulate(LAYOUT, slots, policy, uses, tables_of(uses, seed, right), 6)).moves >= fewest
        assert Moves.of(simulate_on_demand(LAYOUT, slots, policy, uses)).moves >= fewest


def test_on_demand_every_miss_moves_once_and_is_in_a_slot_if_there_is_room():
    uses = [[[0, 1], [0]], [[0, 1], [0]], [[2, 1], [0]]]
    moved = simulate_on_demand(layout_of([4, 4]), 3, "lru", uses)
    assert [m.hits for m in moved] == [[2, 1]] * 3  # copied before they run
    assert [m.prefetch_bytes // 256 for m in moved] == [3, 0, 1]
    crowded = simulate_on_demand(layout_of([4]), 2, "lru", [[[0, 1, 2]]])
    assert (crowded[0].hits, crowded[0].misses) == ([2], [1])


def copies_of(policy: str, slots: int, runs: list[list[int]]) -> list[int]:
    return [m.prefetch_bytes // 256 for m in simulate_one_by_one(layout_of([5]), slots, policy, runs)]


def test_one_by_one_the_papers_example_keeps_the_first_and_evicts_the_last():
    """Four experts, room for two, 1, 2 and 3 needed: 3 takes the place of 2, and the next batch finds 1."""
    assert copies_of("lifo", 2, [[1, 2, 3], [1]]) == [3, 0]
    assert copies_of("fifo", 2, [[1, 2, 3], [1]]) == [3, 1]


def test_one_by_one_fifo_and_lru_miss_all_of_a_set_that_does_not_fit_and_lifo_does_not():
    runs = [[0, 1, 2, 3]] * 10
    assert sum(copies_of("fifo", 3, runs)) == sum(copies_of("lru", 3, runs)) == 40
    fewest = fewest_moves([[(0, expert) for expert in run] for run in runs], 3, rounds=1)
    assert fewest <= sum(copies_of("lifo", 3, runs)) < 25


def test_one_by_one_lifo_gives_up_what_the_batch_does_not_use_before_what_it_does():
    assert copies_of("lifo", 3, [[0, 1, 2], [1, 2, 3], [1, 2, 3]]) == [3, 1, 0]
