"""HashTable: what it expects of the store, and how it is made of probabilities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from predictor.hash_table import HashTable, Width, from_probabilities, join, likeliest, split
from predictor.tokens import TokenBatch


def brute_force_uses(experts: np.ndarray, probability: np.ndarray) -> dict[int, float]:
    """Sums the probability of every way in which the tokens may choose: each one of its experts, or one outside its table."""
    uses = dict.fromkeys(experts.ravel().tolist(), 0.0)
    options = [
        [*zip(row.tolist(), p.tolist(), strict=True), (None, 1 - p.sum())] for row, p in zip(experts, probability, strict=True)
    ]
    for outcome in itertools.product(*options):
        chance = np.prod([p for _, p in outcome])
        for expert in {expert for expert, _ in outcome if expert is not None}:
            uses[expert] += chance
    return uses


def random_table(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    p = rng.dirichlet(np.full(experts, 0.7), tokens)
    best = np.argsort(-p, axis=1)[:, :top_k]
    return best.astype(np.int16), np.take_along_axis(p, best, 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_uses_are_the_probabilities_that_any_token_needs_an_expert(seed):
    layers = [random_table(np.random.default_rng([seed, layer]), tokens=5, experts=6, top_k=3) for layer in range(2)]
    experts, probability = zip(*layers, strict=True)
    table = HashTable(experts, probability, probability)
    for uses, (chosen, p) in zip(table.uses, layers, strict=True):
        expected = brute_force_uses(chosen, p.astype(np.float64))
        assert dict(uses) == pytest.approx(expected, abs=2e-6)


def test_uses_name_the_likeliest_expert_first_and_each_expert_once():
    experts, probability = random_table(np.random.default_rng(1), tokens=40, experts=16, top_k=4)
    (uses,) = HashTable((experts,), (probability,), (probability,)).uses
    named = [expert for expert, _ in uses]
    assert sorted(named) == np.unique(experts).tolist()
    chances = [p for _, p in uses]
    assert chances == sorted(chances, reverse=True)


def test_certain_experts_are_used_for_certain_and_impossible_ones_not():
    experts = np.array([[4, 2], [4, 0]], dtype=np.int16)
    probability = np.array([[1, 0], [1, 0]], dtype=np.float32)
    (uses,) = HashTable((experts,), (probability,), (probability,)).uses
    assert uses[0] == (4, pytest.approx(1, abs=2e-6))
    assert dict(uses)[2] == 0
    assert dict(uses)[0] == 0


def test_from_probabilities_keeps_the_most_probable_in_order_and_shares_the_scaling_factor():
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.full(12, 0.5), 30).astype(np.float32)
    alpha = rng.uniform(0.1, 0.9, 30).astype(np.float32)
    table = from_probabilities([p], [alpha], Width(4))
    for token in range(30):
        best = sorted(range(12), key=lambda expert: -p[token, expert])[:4]
        assert table.experts[0][token].tolist() == best
        kept = p[token, best]
        np.testing.assert_array_equal(table.probability[0][token], kept)
        np.testing.assert_allclose(table.scaling[0][token], alpha[token] * kept / kept.sum(), rtol=1e-5)
    assert [array[0].dtype for array in (table.experts, table.probability, table.scaling)] == [np.int16, np.float32, np.float32]


@pytest.mark.parametrize("top_k", [5, 6, 50])
def test_from_probabilities_gives_all_experts_when_there_are_no_more_than_top_k(top_k):
    p = np.random.default_rng(3).dirichlet(np.ones(5), 7).astype(np.float32)
    table = from_probabilities([p], [np.ones(7, np.float32)], Width(top_k))
    np.testing.assert_array_equal(table.experts[0], np.argsort(-p, axis=1))
    np.testing.assert_allclose(table.scaling[0].sum(axis=1), 1, rtol=1e-5)


def test_layers_may_have_different_numbers_of_experts_and_tokens():
    rng = np.random.default_rng(4)
    p = [rng.dirichlet(np.ones(n), tokens).astype(np.float32) for n, tokens in ((8, 5), (2, 3))]
    table = from_probabilities(p, [np.ones(5, np.float32), np.ones(3, np.float32)], Width(3))
    assert [experts.shape for experts in table.experts] == [(5, 3), (3, 2)]


def test_a_token_of_which_nothing_is_known_has_no_scaling_rather_than_nan():
    table = from_probabilities([np.zeros((1, 4), np.float32)], [np.ones(1, np.float32)], Width(2))
    np.testing.assert_array_equal(table.scaling[0], [[0, 0]])


def test_when_the_table_is_the_routing_every_expert_it_names_is_needed():
    experts, probability = random_table(np.random.default_rng(5), tokens=6, experts=8, top_k=2)
    table = HashTable((experts,), (probability,), (probability,))
    assert dict(table.uses_under("hash")[0]) == dict.fromkeys(np.unique(experts).tolist(), 1.0)


def shares(tokens: int, experts: int, seed: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(experts, 0.4), tokens).astype(np.float32)


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.99])
def test_with_a_mass_each_token_gets_as_few_experts_as_come_to_it(mass):
    p = shares(50, 12)
    experts, probability = likeliest(p, Width(12, mass))
    for token in range(50):
        named = experts[token][experts[token] >= 0]
        ordered = np.sort(p[token])[::-1]
        assert len(named) == np.searchsorted(np.cumsum(ordered), mass) + 1
        np.testing.assert_array_equal(probability[token][: len(named)], ordered[: len(named)])
        assert (probability[token][len(named) :] == 0).all()
    assert (experts >= 0).any(axis=0).all()  # no column of nothing


def test_with_a_mass_no_token_gets_more_than_top_k_and_each_gets_one():
    p = np.vstack([shares(20, 12), np.full((1, 12), 1 / 12, np.float32)])
    experts, _ = likeliest(p, Width(3, 0.9))
    assert experts.shape[1] == 3
    assert (likeliest(p, Width(3, 1e-9))[0] >= 0).sum(axis=1).tolist() == [1] * 21


def test_what_has_to_be_first_is_first_and_stays_whatever_the_mass():
    p = shares(30, 8)
    first = p.argmin(axis=1)[:, None]
    experts, probability = likeliest(p, Width(4, 0.01), first)
    np.testing.assert_array_equal(experts[:, 0], first[:, 0])
    np.testing.assert_array_equal(probability[:, 0], p.min(axis=1))


@pytest.mark.parametrize("most", [1, 5, 9])
def test_with_a_limit_the_unlikeliest_to_be_needed_are_left_out_but_never_a_tokens_first(most):
    p = shares(6, 16)
    experts, _ = likeliest(p, Width(16, 0.99, most))
    wide, probability = likeliest(p, Width(16, 0.99))
    uses = [expert for expert, _ in HashTable((wide,), (probability,), (probability,)).uses[0]]
    kept = {*uses[:most]}
    for token in range(6):
        expected = [e for i, e in enumerate(wide[token].tolist()) if e >= 0 and (i == 0 or e in kept)]
        assert sorted(e for e in experts[token].tolist() if e >= 0) == sorted(expected)


def test_uses_know_no_expert_that_is_none():
    experts = np.array([[3, 1], [3, -1]], dtype=np.int16)
    probability = np.array([[0.5, 0.4], [0.5, 0]], dtype=np.float32)
    table = HashTable((experts,), (probability,), (probability,))
    assert [expert for expert, _ in table.uses[0]] == [3, 1]
    assert dict(table.uses[0])[3] == pytest.approx(0.75)
    assert [expert for expert, _ in table.uses_under("hash")[0]] == [1, 3]


def test_a_table_taken_apart_by_rows_is_put_together_again():
    """Two MoE layers, each with a stream of its own."""
    rng = np.random.default_rng(0)
    lengths = ((3, 1, 4), (2, 5, 1))
    tokens = TokenBatch(tuple(tuple(rng.integers(0, 9, n) for n in stream) for stream in lengths))
    layers = [random_table(rng, sum(stream), experts=6, top_k=2) for stream in lengths]
    experts, probability = zip(*layers, strict=True)
    whole = HashTable(experts, probability, probability)
    rows = split(whole, tokens, (0, 1))
    assert [[len(layer) for layer in row.experts] for row in rows] == [list(pair) for pair in zip(*lengths, strict=True)]
    again = join(rows)
    for name in ("experts", "probability", "scaling"):
        for mine, theirs in zip(getattr(again, name), getattr(whole, name), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    swapped = join([rows[2], rows[0]])
    np.testing.assert_array_equal(swapped.experts[0], np.concatenate([experts[0][4:], experts[0][:3]]))


def test_tables_of_different_widths_are_joined_with_none_in_the_narrower():
    rng = np.random.default_rng(1)
    narrow, wide = ((random_table(rng, 3, experts=6, top_k=k)) for k in (1, 3))
    tables = [HashTable((experts,), (probability,), (probability,)) for experts, probability in (narrow, wide)]
    joined = join(tables)
    assert joined.experts[0].shape == (6, 3)
    assert (joined.experts[0][:3, 1:] == -1).all() and (joined.probability[0][:3, 1:] == 0).all()
    np.testing.assert_array_equal(joined.experts[0][3:], wide[0])
    assert joined.experts[0].dtype == narrow[0].dtype
    used = dict(joined.uses[0])
    assert set(used) == {*narrow[0].ravel().tolist(), *wide[0].ravel().tolist()}
