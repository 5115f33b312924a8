"""The experts of a MoE layer on a GPU: Triton grouped matmuls that find each expert's weights through a table of addresses.

Knows tokens, experts and addresses; nothing of models, slots or copies. After `group` and `snapshot` (grouping.py), `run` computes:
all experts, or a part of them, and after the last part `combine` has the layer's output.
It asks the GPU nothing, so it can be captured in a CUDA graph (after a first call outside, which compiles), and a replay follows
the table as it is then. An address may lie in HBM or in registered host memory: a kernel that reads in place over the link is the
same kernel, only slower.

A choice may surprise: a tile of at most `NARROW` rows takes another path through the same kernel. Most experts have few tokens,
where a matmul costs the reading of its weights; those with many should not have theirs read once per 16 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.expert_shape import ExpertShape
from pipeline.gpu.grouping import NARROW, Groups


def room(hidden: torch.Tensor, groups: Groups) -> torch.Tensor:
    """For what `run` writes, in one part or several: (pairs, d_model), uninitialised."""
    return hidden.new_empty(groups.order.numel(), groups.shape.d_model)


def run(hidden: torch.Tensor, weights: torch.Tensor, groups: Groups, output: torch.Tensor) -> None:
    """Writes the weighted results of those pairs whose experts have an address, and zero for pairs without expert.

    Products are summed in float32, and rounded after the activation and after the weight. Same input, same bits, in whatever
    parts. Two launches.

    Args:
        hidden: (tokens, d_model), of the experts' dtype.
        weights: (tokens, top_k), floating-point.
        output: (tokens * top_k, d_model).
    """
    shape, tiles, pairs, top_k = groups.shape, groups.tiles, groups.order.numel(), weights.shape[1]
    assert hidden.dtype == shape.dtype and weights.numel() == pairs
    most, activation = groups.tile_experts.numel(), shape.activation
    activation, apply = (activation, None) if isinstance(activation, str) else ("none", activation)
    outputs, stride, *parts = _first(shape)

    inner = hidden.new_empty(pairs, outputs)  # sorted; rows of other parts, and of pairs without expert, stay uninitialised
    _up[(most * triton.cdiv(outputs, tiles.up.n),)](
        hidden.contiguous(), inner, *groups.tensors, shape.experts, top_k, shape.d_model, outputs, stride,
        shape.transposed, *parts, activation, NARROW, tiles.rows, tiles.up.n, tiles.up.k,
        num_warps=tiles.up.warps, num_stages=tiles.up.stages
    )  # fmt: skip
    if apply is not None:
        inner = apply(inner).contiguous()
    _down[(most * triton.cdiv(shape.d_model, tiles.down.n),)](
        inner, output, weights.contiguous(), *groups.tensors, shape.experts, shape.d_ff, shape.d_model,
        shape.d_model if shape.transposed else shape.d_ff, shape.transposed, shape.down, shape.down_bias,
        NARROW, tiles.rows, tiles.down.n, tiles.down.k, num_warps=tiles.down.warps, num_stages=tiles.down.stages
    )  # fmt: skip


def combine(output: torch.Tensor, top_k: int) -> torch.Tensor:
    """The layer's output: for each token the sum of its experts' results: (tokens, d_model). A launch more with top_k > 1."""
    return output if top_k == 1 else output.view(-1, top_k, output.shape[-1]).sum(dim=1)


def _first(shape: ExpertShape) -> tuple[int, int, int | None, int, int | None, int | None]:
    """What the first matmul reads: its outputs per pair, elements between rows, where gate, up and their biases begin."""
    fused = shape.gated and shape.gate is None
    stride = (2 * shape.d_ff if fused else shape.d_ff) if shape.transposed else shape.d_model
    if not fused:
        return shape.d_ff, stride, shape.gate, shape.up, shape.gate_bias, shape.up_bias
    if callable(shape.activation):  # one matmul, of all that is in the part
        return 2 * shape.d_ff, stride, None, shape.up, None, shape.up_bias
    behind = shape.d_ff * shape.dtype.itemsize  # bytes from gate's bias to up's, or in a transposed part from gate to up
    up_bias = None if shape.up_bias is None else shape.up_bias + behind
    return shape.d_ff, stride, shape.up, shape.up + behind * (1 if shape.transposed else shape.d_model), shape.up_bias, up_bias


@triton.jit
def _locate(
    expert, counts, offsets, address, first_tiles,
    EXPERTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What this program computes: the expert's address, first row in `order`, rows, its outputs (BLOCK_N,).

    An expert's programs lie together, and among them those that read the same weights: the second of them finds in the L2 what
    the first has brought, over the link or from HBM.
    """
    here = tl.load(address + expert, mask=expert < EXPERTS, other=0)
    count = tl.load(counts + expert)
    mine = tl.program_id(0) - tl.load(first_tiles + expert) * tl.cdiv(OUTPUTS, BLOCK_N)
    tiles = tl.cdiv(count, BLOCK_M)
    skipped = mine % tiles * BLOCK_M
    n = mine // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return here, tl.load(offsets + expert) + skipped, tl.minimum(count - skipped, BLOCK_M), n


@triton.jit
def _part(address, OFFSET: tl.constexpr, like):
    """A pointer, of the type of `like`, to the part of a block that begins at OFFSET.

    The hint makes loads 16 bytes wide, and only wide ones are pipelined. It belongs on the pointer: on a loaded address it is
    ignored (Triton 3.6; AxisInfo knows nothing of scalar loads, and then drops the hint).
    """
    return tl.multiple_of((address + OFFSET).to(like.dtype), 16 if OFFSET % 16 == 0 else 1)


@triton.jit
def _multiply(
    x, inside, gate, up, n, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """x (rows) times the weights at `gate` (if GATED) and at `up`: two of float32 (BLOCK_M, BLOCK_N).

    Args:
        x: pointers to rows (BLOCK_M,); those not `inside` are zero.
    """
    k = tl.arange(0, BLOCK_K)
    offsets = k[:, None] * STRIDE + n[None, :] if TRANSPOSED else k[:, None] + n[None, :] * STRIDE
    gated = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        k_inside = (k < INPUTS - start) | (INPUTS % BLOCK_K == 0)
        rows = tl.load(x[:, None] + (start + k)[None, :], mask=inside[:, None] & k_inside[None, :], other=0.0)
        mask = k_inside[:, None] & (n < OUTPUTS)[None, :]
        here = offsets + start * (STRIDE if TRANSPOSED else 1)
        # "ieee" matters to float32 only: not as TF32.
        if GATED:
            weights = tl.load(gate + here, mask=mask, other=0.0)
            gated = tl.dot(rows, weights, gated, input_precision="ieee")
        weights = tl.load(up + here, mask=mask, other=0.0)
        result = tl.dot(rows, weights, result, input_precision="ieee")
    return gated, result


@triton.jit
def _bias(address, OFFSET: tl.constexpr, like, n, OUTPUTS: tl.constexpr):
    """float32 (1, BLOCK_N)."""
    return tl.load(_part(address, OFFSET, like) + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(out, row, inside, n, OUTPUTS: tl.constexpr, values):
    """Writes values (BLOCK_M, BLOCK_N) to those rows of `out`, (any, OUTPUTS), that are `inside`."""
    where = out + row.to(tl.int64)[:, None] * OUTPUTS + n[None, :]
    tl.store(where, values.to(out.dtype.element_ty), mask=inside[:, None] & (n < OUTPUTS)[None, :])


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch: a NaN is not hidden
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(z) is 2 sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def _up_rows(
    hidden, inner, order, address, row, rows, n, TOP_K: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Gathers `rows` rows from `hidden`, and writes them to `inner` in sorted order."""
    m = tl.arange(0, BLOCK_M)
    token = tl.load(order + row + m, mask=m < rows, other=0) // TOP_K
    GATED: tl.constexpr = GATE is not None
    up = _part(address, UP, hidden)
    gate = _part(address, GATE if GATED else UP, hidden)
    x = hidden + token.to(tl.int64) * INPUTS
    gated, result = _multiply(x, m < rows, gate, up, n, INPUTS, OUTPUTS, STRIDE, TRANSPOSED, GATED, BLOCK_M, BLOCK_N, BLOCK_K)
    if UP_BIAS is not None:
        result += _bias(address, UP_BIAS, hidden, n, OUTPUTS)
    if GATE_BIAS is not None:
        gated += _bias(address, GATE_BIAS, hidden, n, OUTPUTS)
    result = _activate(gated, ACTIVATION) * result if GATED else _activate(result, ACTIVATION)
    _store(inner, row + m, m < rows, n, OUTPUTS, result)


@triton.jit
def _up(
    hidden, inner, order, counts, offsets, address, tile_experts, tile_count, first_tiles,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """inner = activation(hidden @ up), or activation(hidden @ gate) * (hidden @ up); nothing for experts of other parts."""
    tile = tl.program_id(0) // tl.cdiv(OUTPUTS, BLOCK_N)
    expert = tl.load(tile_experts + tile)  # before it is known whether there is such a tile: one round trip less
    if tile >= tl.load(tile_count):
        return
    if expert == EXPERTS:
        return
    here, row, rows, n = _locate(expert, counts, offsets, address, first_tiles, EXPERTS, OUTPUTS, BLOCK_M, BLOCK_N)
    if here == 0:
        return
    if rows <= FEW:
        _up_rows(
            hidden, inner, order, here, row, rows, n, TOP_K, INPUTS, OUTPUTS, STRIDE, TRANSPOSED,
            GATE, UP, GATE_BIAS, UP_BIAS, ACTIVATION, FEW, BLOCK_N, BLOCK_K
        )  # fmt: skip
    elif BLOCK_M > FEW:
        _up_rows(
            hidden, inner, order, here, row, rows, n, TOP_K, INPUTS, OUTPUTS, STRIDE, TRANSPOSED,
            GATE, UP, GATE_BIAS, UP_BIAS, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip


@triton.jit
def _down_rows(
    inner, output, weights, order, address, row, rows, n, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, DOWN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Takes `rows` rows in sorted order from `inner`, and writes each to its pair's place in `output`."""
    m = tl.arange(0, BLOCK_M)
    pair = tl.load(order + row + m, mask=m < rows, other=0)
    weight = tl.load(weights + pair, mask=m < rows, other=0.0).to(tl.float32)
    down = _part(address, DOWN, inner)
    x = inner + (row + m).to(tl.int64) * INPUTS
    _, result = _multiply(x, m < rows, down, down, n, INPUTS, OUTPUTS, STRIDE, TRANSPOSED, False, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS is not None:
        result += _bias(address, BIAS, inner, n, OUTPUTS)
    _store(output, pair, m < rows, n, OUTPUTS, result * weight[:, None])


@triton.jit
def _down(
    inner, output, weights, order, counts, offsets, address, tile_experts, tile_count, first_tiles,
    EXPERTS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    DOWN: tl.constexpr, BIAS: tl.constexpr,
    FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """output = (inner @ down) * weights; zero for pairs without expert."""
    tile = tl.program_id(0) // tl.cdiv(OUTPUTS, BLOCK_N)
    expert = tl.load(tile_experts + tile)
    if tile >= tl.load(tile_count):
        return
    here, row, rows, n = _locate(expert, counts, offsets, address, first_tiles, EXPERTS, OUTPUTS, BLOCK_M, BLOCK_N)
    if expert == EXPERTS:
        m = tl.arange(0, BLOCK_M)
        pair = tl.load(order + row + m, mask=m < rows, other=0)
        _store(output, pair, m < rows, n, OUTPUTS, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    elif here == 0:
        pass  # of another part
    elif rows <= FEW:
        _down_rows(
            inner, output, weights, order, here, row, rows, n, INPUTS, OUTPUTS, STRIDE, TRANSPOSED,
            DOWN, BIAS, FEW, BLOCK_N, BLOCK_K
        )  # fmt: skip
    elif BLOCK_M > FEW:
        _down_rows(
            inner, output, weights, order, here, row, rows, n, INPUTS, OUTPUTS, STRIDE, TRANSPOSED,
            DOWN, BIAS, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
