"""From checkpoint to arena: every tensor in its block, nothing held twice, and a name that says which checkpoint it is."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from store.arena import Arena
from store.checkpoint import INDEX, SINGLE, Checkpoint
from store.errors import CheckpointError, SpaceError
from store.load import Placement, load, routers_identity

LAYERS, EXPERTS = 2, 3
PLACEMENT = Placement(
    experts=tuple(
        tuple({"up": f"l{layer}.e{e}.up.weight", "down": f"l{layer}.e{e}.down.weight"} for e in range(EXPERTS))
        for layer in range(LAYERS)
    ),
    backbone={"norm.weight": "ln.weight", "positions": "positions", "scale": "scale"},
    dtype="float32",
    routers=("l0.router", "l1.router"),
)


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint that `PLACEMENT` understands, and a tensor more, as checkpoints have."""
    torch.manual_seed(seed)
    made = {name: torch.randn(8 * (i + 1), 5) for i, layer in enumerate(PLACEMENT.experts) for e in layer for name in e.values()}
    made |= {
        "ln.weight": torch.randn(5),
        "scale": torch.tensor(2.5),
        "l0.router": torch.randn(3, 5),
        "l1.router": torch.randn(3, 5),
    }
    made |= {"unused": torch.randn(7)}
    return {name: t.to(dtype) for name, t in made.items()} | {"positions": torch.arange(-3, 9)}


def save(directory: Path, made: dict[str, torch.Tensor], shards: int = 1) -> Path:
    directory.mkdir(exist_ok=True)
    if shards == 1:
        save_file(made, directory / SINGLE)
        return directory
    weight_map = {}
    for i in range(shards):
        part = {name: made[name] for name in sorted(made)[i::shards]}
        save_file(part, directory / f"{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def in_arena(directory: Path, arenas: Path, placement: Placement = PLACEMENT, progress=lambda nbytes: None) -> Arena:
    checkpoint = Checkpoint(directory)
    return load(placement.arena_path(checkpoint, arenas), checkpoint, placement, progress)


def check_experts(arena: Arena, placement: Placement, expected: dict[str, torch.Tensor]) -> int:
    """Compares every part of every expert, to the bit; returns how many."""
    compared = 0
    for i, layer in enumerate(placement.experts):
        for e, names in enumerate(layer):
            views = arena.layout.layers[i].block.views(arena.block(i, e))
            assert views.keys() == names.keys()
            for part, name in names.items():
                assert views[part].dtype == getattr(torch, placement.dtype)
                assert torch.equal(views[part], expected[name].to(views[part].dtype))
                compared += 1
    return compared


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_expert_and_the_backbone_lie_in_the_arena_as_the_checkpoint_has_them(tmp_path, arena_dir, shards, stored, dtype):
    made = tensors(0, stored)
    placement = dataclasses.replace(PLACEMENT, dtype=dtype)
    arena = in_arena(save(tmp_path / "model", made, shards), arena_dir, placement)
    assert check_experts(arena, placement, made) == LAYERS * EXPERTS * 2
    backbone = arena.backbone()
    assert backbone.keys() == PLACEMENT.backbone.keys()
    assert torch.equal(backbone["norm.weight"], made["ln.weight"].to(getattr(torch, dtype)))
    assert backbone["scale"].item() == 2.5
    assert torch.equal(backbone["positions"], made["positions"])  # whole numbers stay whole numbers
    assert arena.layout == placement.layout(Checkpoint(tmp_path / "model"))


def test_the_experts_of_a_real_model_sharded_or_not_lie_in_the_arena_as_transformers_saved_them(switch, arena_dir):
    from pipeline.config import ModelConfig
    from pipeline.models import describe

    for shard_size in ("5GB", "300KB"):
        directory, model = switch(max_shard_size=shard_size)
        assert (directory / INDEX).exists() == (shard_size != "5GB")
        spec, checkpoint = describe(ModelConfig(str(directory), "float32"), torch.device("cpu"))
        arena = load(spec.placement.arena_path(checkpoint, arena_dir), checkpoint, spec.placement)
        whole = model.state_dict()
        assert check_experts(arena, spec.placement, whole) == 3 * 8 * 2
        experts = {name for layer in spec.placement.experts for e in layer for name in e.values()}
        assert experts == {name for name in whole if ".experts." in name}
        for name, tensor in arena.backbone().items():
            assert torch.equal(tensor, whole[name])


def test_progress_adds_up_to_the_bytes_of_the_model(tmp_path, arena_dir):
    steps: list[int] = []
    arena = in_arena(save(tmp_path / "model", tensors()), arena_dir, progress=steps.append)
    assert sum(steps) == arena.layout.expert_bytes + arena.layout.backbone_bytes
    assert len(steps) == LAYERS * EXPERTS + len(PLACEMENT.backbone)
    in_arena(tmp_path / "model", arena_dir, progress=lambda nbytes: pytest.fail("loaded again"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"l1.e2.down.weight": None}, "has no tensor l1.e2.down.weight"),
        ({"l1.e0.up.weight": None}, "has no tensor l1.e0.up.weight"),
        ({"ln.weight": None}, "has no tensor ln.weight"),
        ({"l1.router": None}, "has no tensor l1.router"),
        ({"l0.e1.up.weight": torch.zeros(5, 8)}, "tensor l0.e1.up.weight has shape [5, 8]"),
        ({"l1.e2.up.weight": torch.full((16, 5), float("nan"))}, "tensor l1.e2.up.weight holds NaN or infinite"),
        ({"ln.weight": torch.full((5,), float("inf"))}, "tensor ln.weight holds NaN or infinite"),
        ({"l0.router": torch.full((3, 5), float("nan"))}, "tensor l0.router holds NaN or infinite"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_and_leaves_nothing(tmp_path, arena_dir, wrong, message):
    made = {name: t for name, t in (tensors() | wrong).items() if t is not None}
    with pytest.raises(CheckpointError) as error:
        in_arena(save(tmp_path / "model", made), arena_dir)
    assert message in str(error.value)
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)
    assert list(arena_dir.iterdir()) == []


def test_weights_that_float16_cannot_hold_are_refused_as_float16_and_served_as_float32(tmp_path, arena_dir):
    directory = save(tmp_path / "model", tensors() | {"l1.e2.up.weight": torch.full((16, 5), 1e5)})
    with pytest.raises(CheckpointError, match=r"l1\.e2\.up\.weight .*float16"):
        in_arena(directory, arena_dir, dataclasses.replace(PLACEMENT, dtype="float16"))
    assert list(arena_dir.iterdir()) == []
    check_experts(in_arena(directory, arena_dir), PLACEMENT, load_file(directory / SINGLE))


def test_an_arena_that_does_not_fit_is_refused_before_weights_are_placed(tmp_path, arena_dir, monkeypatch):
    monkeypatch.setattr("store.arena.free_bytes", lambda directory: 100)
    with pytest.raises(SpaceError, match="bytes short"):
        in_arena(save(tmp_path / "model", tensors()), arena_dir, progress=lambda nbytes: pytest.fail("placed"))
    assert list(arena_dir.iterdir()) == []


# Which arena a checkpoint has.


def test_the_same_checkpoint_has_the_same_arena_and_another_has_another(tmp_path, arena_dir):
    directory = save(tmp_path / "model", tensors())
    path = PLACEMENT.arena_path(Checkpoint(directory), arena_dir)
    assert PLACEMENT.arena_path(Checkpoint(directory), arena_dir) == path
    assert path.parent == arena_dir
    fewer = dataclasses.replace(PLACEMENT, experts=PLACEMENT.experts[:1])
    others = {
        PLACEMENT.arena_path(Checkpoint(save(tmp_path / "sharded", tensors(), shards=2)), arena_dir),
        dataclasses.replace(PLACEMENT, dtype="bfloat16").arena_path(Checkpoint(directory), arena_dir),
        fewer.arena_path(Checkpoint(directory), arena_dir),
    }
    assert len(others | {path}) == 4


@pytest.mark.parametrize("shard", ["0.safetensors", "2.safetensors"])
def test_a_changed_shard_has_another_arena(tmp_path, arena_dir, shard):
    file = save(tmp_path / "model", tensors(), shards=3) / shard
    stat = file.stat()

    def path() -> Path:
        return PLACEMENT.arena_path(Checkpoint(tmp_path / "model"), arena_dir)

    first = path()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path() != first
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path() == first
    made = load_file(file)
    save_file(made, file, metadata={"trained": "longer"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path() != first


def test_a_checkpoint_that_is_trained_on_is_loaded_anew(tmp_path, arena_dir):
    directory = save(tmp_path / "model", tensors(0))
    old = in_arena(directory, arena_dir)
    stat = (directory / SINGLE).stat()
    save(directory, tensors(1))
    os.utime(directory / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**6))
    check_experts(in_arena(directory, arena_dir), PLACEMENT, tensors(1))
    check_experts(old, PLACEMENT, tensors(0))


def test_a_copy_of_a_model_has_its_identity(tmp_path, arena_dir):
    """Whatever its file times and shards are: a predictor belongs to weights, not to files."""
    first = in_arena(save(tmp_path / "model", tensors()), arena_dir)
    copy = shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / SINGLE, ns=(0, 0))
    sharded = save(tmp_path / "sharded", tensors(), shards=3)
    second, third = in_arena(copy, arena_dir), in_arena(sharded, arena_dir)
    assert len({first.path, second.path, third.path}) == 3
    assert first.identity == second.identity == third.identity == routers_identity(Checkpoint(copy), PLACEMENT)


def test_the_identity_changes_with_any_router_weight_and_with_nothing_else(tmp_path):
    def identity(made: dict[str, torch.Tensor]) -> str:
        return routers_identity(Checkpoint(save(tmp_path / "model", made)), PLACEMENT)

    first = identity(tensors())
    assert identity(tensors() | {"l0.e0.up.weight": torch.zeros(8, 5), "unused": torch.zeros(7)}) == first
    seen = {first}
    for name in PLACEMENT.routers:
        router = tensors()[name]
        router[2, 4] += 1e-6
        seen.add(identity(tensors() | {name: router}))
    swapped = tensors()
    swapped["l0.router"], swapped["l1.router"] = swapped["l1.router"], swapped["l0.router"]
    seen.add(identity(swapped))
    seen.add(identity(tensors() | {"l0.router": tensors()["l0.router"].view(5, 3)}))
    assert len(seen) == 5


# Memory.

PARTS, PART_SHAPE = 140, (3 * 128, 1024)  # 1.5 MiB each as float32


def child_loads(answers, directory: Path, arenas: Path, placement: Placement) -> None:
    """Answers (arena bytes, how far resident memory rose above what it was before); pages of the arena count."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    torch.set_num_threads(1)
    checkpoint = Checkpoint(directory)
    path = placement.arena_path(checkpoint, arenas)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS:")
    arena = load(path, checkpoint, placement)
    answers.send((arena.layout.nbytes, status("VmHWM:") - before))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["read in place", "converted"])
def test_loading_takes_the_memory_of_the_arena_and_of_one_tensor(tmp_path, arena_dir, stored):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "pytest"])
    made = {f"e{i}": torch.ones(PART_SHAPE, dtype=stored) for i in range(PARTS)} | {"router": torch.ones(4)}
    placement = Placement((tuple({"w": f"e{i}"} for i in range(PARTS)),), {}, "float32", ("router",))
    save(tmp_path / "model", made)
    answers, theirs = processes.Pipe()
    process = processes.Process(target=child_loads, args=(theirs, tmp_path / "model", arena_dir, placement), daemon=True)
    process.start()
    assert answers.poll(60), "no answer"
    arena_bytes, risen = answers.recv()
    process.join()
    assert arena_bytes == PARTS * 3 * 128 * 1024 * 4 > 200e6
    assert arena_bytes / 2 < risen <= 1.1 * arena_bytes + 3 * 128 * 1024 * 4


def test_a_tensor_may_keep_another_dtype_than_the_arenas(tmp_path, arena_dir):
    made = tensors()
    placement = dataclasses.replace(PLACEMENT, dtype="bfloat16", kept={"norm.weight": "float32"})
    arena = in_arena(save(tmp_path / "model", made), arena_dir, placement)
    backbone = arena.backbone()
    assert torch.equal(backbone["norm.weight"], made["ln.weight"])
    assert backbone["scale"].dtype == torch.bfloat16
    assert in_arena(tmp_path / "model", arena_dir, dataclasses.replace(placement, kept={})).path != arena.path
    arena.close()
