"""A batch in one piece of memory holds what its tensors hold one by one, whatever lay there before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipeline.gpu import packed
from pipeline.gpu.packed import ALIGNMENT, Packed
from pipeline.inputs import Inputs
from predictor.hash_table import HashTable

STREAMS = (0, 0, 0, 1, 1)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch) -> None:
    """Memory of a machine without a GPU, full of ones: NaN, and -1."""
    monkeypatch.setattr(packed, "pinned", lambda nbytes: torch.full((nbytes,), 255, dtype=torch.uint8))


def batch(lengths: Sequence[Sequence[int]], padded: Sequence[int]) -> tuple[Inputs, list[np.ndarray], list[int]]:
    """Of two streams; its tensors, where the real tokens are, tokens per stream."""
    inputs: Inputs = {}
    for name, rows, longest in zip(("", "decoder_"), lengths, padded, strict=True):
        inputs[f"{name}input_ids"] = torch.randint(0, 1000, (len(rows), longest))
        inputs[f"{name}attention_mask"] = (torch.arange(longest) < torch.tensor(rows)[:, None]).long()
    masks = [inputs["attention_mask"].numpy().reshape(-1), inputs["decoder_attention_mask"].numpy().reshape(-1)]
    return inputs, [np.flatnonzero(mask) for mask in masks], [len(mask) for mask in masks]


def table_of(widths: Sequence[int], real: Sequence[np.ndarray]) -> HashTable:
    rng = np.random.default_rng(0)
    sizes = [(len(real[stream]), width) for stream, width in zip(STREAMS, widths, strict=True)]
    experts = tuple(rng.integers(-1, 300, size).astype(np.int16) for size in sizes)
    scaling = tuple(rng.random(size).astype(np.float32) for size in sizes)
    return HashTable(experts, scaling, scaling)


def layer_by_layer(
    table: HashTable, real: Sequence[np.ndarray], tokens: Sequence[int], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What it is to be, said as simply as can be."""
    said = []
    for stream, named, scaling in zip(STREAMS, table.experts, table.scaling, strict=True):
        experts = torch.full((tokens[stream], named.shape[1]), -1, dtype=torch.int64)
        weights = torch.zeros(experts.shape, dtype=dtype)
        experts[real[stream]] = torch.from_numpy(named.astype(np.int64))
        weights[real[stream]] = torch.from_numpy(scaling).to(dtype)
        said.append((experts, weights))
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(1, 1, 1, 1, 1), (2, 1, 1, 3, 2), (3, 3, 3, 1, 1)])
def test_all_is_where_the_packing_says_and_as_it_was(dtype, widths):
    inputs, real, tokens = batch([(5, 9, 1), (3, 2, 7)], (9, 8))
    table = table_of(widths, real)
    host = Packed.of(inputs, table, real, tokens, STREAMS, dtype)
    there = torch.full_like(host.memory, 127)
    there.copy_(host.memory)
    found, tables = host.packing.views(there)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {name: tensor.tolist() for name, tensor in inputs.items()}
    assert all(found[name].dtype == inputs[name].dtype for name in inputs)
    assert tables is not None
    for ours, theirs in zip(tables, layer_by_layer(table, real, tokens, dtype), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and one.is_contiguous()
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_begins_in_another_or_at_an_odd_address(dtype):
    inputs, real, tokens = batch([(5,), (3,)], (5, 3))
    packing = Packed.of(inputs, table_of((1, 2, 3, 1, 1), real), real, tokens, STREAMS, dtype).packing
    memory = torch.zeros(packing.nbytes, dtype=torch.uint8)
    found, tables = packing.views(memory)
    assert tables is not None
    spans = sorted((t.data_ptr() - memory.data_ptr(), t.nbytes) for t in (*found.values(), *(t for pair in tables for t in pair)))
    assert all(begin % ALIGNMENT == 0 for begin, _ in spans)
    ends = [begin + nbytes for begin, nbytes in spans]
    assert all(end <= begin for end, (begin, _) in zip(ends, spans[1:], strict=False)) and ends[-1] <= packing.nbytes


def test_batches_share_a_packing_if_and_only_if_all_their_shapes_are_alike():
    def packing(rows: tuple[int, int], widths: Sequence[int] | None, longest: int = 9):
        inputs, real, tokens = batch([rows, (2, 2)], (longest, 2))
        table = table_of(widths, real) if widths else None
        return Packed.of(inputs, table, real, tokens, STREAMS, torch.float32).packing

    one = packing((5, 9), (1, 1, 1, 1, 1))
    assert {one: True}[packing((9, 3), (1, 1, 1, 1, 1))]  # of other lengths, padded to the same
    assert len({one, packing((5, 9), None), packing((5, 9), (1, 1, 1, 1, 2)), packing((5, 9), (1, 1, 1, 1, 1), 16)}) == 4


def test_where_routers_decide_there_are_inputs_alone():
    inputs, real, tokens = batch([(5, 9), (3, 2)], (16, 8))
    host = Packed.of(inputs, None, real, tokens, STREAMS, torch.bfloat16)
    found, tables = host.packing.views(host.memory)
    assert tables is None
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
