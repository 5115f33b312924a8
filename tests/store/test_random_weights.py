"""Weights from a seed: the same bytes whoever makes them and when, spread as asked, and an arena of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from store import load as loading
from store.actor import ExpertStore
from store.arena import Arena
from store.errors import CheckpointError
from store.load import Placement, load, routers_identity
from store.random_weights import CHUNK, QUANTILES, RandomTensor, RandomWeights

FILE = Path("models/some.json")
EXPERTS = 6
TENSORS = {f"e{i}.w": RandomTensor((40, 30), 0.0, 0.02) for i in range(EXPERTS)} | {
    "router": RandomTensor((EXPERTS, 30), 0.0, 0.02),
    "embedding": RandomTensor((CHUNK // 100, 333), 0.0, 1.0),
    "norm": RandomTensor((30,), 1.0, 0.0),
    "bias": RandomTensor((7,), 0.0, 0.0),
}
PLACEMENT = Placement(
    experts=(tuple({"w": f"e{i}.w"} for i in range(EXPERTS)),),
    backbone={"norm": "norm", "embedding": "embedding", "bias": "bias"},
    dtype="float32",
    routers=("router",),
)


def weights(seed: int = 0, dtype: torch.dtype = torch.float32, **changed: RandomTensor) -> RandomWeights:
    return RandomWeights(FILE, TENSORS | changed, dtype, seed)


def contents(made: RandomWeights, names: list[str]) -> dict[str, bytes]:
    return {name: made.read(name).view(-1).view(torch.uint8).numpy().tobytes() for name in names}


# the same bytes


def test_a_seed_gives_the_bytes_that_it_gave_on_every_machine_so_far():
    """If this fails because the numbers were changed on purpose, raise FORMAT: arenas of the old ones may be about."""
    seen = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = weights(7, dtype)
        seen[str(dtype)] = hashlib.sha256(b"".join(contents(made, sorted(TENSORS)).values())).hexdigest()[:16]
    assert seen == {"torch.float32": "b72f256bec84f157", "torch.bfloat16": "bc9318916def64cf", "torch.float16": "7e7f3a9ffb1e83b4"}


def test_neither_order_nor_threads_nor_the_process_change_a_byte():
    names = sorted(TENSORS)
    expected = contents(weights(), names)
    shuffled = random.Random(0).sample(names, len(names))
    assert contents(weights(), shuffled) == expected
    assert contents(pickle.loads(pickle.dumps(weights())).open(), names) == expected
    made = weights()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda name: contents(made, [name]), shuffled * 4):
            assert found.items() <= expected.items()


def test_other_tensors_do_not_change_a_tensor():
    alone = RandomWeights(FILE, {"e3.w": TENSORS["e3.w"]}, torch.float32, 0)
    assert contents(alone, ["e3.w"]) == contents(weights(), ["e3.w"])


def test_seeds_and_names_give_numbers_that_have_nothing_to_do_with_each_other():
    shape = RandomTensor((100_000,), 0.0, 1.0)
    rows = [weights(seed, **{name: shape}).read(name) for seed in (0, 1) for name in ("a", "b")]
    correlations = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlations.abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_holds_the_same_numbers_rounded(dtype):
    exact = weights().read("embedding")
    rounded = weights(dtype=dtype).read("embedding")
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))
    widened = torch.empty_like(exact)
    weights(dtype=dtype).read_into("embedding", widened)  # an arena of float32 for a model that counts as stored in less
    assert torch.equal(widened, rounded.float())


# spread as asked


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.03), (2.0, 0.5)])
def test_numbers_are_normal(mean, std):
    found = weights(x=RandomTensor((1000, 1001), mean, std)).read("x").double()
    assert found.mean().item() == pytest.approx(mean, abs=4 * std / 1000)
    assert found.std().item() == pytest.approx(std, rel=0.005)
    z = ((found - mean) / std).flatten()
    for bound, share in ((-2.0, 0.02275), (-1.0, 0.15866), (0.0, 0.5), (1.0, 0.84134), (3.0, 0.99865)):
        assert (z < bound).double().mean().item() == pytest.approx(share, abs=0.002)
    assert 4 < z.abs().max() < 4.5


def test_every_quantile_comes_as_often_as_any_other():
    found = weights(x=RandomTensor((100 * QUANTILES,), 0.0, 1.0)).read("x")
    _, counts = np.unique(found.numpy(), return_counts=True)
    assert len(counts) > 0.99 * QUANTILES  # near zero some share a number
    assert np.percentile(counts, 1) > 70


def test_no_part_of_a_large_tensor_repeats_another():
    found = weights(x=RandomTensor((3, CHUNK), 0.0, 1.0)).read("x")
    assert torch.corrcoef(found).fill_diagonal_(0).abs().max() < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 5, CHUNK - 1, CHUNK, CHUNK + 1])
def test_tensors_of_any_length_are_filled_to_the_end(count):
    made = weights(x=RandomTensor((count,), 0.0, 1.0), y=RandomTensor((), 0.0, 1.0))
    out = torch.full((count,), float("nan"))
    made.read_into("x", out)
    assert out.isfinite().all()
    assert made.read("y").shape == ()


def test_without_a_spread_all_is_the_mean():
    assert weights().read("norm").unique().tolist() == [1.0]
    assert weights().read("bias").unique().tolist() == [0.0]


def test_a_tensor_that_the_model_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match=r"models/some\.json: its model has no tensor e9\.w"):
        weights().info("e9.w")


# what names the arena


def test_the_fingerprint_changes_with_the_seed_the_dtype_and_every_tensor():
    other = RandomTensor((40, 30), 0.0, 0.03)
    made = [
        weights(), weights(1), weights(dtype=torch.bfloat16), weights(more=other),
        weights(**{"e0.w": other}), weights(**{"e0.w": RandomTensor((30, 40), 0.0, 0.02)}),
    ]  # fmt: skip
    assert len({m.fingerprint for m in made}) == len({m.sample() for m in made}) == len(made)
    again = RandomWeights(Path("elsewhere.json"), dict(reversed(TENSORS.items())), torch.float32, 0)
    assert (again.fingerprint, again.sample()) == (made[0].fingerprint, made[0].sample())


def test_the_identity_for_predictors_is_the_routers_whatever_the_arenas_dtype():
    identity = routers_identity(weights(), PLACEMENT)
    assert routers_identity(weights(**{"e0.w": RandomTensor((40, 30), 0.0, 1.0)}), PLACEMENT) == identity
    assert routers_identity(weights(), dataclasses.replace(PLACEMENT, dtype="bfloat16")) == identity
    assert routers_identity(weights(1), PLACEMENT) != identity


# into an arena


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("readers", [1, 8])
def test_an_arena_holds_every_tensor_however_many_threads_fill_it(arena_dir, monkeypatch, dtype, readers):
    monkeypatch.setattr(loading, "MAX_READERS", readers)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    made, placement = weights(), dataclasses.replace(PLACEMENT, dtype=dtype)
    before, steps = torch.get_num_threads(), []
    arena = load(placement.arena_path(made, arena_dir), made, placement, steps.append)
    assert torch.get_num_threads() == before
    assert sum(steps) == arena.layout.expert_bytes + arena.layout.backbone_bytes
    for i in range(EXPERTS):
        found = arena.layout.layers[0].block.views(arena.block(0, i))["w"]
        assert torch.equal(found, made.read(f"e{i}.w").to(getattr(torch, dtype)))
    for name, tensor in arena.backbone().items():
        assert torch.equal(tensor, made.read(name).to(getattr(torch, dtype)))
    assert arena.identity == routers_identity(made, PLACEMENT)


def test_the_store_builds_it_finds_it_warm_and_a_restarted_one_makes_no_number_again(arena_dir, monkeypatch):
    source = pickle.loads(pickle.dumps(weights()))
    path = PLACEMENT.arena_path(source, arena_dir)
    first = ExpertStore(path, source, PLACEMENT)
    built = first.open()
    assert built.warm_start is False
    monkeypatch.setattr(RandomWeights, "read_into", lambda *_: pytest.fail("made again"))
    found = ExpertStore(path, source, PLACEMENT).open()
    assert (found.warm_start, found.path, found.identity) == (True, built.path, built.identity)


class GivenUp(Exception):
    """By whoever is told of progress."""


def test_a_build_that_is_given_up_leaves_nothing_and_no_thread_that_still_writes(arena_dir):
    made = weights()

    def stop(nbytes: int) -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        load(PLACEMENT.arena_path(made, arena_dir), made, PLACEMENT, stop)
    assert list(arena_dir.iterdir()) == []
    assert Arena.attach(PLACEMENT.arena_path(made, arena_dir)) is None
