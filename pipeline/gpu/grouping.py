"""Tokens grouped by expert, on a GPU: what the grouped matmuls (kernels.py) need to know before they begin.

`group` sorts the token-expert pairs by expert, `snapshot` reads the table of addresses, once, and cuts each expert's pairs into
tiles. Neither asks the GPU anything: both can be captured in a CUDA graph, after a first call outside, which compiles.

A layer may be computed in parts: a `snapshot` that is not the last leaves out the experts that are not in slots, and each later one
those that have been served.

Pairs without an expert are sorted too, behind all others, and get tiles of their own: the matmuls write zeros for them, so that no
buffer has to be zeroed first, and no launch is spent on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pipeline.expert_shape import ExpertShape

NARROW = 16
"""Rows; the fewest that tensor cores multiply."""

PROGRAMS = 2 * 132
"""The fewest to aim for: two for each multiprocessor of an H100."""


@dataclass(frozen=True)
class Tile:
    """What one program of a matmul computes: `n` outputs of a tile's rows, `k` inputs at a time, `stages` of them under way."""

    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """How both matmuls are cut. rows: of a tile; one of at most `NARROW` takes the narrow path."""

    rows: int
    up: Tile
    down: Tile


def tiles_for(pairs: int, shape: ExpertShape) -> Tiles:
    """The constants of every launch, by what the host knows; how the pairs are spread over the experts it does not."""
    single = shape.dtype.itemsize == 4
    line = 128 // shape.dtype.itemsize  # inputs in 128 bytes: a line of the L2, and the least that the link carries well
    if pairs >= 64 * shape.experts:  # bound by arithmetic
        n = 64 if single else 128
        up = Tile(n // 2 if shape.gated else n, line, warps=8, stages=3)  # a gated program sums up twice as much
        return Tiles(64 if single else 128, up, Tile(n, line, warps=8, stages=3))
    # Bound by reading: what counts is how many bytes are under way, over all programs that run at once.
    few = Tile(16, 4 * line if pairs <= NARROW else 2 * line, warps=4, stages=4)
    # Fits a multiprocessor twice. Two lines of a row at a time: over the link one was up to 8 % slower, in HBM as fast.
    many = Tile(32, line if shape.gated else 2 * line, warps=4, stages=4)
    active = min(pairs, shape.experts)
    up = few if active * shape.d_ff < 32 * PROGRAMS else many
    down = few if active * shape.d_model < 32 * PROGRAMS else many
    return Tiles(NARROW if pairs <= NARROW else 64, up, down)


@dataclass(frozen=True)
class Groups:
    """The token-expert pairs of one layer, sorted by expert and cut into tiles. Expert `shape.experts` is none: pairs without.

    Attributes:
        order: int32 (pairs,), positions in (tokens, top_k), by expert, those of one expert in their order.
        counts, offsets: int32 (experts + 1,), how many of `order` are an expert's, and where they begin.
        address: int64 (experts,), the snapshot of the table; 0: not in this part.
        served: int32 (experts,), 1 for those that an earlier part has computed.
        tile_experts: int32 (at most so many tiles,), whose tile this is; an expert's tiles lie together.
        tile_count: int32 (1,), how many of them there are; what lies behind is uninitialised.
        first_tiles: int32 (experts + 1,), an expert's first tile.

    `group` writes the first three and clears `served`; `snapshot` writes the others.
    """

    shape: ExpertShape
    tiles: Tiles
    order: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    address: torch.Tensor
    served: torch.Tensor
    tile_experts: torch.Tensor
    tile_count: torch.Tensor
    first_tiles: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the matmuls read, in the order of their arguments."""
        return self.order, self.counts, self.offsets, self.address, self.tile_experts, self.tile_count, self.first_tiles


def group(experts: torch.Tensor, shape: ExpertShape) -> Groups:
    """Sorts the pairs by expert; does not read the table. One launch.

    Args:
        experts: int32 or int64 (tokens, top_k); -1, or whatever is not an expert, is none.
    """
    pairs, every = experts.numel(), shape.experts + 1
    tiles = tiles_for(pairs, shape)

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=experts.device)

    most = min(every, pairs) + pairs // tiles.rows  # each expert's last tile, and the full ones
    order, counts, offsets, served = empty(pairs), empty(every), empty(every), empty(every)
    groups = Groups(
        shape, tiles, order, counts, offsets, empty(shape.experts, torch.int64), served, empty(most), empty(1), empty(every)
    )  # fmt: skip
    block = 256 if pairs <= 256 else 2048  # two, so that few kernels are compiled
    _sort[(every,)](experts.contiguous(), order, counts, offsets, served, pairs, shape.experts, block)
    return groups


def snapshot(
    groups: Groups,
    table: torch.Tensor,
    slots_begin: int,
    slots_end: int,
    routed: torch.Tensor,
    hits: torch.Tensor,
    last: bool = True,
) -> None:
    """Reads each entry of the table once, counts, and makes the tiles. One launch. What the table becomes later is not seen.

    Args:
        last: all experts that are still to be computed, wherever they are; otherwise those of them that are in slots. `routed` and
            `hits` are right after the last.
        table: int64 (experts,), each expert's address.
        slots_begin, slots_end: addresses; an expert between them is in a slot.
        routed: int32 (experts,), assigned the pairs of each expert.
        hits: int32 (experts,), assigned 1 for each expert that has pairs and is in a slot, else 0.
    """
    every = groups.shape.experts + 1
    _snapshot[(every,)](
        table, groups.counts, groups.address, groups.served, groups.tile_experts, groups.tile_count, groups.first_tiles,
        routed, hits, slots_begin, slots_end, last, groups.shape.experts, triton.next_power_of_2(every), groups.tiles.rows
    )  # fmt: skip


@triton.jit
def _keys(experts, position, pairs, EXPERTS: tl.constexpr):
    """What is sorted by: the expert, EXPERTS for none, one more behind the last pair."""
    expert = tl.load(experts + position, mask=position < pairs, other=-1)
    key = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)
    return tl.where(position < pairs, key, EXPERTS + 1)


@triton.jit(do_not_specialize=["pairs"])
def _sort(experts, order, counts, offsets, served, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Program e finds the pairs of expert e and counts those of the experts before: two passes over all, no second launch."""
    expert = tl.program_id(0)
    count = 0
    before = 0
    for start in range(0, pairs, BLOCK):
        key = _keys(experts, start + tl.arange(0, BLOCK), pairs, EXPERTS)
        count += tl.sum((key == expert).to(tl.int32))
        before += tl.sum((key < expert).to(tl.int32))
    tl.store(counts + expert, count)
    tl.store(offsets + expert, before)
    tl.store(served + expert, 0)
    for start in range(0, pairs, BLOCK):
        position = start + tl.arange(0, BLOCK)
        mine = _keys(experts, position, pairs, EXPERTS) == expert
        tl.store(order + before + tl.cumsum(mine.to(tl.int32), 0) - 1, position, mask=mine)
        before += tl.sum(mine.to(tl.int32))


@triton.jit(do_not_specialize=["slots_begin", "slots_end"])
def _snapshot(
    table, counts, address, served, tile_experts, tile_count, first_tiles, routed, hits,
    slots_begin, slots_end, LAST: tl.constexpr, EXPERTS: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Program e does all that concerns expert e; the last one, that of none, counts the tiles."""
    expert = tl.program_id(0)
    every = tl.arange(0, EVERY)
    tiles = tl.cdiv(tl.load(counts + every, mask=every <= EXPERTS, other=0), ROWS)
    first = tl.sum(tl.where(every < expert, tiles, 0))
    end = tl.sum(tl.where(every <= expert, tiles, 0))
    tl.store(first_tiles + expert, first)
    for start in range(first, end, 128):
        tile = start + tl.arange(0, 128)
        tl.store(tile_experts + tile, tl.zeros_like(tile) + expert, mask=tile < end)
    if expert == EXPERTS:
        tl.store(tile_count, end)
    else:
        count = tl.load(counts + expert)
        here = tl.load(table + expert, volatile=True)  # volatile: one load, so that what is counted is what is read
        before = tl.load(served + expert) != 0
        in_slot = (here >= slots_begin) & (here < slots_end)
        now = before == 0
        if not LAST:
            now = now & in_slot
        tl.store(address + expert, tl.where(now, here, 0))
        tl.store(served + expert, (before | now).to(tl.int32))
        tl.store(routed + expert, count)
        tl.store(hits + expert, ((count > 0) & (before | in_slot)).to(tl.int32))
