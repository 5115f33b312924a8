"""Blocks: aligned, without overlap, the same bytes wherever they lie."""

from __future__ import annotations

import json

import pytest
import torch

from store.layout import ALIGNMENT, ArenaLayout, BlockLayout, align

ODD = {
    "wi": ((3, 5), "float32"),
    "scale": ((), "float32"),
    "none": ((0, 4), "float16"),
    "flags": ((7,), "bool"),
    "wo": ((5, 3), "bfloat16"),
    "ids": ((1,), "int64"),
}
"""Tensors of one expert of which none has a multiple of 256 bytes; a scalar and an empty one among them."""


def odd_layout() -> ArenaLayout:
    return ArenaLayout.of([(3, ODD), (2, {"wi": ((100, 3), "float32")})], {"norm": ((5,), "float32"), "bias": ((3,), "float64")})


@pytest.mark.parametrize(("nbytes", "aligned"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512)])
def test_sizes_are_rounded_up_to_the_alignment(nbytes, aligned):
    assert align(nbytes) == aligned


def test_every_block_and_every_tensor_starts_at_a_multiple_of_the_alignment():
    layout = odd_layout()
    starts = [
        layer.expert_offset(e) + part.offset for layer in layout.layers for e in range(layer.experts) for part in layer.block.parts
    ]
    starts += [layer.expert_offset(e) for layer in layout.layers for e in range(layer.experts)]
    starts += [part.offset for part in layout.backbone]
    assert len(starts) == 3 * 6 + 2 + 5 + 2
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_no_two_tensors_share_a_byte_and_all_lie_inside_the_arena():
    layout = odd_layout()
    owners = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for layer in layout.layers:
        for e in range(layer.experts):
            for part in layer.block.parts:
                start = layer.expert_offset(e) + part.offset
                assert part.offset + part.nbytes <= layer.block.nbytes
                owners[start : start + part.nbytes] += 1
    for part in layout.backbone:
        assert part.offset + part.nbytes <= layout.nbytes
        owners[part.offset : part.offset + part.nbytes] += 1
    assert owners.max() == 1
    one_expert = 3 * 5 * 4 + 4 + 7 + 5 * 3 * 2 + 8
    assert int(owners.sum()) == 3 * one_expert + 2 * 100 * 3 * 4 + 5 * 4 + 3 * 8


def test_views_have_the_shapes_and_dtypes_asked_for_and_write_through():
    block = BlockLayout.of(ODD)
    memory = torch.zeros(block.nbytes, dtype=torch.uint8)
    views = block.views(memory)
    assert {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in views.items()} == ODD
    views["wo"].copy_(torch.arange(15.0).view(5, 3))
    views["scale"].fill_(2.5)
    again = block.views(memory)
    assert again["wo"].tolist() == torch.arange(15.0).view(5, 3).tolist()
    assert again["scale"].item() == 2.5
    assert again["wi"].count_nonzero() == 0


def test_a_block_means_the_same_wherever_it_is_copied():
    layer = odd_layout().layers[0]
    memory = torch.randint(0, 2, (odd_layout().nbytes,), dtype=torch.uint8)  # 0 and 1 are values of every dtype, bool included
    start = layer.expert_offset(2)
    there = layer.block.views(memory[start : start + layer.block.nbytes])
    slot = memory[start : start + layer.block.nbytes].clone()
    for name, tensor in layer.block.views(slot).items():
        assert torch.equal(tensor, there[name])


def test_the_sizes_that_budgets_are_made_of():
    layout = odd_layout()
    small, large = (layer.block.nbytes for layer in layout.layers)
    assert small == 256 * 5  # the empty tensor takes nothing
    assert large == align(100 * 3 * 4)
    assert layout.slot_bytes == max(small, large)
    assert layout.expert_bytes == 3 * small + 2 * large
    assert layout.backbone_bytes == 5 * 4 + 3 * 8
    assert layout.nbytes == layout.expert_bytes + 2 * ALIGNMENT


def test_a_layout_survives_json():
    layout = odd_layout()
    assert ArenaLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
