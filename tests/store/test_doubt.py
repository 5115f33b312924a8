"""Routers are asked while tables do worse than none would, and no longer; then moves are those of a cache on demand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from store.doubt import LEAST, PATIENCE, ROUNDS, Doubt
from store.eviction import LRU
from store.foresight import LookAhead
from store.simulator import Tables, Uses
from tests.store.at_once import AtOnce, play

EXPERTS, LAYERS, USED = 40, 2, 8
Says = Callable[[random.Random, list[int]], list[tuple[int, float]]]


def heard(doubt: Doubt, uses: int, says: Callable[[list[int]], set[int]], favourites: int = 20, seed: int = 0) -> None:
    """Layers that use experts of so few; those that no table named are read in place."""
    rng = random.Random(seed)
    for _ in range(uses // USED):
        used = rng.sample(range(favourites), USED)
        named = says(used)
        for _ in named:
            doubt.copied()
        doubt.heard(0, used, named, len([expert for expert in used if expert not in named]))


def nobody(used: list[int]) -> set[int]:
    return set()


def test_tables_that_are_mostly_right_are_not_questioned_though_all_they_name_is_copied_again_and_again():
    doubt = Doubt(20, LRU)
    heard(doubt, 10 * LEAST, lambda used: {*used})
    assert not doubt.asks
    heard(doubt, 10 * LEAST, lambda used: {*used[:-1], 39} if used[0] % 2 else {*used})
    assert not doubt.asks


def test_once_a_cache_would_have_moved_less_routers_are_asked_until_tables_are_mostly_right():
    doubt = Doubt(20, LRU)
    heard(doubt, LEAST, nobody)
    assert not doubt.asks, "the cache has only been filled"
    heard(doubt, LEAST + USED, nobody)
    assert doubt.asks
    heard(doubt, 20 * LEAST, lambda used: {*used[:6]})  # better, not good
    assert doubt.asks
    heard(doubt, 20 * LEAST, lambda used: {*used, *range(30, 34)})  # all of them, and others
    assert doubt.asks
    heard(doubt, 20 * LEAST, lambda used: {*used})
    assert not doubt.asks
    heard(doubt, 4 * LEAST, nobody)
    assert doubt.asks, "and again"


def test_tables_have_a_chance_again_at_ever_longer_intervals():
    doubt = Doubt(20, LRU)
    asked = []
    for seed in range(8 * PATIENCE):
        heard(doubt, LEAST, nobody, seed=seed)  # a window
        asked.append(doubt.asks)
    spans = [(asks, len([*span])) for asks, span in itertools.groupby(asked)]
    assert spans[:-1] == [
        (False, 1),
        (True, PATIENCE),
        (False, 2),
        (True, 2 * PATIENCE),
        (False, 2),
        (True, 4 * PATIENCE),
        (False, 2),
    ]


def test_tables_that_were_doubted_for_an_odd_moment_are_heeded_again():
    doubt = Doubt(20, LRU)
    heard(doubt, 2 * LEAST, nobody)
    assert doubt.asks
    heard(doubt, (PATIENCE - 1) * LEAST, lambda used: {*used[:7]})  # not mostly right; but no cache would move less
    assert doubt.asks
    for _ in range(LEAST // USED * 20):
        doubt.heard(0, range(USED), {*range(USED - 1)}, 0)  # all in slots
    assert not doubt.asks


def test_where_a_cache_would_do_no_better_nothing_is_asked():
    doubt = Doubt(4, LRU)  # and one that has gone comes again after forty uses
    for used in itertools.islice(itertools.cycle([range(start, start + USED) for start in range(0, EXPERTS, USED)]), 1000):
        doubt.heard(0, used, set(), USED)
    assert not doubt.asks


@pytest.mark.parametrize(("policy", "asks"), [(LRU, False), (LookAhead, True)])
def test_what_asking_would_move_is_what_the_policy_would(policy, asks):
    """Some experts come in every batch, behind many that come seldom: the least recently used is the wrong one to go."""
    doubt = Doubt(8, policy)
    seldom = itertools.cycle(range(EXPERTS))
    for _ in range(200):
        doubt.heard(0, range(4), set(), 4)
        for layer in (1, 2, 3):
            doubt.heard(layer, [*itertools.islice(seldom, 4)], set(), 4)
        doubt.finished()
    assert doubt.asks == asks


def test_without_slots_nobody_is_asked():
    doubt = Doubt(0, LRU)
    heard(doubt, 10 * LEAST, nobody)
    assert not doubt.asks


def test_wrong_names_cost_what_their_copies_cost():
    doubts = [Doubt(20, LRU), Doubt(20, LRU)]
    for doubt, copies in zip(doubts, (0, 1), strict=True):
        for _ in range(4 * LEAST // USED):
            for _ in range(copies * USED):
                doubt.copied()
            doubt.heard(0, range(USED), {*range(6)}, 0)  # all of them are in slots
    assert [doubt.asks for doubt in doubts] == [False, True]


def test_more_slots_are_watched_for_longer():
    doubt = Doubt(LEAST, LRU)
    heard(doubt, 2 * ROUNDS * LEAST - USED, nobody)
    assert not doubt.asks
    heard(doubt, 2 * USED, nobody)
    assert doubt.asks


# With the engine of a GPU under it


def history(batches: int, says: Says) -> tuple[Uses, Tables]:
    """Batches whose experts are some of a few favourites of the layer, which wander."""
    rng = random.Random(1)
    uses, tables = [], []
    for batch in range(batches):
        first = batch // 100
        used = [[(first + int(18 * rng.random() ** 2)) % EXPERTS for _ in range(2 * USED)] for _ in range(LAYERS)]
        uses.append([sorted({*layer}) for layer in used])
        tables.append([says(rng, layer) for layer in uses[-1]])
    return uses, tables


def by_chance(rng: random.Random, used: list[int]) -> list[tuple[int, float]]:
    return [(expert, 1.0) for expert in rng.sample(range(EXPERTS), USED)]


def half_right(rng: random.Random, used: list[int]) -> list[tuple[int, float]]:
    return [(expert if rng.random() < 0.6 else rng.randrange(EXPERTS), 1.0) for expert in used]


def silent(rng: random.Random, used: list[int]) -> list[tuple[int, float]]:
    return []


@pytest.mark.parametrize("policy", ["lru", "lookahead"])
@pytest.mark.parametrize("says", [by_chance, half_right, silent])
def test_bad_tables_move_no_more_than_none(says, policy):
    uses, tables = history(400, says)
    experts, slots = [EXPERTS] * LAYERS, 24
    none, _ = play(experts, slots, "lru", uses, None)
    without, _ = play(experts, slots, policy, uses, tables, may_doubt=False)
    moves, asked = play(experts, slots, policy, uses, tables)
    assert not any(asked[:50]) and all(asked[200:])
    assert sum(without[200:]) > 1.1 * sum(none[200:]), "or there is nothing to mend"
    assert sum(moves[200:]) <= 1.01 * sum(none[200:])


def test_right_tables_move_what_they_did():
    uses, tables = history(400, lambda rng, used: [(expert, 1.0) for expert in used])
    ours, others = (play([EXPERTS] * LAYERS, 24, "lookahead", uses, tables, may_doubt=doubts) for doubts in (True, False))
    assert ours == others and not any(ours[1])


def test_tables_that_get_better_are_heeded_again():
    uses, tables = history(800, lambda rng, used: [(expert, 1.0) for expert in used])
    bad = history(800, by_chance)[1]
    moves, asked = play([EXPERTS] * LAYERS, 24, "lookahead", uses, [*bad[:300], *tables[300:]])
    assert asked[299] and not any(asked[-300:])
    always, _ = play([EXPERTS] * LAYERS, 24, "lru", uses, None)
    assert sum(moves[-300:]) < 0.95 * sum(always[-300:])


def test_a_batch_whose_table_was_not_heeded_asks_also_when_trust_is_back():
    engine = AtOnce([4, 4], 2, "lookahead", may_doubt=True)
    assert engine._doubt is not None
    engine.plan(0, [[(0, 1.0)], []])
    engine._doubt.asks = True
    engine.plan(1, [[(1, 1.0)], []])
    assert [engine.is_doubted(batch) for batch in range(3)] == [True] * 3
    engine._doubt.asks = False
    engine.plan(2, [[(2, 1.0)], []])
    assert [engine.is_doubted(batch) for batch in range(3)] == [False, True, False]
    assert [engine.slots.is_ready((0, expert)) for expert in range(3)] == [True, False, True]
    engine.run(0, [[0], []], asks=False)
    engine.run(1, [[1], []], asks=True)
    assert not engine._unheeded and not engine.is_doubted(1)


def test_who_does_not_ask_does_not_doubt():
    engine = AtOnce([4], 2, "lookahead", may_doubt=False)
    for batch in range(3 * LEAST):
        engine.plan(batch, [[(3, 1.0)]])
        assert not engine.is_doubted(batch)
        engine.run(batch, [[batch % 2]], asks=False)
