"""Safetensors in: the same tensors as safetensors' own reader, or one line that says which file and tensor is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from store.checkpoint import DTYPES, HEADER_LIMIT, INDEX, SINGLE, Checkpoint, read_header
from store.errors import CheckpointError


def random_tensor(dtype: torch.dtype, shape=(3, 5)) -> torch.Tensor:
    torch.manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def all_kinds() -> dict[str, torch.Tensor]:
    """A tensor of every dtype served, and of every kind of shape."""
    tensors = {f"t.{name}": random_tensor(dtype) for name, dtype in DTYPES.items()}
    shapes = {"scalar": (), "one": (1,), "cube": (2, 3, 4), "none": (0,), "no_columns": (4, 0)}
    return tensors | {f"s.{name}": random_tensor(torch.float32, shape) for name, shape in shapes.items()}


def save_sharded(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    directory.mkdir()
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def save_single(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


def save_raw(directory: Path, header: bytes | dict | list, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file made by hand, to be able to make it wrong."""
    directory.mkdir(exist_ok=True)
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / SINGLE).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return directory


def refused(directory: Path, tensor: str | None = None, out: torch.Tensor | None = None) -> str:
    """The message with which opening the checkpoint, or then reading a tensor of it, is refused; always one line."""
    with pytest.raises(CheckpointError) as error:
        checkpoint = Checkpoint(directory)
        assert tensor is not None, "the checkpoint was opened"
        checkpoint.read(tensor) if out is None else checkpoint.read_into(tensor, out)
    message = str(error.value)
    assert "\n" not in message
    assert str(directory) in message
    assert tensor is None or tensor in message
    return message


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_every_tensor_equals_that_of_safetensors_own_reader(tmp_path, save):
    directory = save(tmp_path / "model", all_kinds())
    checkpoint = Checkpoint(directory)
    seen = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118 - not a dict
                expected = theirs.get_tensor(name)
                ours = checkpoint.read(name)
                assert ours.dtype == expected.dtype
                assert ours.shape == expected.shape
                assert torch.equal(ours, expected)
                assert checkpoint.info(name).file == file
                assert checkpoint.info(name).nbytes == expected.nbytes
                seen.add(name)
    assert seen == set(checkpoint.tensors) == set(all_kinds())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_is_converted_to_the_dtype_of_the_memory_it_is_read_into(tmp_path, stored, wanted):
    tensor = random_tensor(stored, (33, 7))
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"w": tensor}))
    out = torch.full((33, 7), 9.0, dtype=wanted)
    checkpoint.read_into("w", out)
    assert torch.equal(out, tensor.to(wanted))


def test_bfloat16_becomes_float32_to_the_bit(tmp_path):
    """Subnormals, zeros of both signs and the largest values included: a bf16 is the upper half of a float32."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].contiguous()
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"w": finite}))
    out = torch.empty(len(finite))
    checkpoint.read_into("w", out)
    assert torch.equal(out.view(torch.int32), finite.view(torch.int16).to(torch.int32) << 16)


def test_reading_touches_no_byte_beside_the_tensor(tmp_path):
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"a": torch.ones(5), "b": torch.full((5,), 2.0), "c": torch.ones(5)}))
    memory = torch.full((15,), -1.0)
    checkpoint.read_into("b", memory[5:10])
    assert memory.tolist() == [-1.0] * 5 + [2.0] * 5 + [-1.0] * 5


def test_a_tensor_without_elements_is_read(tmp_path):
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"empty": torch.empty(0, 4), "w": torch.ones(2)}))
    assert checkpoint.read("empty").shape == (0, 4)
    checkpoint.read_into("empty", torch.empty(0, 4, dtype=torch.bfloat16))
    assert checkpoint.read("w").tolist() == [1, 1]


@pytest.mark.parametrize("holds", [None, [], ["pytorch_model.bin", "config.json"]], ids=["not there", "empty", "another format"])
def test_a_directory_without_a_checkpoint_is_refused_and_told_what_is_looked_for(tmp_path, holds):
    if holds is not None:
        (tmp_path / "model").mkdir()
        for name in holds:
            (tmp_path / "model" / name).write_bytes(b"x")
    message = refused(tmp_path / "model")
    assert SINGLE in message
    assert INDEX in message


def cut_points() -> dict[str, int]:
    """Where a file can end too early, in bytes from its start, for two tensors "a" (12 bytes) and "b" (20 bytes)."""
    header = len(json.dumps(two_tensors()).encode())
    return {
        "nothing is left": 0,
        "inside the length": 5,
        "after the length": 8,
        "inside the header": 8 + header // 2,
        "the header's last byte": 8 + header - 1,
        "before the data": 8 + header,
        "inside the first tensor": 8 + header + 7,
        "between the tensors": 8 + header + 12,
        "the last byte": 8 + header + 31,
    }


def two_tensors() -> dict:
    return {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [12, 32]},
    }


@pytest.mark.parametrize("where", cut_points())
def test_a_truncated_file_is_refused_before_a_byte_of_it_is_read(tmp_path, where):
    directory = save_raw(tmp_path / "model", two_tensors(), bytes(32))
    file = directory / SINGLE
    Checkpoint(directory)  # whole, it is accepted
    cut = cut_points()[where]
    file.write_bytes(file.read_bytes()[:cut])
    message = refused(directory)
    assert SINGLE in message
    assert "truncated" in message
    if cut >= cut_points()["before the data"]:
        short = file.stat().st_size - cut_points()["before the data"]
        first = ("a", 12) if short < 12 else ("b", 32)
        assert f"tensor {first[0]} ends {first[1] - short} bytes past the end" in message


def test_a_truncated_shard_is_named(tmp_path):
    directory = save_sharded(tmp_path / "model", all_kinds())
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(directory)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    directory = save_raw(tmp_path / "model", two_tensors(), bytes(32))
    checkpoint = Checkpoint(directory)
    file = directory / SINGLE
    file.write_bytes(file.read_bytes()[:-4])
    assert checkpoint.read("a").tolist() == [0, 0, 0]
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: ends inside tensor b"):
        checkpoint.read("b")


GARBAGE = {
    "not json": b"these are not the bytes you are looking for",
    "not text": bytes(range(128, 256)),
    "nothing": b"",
    "half a json": json.dumps(two_tensors()).encode()[:-5],
    "a list": [1, 2],
    "a number": b"7",
    "null": b"null",
    "an entry that is no object": {"a": 3},
    "no dtype": {"a": {"shape": [3], "data_offsets": [0, 12]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 12]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [3]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 6, 12]}},
    "offsets that are no numbers": {"a": {"dtype": "F32", "shape": [3], "data_offsets": ["0", "12"]}},
    "a shape that is no list": {"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}},
    "a shape of words": {"a": {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]}},
    "a dtype that is no word": {"a": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}},
    "more data than the shape needs": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}},
    "less data than the shape needs": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "offsets in the wrong order": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}},
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_damaged_header_is_refused(tmp_path, what):
    assert SINGLE in refused(save_raw(tmp_path / "model", GARBAGE[what], bytes(64)))


IMPOSSIBLE = {
    "brackets without end": b"[" * 100_000,
    "a tensor before the data": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [-4, 8]}},
    "a negative shape": {"a": {"dtype": "F32", "shape": [-3, -1], "data_offsets": [0, 12]}},
    "a shape of fractions": {"a": {"dtype": "F32", "shape": [1.5, 2], "data_offsets": [0, 12]}},
    "two tensors in one place": two_tensors() | {"a": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_header_that_safetensors_itself_refuses_is_refused(tmp_path, what):
    directory = save_raw(tmp_path / "model", IMPOSSIBLE[what], bytes(32))
    with pytest.raises(SafetensorError), safe_open(directory / SINGLE, "pt"):
        pass
    assert SINGLE in refused(directory)


def test_a_damaged_entry_names_its_tensor(tmp_path):
    header = two_tensors()
    header["b"]["data_offsets"] = [12, 28]
    message = refused(save_raw(tmp_path / "model", header, bytes(32)))
    assert "tensor b has 16 bytes, its shape needs 20" in message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, HEADER_LIMIT + 1])
def test_a_header_of_impossible_length_is_refused_without_reading_it(tmp_path, length):
    directory = save_raw(tmp_path / "model", b"{}", length=length)
    with (directory / SINGLE).open("r+b") as f:
        f.truncate(HEADER_LIMIT + 100)  # sparse
    assert "not a safetensors file" in refused(directory)


def test_a_dtype_that_is_not_served_is_named_with_its_tensor_and_those_that_are(tmp_path):
    header = {"a": {"dtype": "C64", "shape": [3], "data_offsets": [0, 24]}}
    message = refused(save_raw(tmp_path / "model", header, bytes(24)))
    assert "tensor a has dtype C64" in message
    assert all(name in message for name in DTYPES)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        read_header(tmp_path / "gone.safetensors")


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    directory = save_sharded(tmp_path / "model", all_kinds())
    shard = sorted(directory.glob("*.safetensors"))[2]
    shard.unlink()
    message = refused(directory)
    assert INDEX in message
    assert shard.name in message


def test_an_index_that_names_a_tensor_which_no_shard_holds_is_refused(tmp_path):
    directory = save_sharded(tmp_path / "model", all_kinds())
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["layer.9.lost"] = sorted(directory.glob("*.safetensors"))[0].name
    (directory / INDEX).write_text(json.dumps(index))
    message = refused(directory)
    assert INDEX in message
    assert "layer.9.lost" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\xff"])
def test_a_damaged_index_is_refused(tmp_path, text):
    directory = save_sharded(tmp_path / "model", all_kinds())
    (directory / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in refused(directory)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    directory = save_single(tmp_path / "model", {"w": torch.ones(2)})
    assert "no tensor v" in refused(directory, "v")


@pytest.mark.parametrize("shape", [(3, 5), (15,), (5, 3, 1), (), (0,)])
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path, shape):
    directory = save_single(tmp_path / "model", {"w": torch.ones(5, 3)})
    message = refused(directory, "w", out=torch.empty(shape))
    assert SINGLE in message
    assert "[5, 3]" in message
    assert str(list(shape)) in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 500, -1])
def test_one_weight_that_is_not_finite_is_refused(tmp_path, value, dtype, where):
    tensor = torch.zeros(1003, dtype=dtype)  # neither a multiple of a vector nor a single one
    tensor[where] = value
    directory = save_single(tmp_path / "model", {"fine": torch.ones(3), "w": tensor})
    message = refused(directory, "w")
    assert SINGLE in message
    assert "NaN or infinite" in message
    refused(directory, "w", out=torch.empty(1003))
    assert Checkpoint(directory).read("fine").tolist() == [1, 1, 1]


def test_a_nan_in_a_scalar_is_refused(tmp_path):
    refused(save_single(tmp_path / "model", {"w": torch.tensor(float("nan"))}), "w")


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e38])
def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path, value):
    directory = save_single(tmp_path / "model", {"w": torch.tensor([1.0, value, 2.0])})
    message = refused(directory, "w", out=torch.empty(3, dtype=torch.float16))
    assert "float16" in message
    assert Checkpoint(directory).read("w").tolist() == pytest.approx([1.0, value, 2.0])


def test_the_largest_float16_is_not_too_large(tmp_path):
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"w": torch.tensor([65504.0, -65504.0])}))
    out = torch.empty(2, dtype=torch.float16)
    checkpoint.read_into("w", out)
    assert out.tolist() == [65504, -65504]


def test_whole_numbers_of_any_value_are_accepted(tmp_path):
    tensor = torch.tensor([2**63 - 1, -(2**63)])
    assert torch.equal(Checkpoint(save_single(tmp_path / "model", {"ids": tensor})).read("ids"), tensor)


def test_the_fingerprint_changes_with_a_shards_name_size_time_and_header_only(tmp_path):
    directory = save_single(tmp_path / "model", {"w": torch.ones(4)})
    first = Checkpoint(directory).fingerprint
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))  # copies times too
    assert Checkpoint(copy).fingerprint == first
    file = copy / SINGLE
    stat = file.stat()

    def with_times_kept() -> str:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return Checkpoint(copy).fingerprint

    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"w"', b'"v"'))  # as long as before
    assert with_times_kept() != first
    file.write_bytes(raw)
    assert with_times_kept() == first
    file.touch()
    assert Checkpoint(copy).fingerprint != first


def test_the_fingerprint_changes_with_any_shard(tmp_path):
    directory = save_sharded(tmp_path / "model", all_kinds())
    seen = {Checkpoint(directory).fingerprint}
    for file in sorted(directory.glob("*.safetensors")):
        file.touch()
        seen.add(Checkpoint(directory).fingerprint)
    assert len(seen) == 4


def test_the_sample_is_that_of_the_weights_and_not_of_the_files(tmp_path):
    first = Checkpoint(save_single(tmp_path / "model", all_kinds())).sample()
    assert Checkpoint(save_single(tmp_path / "again", all_kinds())).sample() == first
    assert Checkpoint(save_sharded(tmp_path / "sharded", all_kinds())).sample() == first


def test_the_sample_changes_with_training_with_a_name_a_shape_and_a_dtype(tmp_path):
    made = all_kinds()
    trained = {"t.F32": made["t.F32"] * 1.001}
    changed = [
        trained,
        {"t.F32": made["t.F32"].view(5, 3)},
        {"t.F32": made["t.F32"].view(torch.int32)},
        {"s.none": torch.empty(1, 0)},
        {"more": torch.ones(1)},
    ]
    samples = {Checkpoint(save_single(tmp_path / f"{i}", made | change)).sample() for i, change in enumerate([{}, *changed])}
    assert len(samples) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_index_of_the_first_dimension_can_be_read_by_itself(tmp_path, dtype):
    cube = random_tensor(torch.bfloat16, (4, 3, 5))
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"a": random_tensor(torch.int64), "cube": cube, "z": cube[0].clone()}))
    for row in range(4):
        out = torch.empty(3, 5, dtype=dtype)
        checkpoint.read_into("cube", out, row)
        assert torch.equal(out, cube[row].to(dtype))
    with pytest.raises(CheckpointError, match=r"cube has shape \[3, 5\], config\.json asks for \[4, 3, 5\]"):
        checkpoint.read_into("cube", torch.empty(4, 3, 5), 1)


def test_infinite_values_are_read_where_they_are_allowed(tmp_path):
    limit = torch.tensor([torch.inf, -torch.inf])
    checkpoint = Checkpoint(save_single(tmp_path / "model", {"limit": limit}))
    out = torch.empty(2)
    checkpoint.read_into("limit", out, finite=False)
    assert torch.equal(out, limit)
    with pytest.raises(CheckpointError, match="infinite"):
        checkpoint.read_into("limit", out)
