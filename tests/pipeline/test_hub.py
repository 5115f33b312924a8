"""Where a model comes from: a directory, a pickled checkpoint that is converted once and never run, or a hub that is not there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from pipeline.errors import ModelError
from pipeline.weights.hub import PICKLED, PICKLED_INDEX, headers, local_checkpoint
from store.checkpoint import INDEX, SINGLE, Checkpoint
from store.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache: where converted checkpoints go."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(6, 4, generator=generator)
    return {
        "a.weight": one,
        "a.tied": one,  # shares its storage, as embeddings and heads do
        "b.transposed": torch.randn(4, 3, generator=generator).T,
        "c.half": torch.randn(5, generator=generator).bfloat16(),
        "d.whole": torch.arange(3),
        "e.scalar": torch.tensor(2.5),
    }


def make_pickled(directory: Path, shards: int = 1, legacy: bool = False) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "switch_transformers"}')
    (directory / "tokenizer.json").write_text("{}")
    everything = tensors()
    if shards == 1:
        torch.save(everything, directory / PICKLED, _use_new_zipfile_serialization=not legacy)
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(list(everything.items())[shard::shards])
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def refused(model: str | Path) -> str:
    with pytest.raises(ModelError) as error:
        local_checkpoint(str(model))
    assert str(model) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_of_safetensors_is_used_where_it_is(tmp_path, cache):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    for name in (SINGLE, INDEX):
        (directory / name).write_text("")
        assert local_checkpoint(str(directory)) == directory
        (directory / name).unlink()
    assert not cache.exists()


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (1, True), (3, False)], ids=["one file", "before torch 1.6", "shards"])
def test_a_pickled_checkpoint_becomes_the_same_tensors_as_safetensors(tmp_path, cache, shards, legacy):
    directory = make_pickled(tmp_path / "model", shards, legacy)
    before = sorted(os.listdir(directory))
    converted = local_checkpoint(str(directory))
    assert converted.is_relative_to(cache)
    assert sorted(os.listdir(directory)) == before  # nothing is written beside the original
    checkpoint = Checkpoint(converted)
    assert checkpoint.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
    assert (converted / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert (converted / "tokenizer.json").exists()
    assert not [name for name in os.listdir(converted) if name.startswith(".") or name.endswith(".bin")]


def test_a_checkpoint_is_converted_once(tmp_path, monkeypatch):
    directory = make_pickled(tmp_path / "model")
    first = local_checkpoint(str(directory))
    stamp = (first / INDEX).stat().st_mtime_ns

    def never(*arguments, **options):
        raise AssertionError("converted again")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", never)
        assert local_checkpoint(str(directory)) == first
        assert local_checkpoint(f"{directory}/../model") == first
    assert (first / INDEX).stat().st_mtime_ns == stamp


def test_a_checkpoint_that_changed_is_converted_anew(tmp_path):
    directory = make_pickled(tmp_path / "model")
    first = local_checkpoint(str(directory))
    torch.save({"a.weight": torch.zeros(2)}, directory / PICKLED)
    second = local_checkpoint(str(directory))
    assert second != first
    assert list(Checkpoint(second).tensors) == ["a.weight"]


def test_a_conversion_that_was_killed_is_done_again(tmp_path, monkeypatch):
    directory = make_pickled(tmp_path / "model", shards=3)
    saved, calls = torch.load, []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return saved(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", killed)
        with pytest.raises(KeyboardInterrupt):
            local_checkpoint(str(directory))
    assert Checkpoint(local_checkpoint(str(directory))).tensors.keys() == tensors().keys()


def test_safetensors_are_preferred_to_pickles_beside_them(tmp_path, cache):
    directory = make_pickled(tmp_path / "model")
    (directory / SINGLE).write_bytes(b"")
    assert local_checkpoint(str(directory)) == directory
    assert not cache.exists()


class Attack:
    """What a malicious checkpoint would hold: unpickling it writes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("form", ["inside a state dict", "as the whole file", "pickled without torch"])
def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path, form):
    directory = make_pickled(tmp_path / "model")
    attack = Attack(tmp_path / "was-here")
    if form == "pickled without torch":
        (directory / PICKLED).write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save({"a.weight": torch.zeros(2), "b": attack} if "inside" in form else attack, directory / PICKLED)
    message = refused(directory)
    assert PICKLED in message
    assert not (tmp_path / "was-here").exists()
    assert "weights_only" not in message  # torch's own text tells people how to run the code all the same


@pytest.mark.parametrize(
    "content", [{"epoch": 3, "a.weight": torch.zeros(2)}, [torch.zeros(2)], {"model": {"a.weight": torch.zeros(2)}}],
    ids=["a number among tensors", "a list", "nested"],
)  # fmt: skip
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path, content):
    directory = make_pickled(tmp_path / "model")
    torch.save(content, directory / PICKLED)
    assert PICKLED in refused(directory)


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_pickle_is_refused(tmp_path, kept):
    directory = make_pickled(tmp_path / "model")
    whole = (directory / PICKLED).read_bytes()
    (directory / PICKLED).write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert PICKLED in refused(directory)


def test_an_index_of_pickles_that_names_a_missing_shard_or_is_damaged_is_refused(tmp_path):
    directory = make_pickled(tmp_path / "model", shards=3)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin" in refused(directory)
    for damaged in ("{", "[]", "{}"):
        (directory / PICKLED_INDEX).write_text(damaged)
        assert PICKLED_INDEX in refused(directory)


def test_a_directory_without_config_or_weights_is_refused(tmp_path):
    directory = make_pickled(tmp_path / "model")
    (directory / PICKLED).unlink()
    assert "holds no weights" in refused(directory)
    (directory / "config.json").unlink()
    assert "holds no config.json" in refused(directory)
    shutil.rmtree(directory)
    assert "no such directory" in refused(directory)
    assert "no such directory" in refused("./nothing/here")


@pytest.mark.parametrize("name", ["nobody-at-all/no-such-model", "no-such-model-of-nobody", "white space/and more", "a--b/..c"])
def test_a_hub_id_that_cannot_be_had_gives_one_line_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refused(name)
    assert "neither a directory here nor a model that the hub gives" in message
    assert len(message) < 400


def test_a_hub_that_cannot_be_reached_is_told_from_one_that_does_not_have_the_model(tmp_path, monkeypatch):
    def nobody_answers(*arguments, **options):
        raise LocalEntryNotFoundError("Got: ConnectError\nand much more")

    def of_another_library(*arguments, **options):
        raise Exception("[Errno -2] Name or service not known")  # httpx's are no OSError

    monkeypatch.setattr("pipeline.weights.hub.snapshot_download", nobody_answers)
    assert refused("some/model").endswith("the hub cannot be reached (Got: ConnectError)")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("pipeline.weights.hub.snapshot_download", lambda *arguments, **options: str(tmp_path))
    monkeypatch.setattr("pipeline.weights.hub.get_safetensors_metadata", of_another_library)
    with pytest.raises(ModelError, match=r"some/model: the hub does not give .*Name or service not known"):
        headers("some/model")


def test_a_missing_directory_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """`assets/typo` has the form of a hub id; its first part is a directory here."""
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)

    def never(*arguments, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("pipeline.weights.hub.snapshot_download", never)
    assert "no such directory" in refused("assets/typo")


def test_converted_shards_are_plain_safetensors(tmp_path):
    converted = local_checkpoint(str(make_pickled(tmp_path / "model", shards=2)))
    names = {name for file in converted.glob("*.safetensors") for name in load_file(file)}
    assert names == tensors().keys()
    (converted / INDEX).unlink()
    with pytest.raises(CheckpointError):
        Checkpoint(converted)  # without its index it is not taken for whole
