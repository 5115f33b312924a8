"""Stand-ins for matrices: near the matrices, as small as they say, and used by `linear` as the matrices would be."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from predictor import matrices
from predictor.matrices import LowRank, Quantised, Whole


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(stand_in, experts: int, columns: int) -> torch.Tensor:
    """The matrices that a stand-in amounts to, (experts, out, in)."""
    unit = torch.eye(columns).expand(experts, -1, -1)
    return linear(unit, stand_in.of(torch.arange(experts), torch.float32)).transpose(1, 2)


def test_a_low_rank_stand_in_is_the_best_of_its_rank():
    whole = random(4, 12, 20)
    found = dense(LowRank.make(whole, 5), 4, 20)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(found, (u[:, :, :5] * s[:, None, :5]) @ v[:, :5], atol=2e-2, rtol=1e-2)  # float16 factors


def test_large_matrices_get_nearly_the_best_without_all_their_singular_vectors(monkeypatch):
    monkeypatch.setattr(matrices, "SMALL", 16)
    decaying = random(2, 64, 48) @ torch.diag(0.9 ** torch.arange(48.0)) @ random(2, 48, 96, seed=1)
    found = dense(LowRank.make(decaying, 6), 2, 96)
    best = torch.linalg.svd(decaying).S[:, 6:].square().sum(dim=1).sqrt()
    error = (found - decaying).flatten(1).norm(dim=1)
    assert (error < 1.02 * best).all()
    assert torch.equal(LowRank.make(decaying, 6).tensors["up"], LowRank.make(decaying, 6).tensors["up"])  # chance is seeded


@pytest.mark.parametrize(("bits", "error"), [(2, 0.4), (4, 0.13)])
def test_a_quantised_stand_in_is_near_and_its_levels_are_few(bits, error):
    whole = random(3, 8, 64) * torch.tensor([0.01, 1, 30])[:, None, None]  # a step per row: size does not matter
    found = dense(Quantised.make(whole, bits), 3, 64)
    relative = (found - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    assert (relative < error).all()
    assert max(len(row.unique()) for row in found.reshape(-1, 64)) <= 2**bits


def test_a_row_of_zeros_stays_nearly_zero():
    assert dense(Quantised.make(torch.zeros(1, 2, 8), 4), 1, 8).abs().max() < 1e-5


@pytest.mark.parametrize("make", [lambda w: LowRank.make(w, 3), lambda w: Quantised.make(w, 2), lambda w: Quantised.make(w, 4)])
def test_the_experts_asked_for_are_multiplied_in_their_order_and_a_bias_is_added(make):
    whole, tokens, bias = random(5, 6, 8), random(2, 7, 8, seed=1), random(2, 1, 6, seed=2)
    stand_in, asked = make(whole), torch.tensor([4, 1])
    expected = torch.bmm(tokens, dense(stand_in, 5, 8)[asked].transpose(1, 2))
    torch.testing.assert_close(linear(tokens, stand_in.of(asked, torch.float32)), expected)
    torch.testing.assert_close(linear(tokens, stand_in.of(asked, torch.float32), bias), expected + bias)


@pytest.mark.parametrize("make", [lambda w: LowRank.make(w, 3), lambda w: Quantised.make(w, 2), lambda w: Quantised.make(w, 4)])
def test_transposed_it_is_multiplied_from_the_other_side_as_some_families_store_their_experts(make):
    whole, tokens, bias = random(5, 6, 8), random(2, 7, 6, seed=1), random(2, 1, 8, seed=2)
    stand_in, asked = make(whole).of(torch.tensor([4, 1]), torch.float32), torch.tensor([4, 1])
    expected = torch.bmm(tokens, dense(make(whole), 5, 8)[asked]) + bias
    torch.testing.assert_close(linear(tokens, stand_in.T, bias), expected)
    assert stand_in.T.dtype == stand_in.dtype == torch.float32
    torch.testing.assert_close(linear(random(2, 3, 8), stand_in.T.T), linear(random(2, 3, 8), stand_in))


def test_bytes_are_those_that_were_announced():
    for stand_in, announced in (
        (LowRank.make(random(4, 12, 20), 5), LowRank.nbytes((12, 20), 4, 5)),
        (Quantised.make(random(4, 12, 16), 2), Quantised.nbytes((12, 16), 4, 2)),
        (Quantised.make(random(4, 12, 16), 4), Quantised.nbytes((12, 16), 4, 4)),
    ):
        assert sum(t.numel() * t.itemsize for t in stand_in.tensors.values()) == announced


def test_gradients_reach_factors_that_are_trained():
    made = LowRank.make(random(4, 6, 8), 2)
    trained = LowRank({name: tensor.float().requires_grad_() for name, tensor in made.tensors.items()})
    linear(random(2, 3, 8), trained.of(torch.tensor([3, 0]), torch.float32)).sum().backward()
    gradient = trained.tensors["down"].grad
    assert gradient is not None
    assert gradient[[0, 3]].abs().sum() > 0 and gradient[[1, 2]].abs().sum() == 0


def test_what_is_no_matrix_is_kept_and_broadcasts_over_tokens():
    bias = random(4, 6)
    kept = Whole.make(bias).of(torch.tensor([2, 0]), torch.float32)
    assert kept.shape == (2, 1, 6)
    torch.testing.assert_close(kept[:, 0], bias[[2, 0]], atol=1e-3, rtol=1e-3)


def test_other_functions_of_torch_refuse_a_group_rather_than_guess():
    with pytest.raises(TypeError):
        torch.relu(LowRank.make(random(4, 6, 8), 2).of(torch.tensor([1]), torch.float32))
