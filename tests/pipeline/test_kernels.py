"""The kernels against plain PyTorch in float64, interpreted on a CPU, and the same checks compiled where there is a GPU.

Every byte around the weights is part of a NaN, and so is all memory that torch leaves uninitialised: whoever reads what is not
theirs, or leaves something unwritten, does not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from pipeline.expert_shape import ExpertShape
from pipeline.gpu import grouping, kernels
from pipeline.gpu.grouping import Groups
from store.layout import ALIGNMENT, BlockLayout
from tests.pipeline.interpreted import Interpreter

HAS_GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        process(torch.use_deterministic_algorithms, True)
        yield process


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> Iterator[None]:
    """What torch leaves uninitialised is NaN, or the largest integer, while algorithms are deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it the reference's matmuls are refused on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=gpu)])
def check(request) -> Callable:
    """Calls a check, with the device to run it on first."""
    if request.param == "compiled":
        return lambda function, *args: function("cuda", *args)
    interpreter = request.getfixturevalue("interpreter")
    return lambda function, *args: interpreter(function, "cpu", *args)


# What the checks are made of


def clamped_gate(raw: torch.Tensor) -> torch.Tensor:
    """A family's own: gate and up interleaved."""
    gate, up = raw[:, ::2].clamp(max=1.0), raw[:, 1::2]
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def squared(raw: torch.Tensor) -> torch.Tensor:
    return raw.relu().square()


ACTIVATIONS = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Case:
    """counts: pairs of each expert; nobody: pairs without one. fused: gate and up are one part."""

    counts: tuple[int, ...] = (0, 1, 16, 17, 100)
    nobody: int = 6
    top_k: int = 1
    dtype: torch.dtype = FP32
    d_model: int = 144
    d_ff: int = 200
    gated: bool = False
    fused: bool = False
    bias: bool = False
    transposed: bool = False
    activation: str | Callable = "relu"
    index: torch.dtype = torch.int64

    def parts(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Names, shapes and dtypes of one expert's tensors; gate and up one behind the other if fused."""
        first = {"up": 2 * self.d_ff} if self.fused else {"gate": self.d_ff, "up": self.d_ff} if self.gated else {"up": self.d_ff}
        shapes: dict[str, tuple[int, ...]] = {name: (out, self.d_model) for name, out in first.items()}
        shapes["down"] = (self.d_model, self.d_ff)
        if self.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        if self.bias:
            shapes |= {f"{name}_bias": (out,) for name, out in [*first.items(), ("down", self.d_model)]}
        return {name: (shape, str(self.dtype).removeprefix("torch.")) for name, shape in shapes.items()}

    def shape(self) -> ExpertShape:
        offsets = {part.name: part.offset for part in BlockLayout.of(self.parts()).parts}
        return ExpertShape(
            len(self.counts), self.d_model, self.d_ff, self.dtype,
            gated=self.gated, transposed=self.transposed, activation=self.activation, **offsets
        )  # fmt: skip

    def experts(self, device: str, seed: int = 0) -> torch.Tensor:
        """(tokens, top_k): so many of each, mixed."""
        each = [torch.full((n,), e) for e, n in enumerate(self.counts)] + [torch.full((self.nobody,), -1)]
        flat = torch.cat(each)
        generator = torch.Generator().manual_seed(seed)
        flat = flat[torch.randperm(len(flat), generator=generator)]
        return flat.view(-1, self.top_k).to(self.index).to(device)

    def inputs(self, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden (tokens, d_model), experts and weights (tokens, top_k)."""
        experts = self.experts(device, seed)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(len(experts), self.d_model, generator=generator)
        weights = torch.rand(len(experts), self.top_k, generator=generator)
        return hidden.to(device, self.dtype), experts, weights.to(device, self.dtype)


class Place:
    """A block for each expert of a case, in any order with gaps between, all in one piece of memory; NaN but for the weights."""

    def __init__(self, case: Case, device: str, seed: int, pinned: bool = False):
        layout = BlockLayout.of(case.parts())
        step, count = layout.nbytes + ALIGNMENT, len(case.counts)
        memory = torch.full(((count + 1) * step,), 0xFF, dtype=torch.uint8, device="cpu" if pinned else device)
        memory = memory.pin_memory() if pinned else memory
        first = -memory.data_ptr() % ALIGNMENT
        generator = torch.Generator().manual_seed(seed)
        starts = [first + int(i) * step for i in torch.randperm(count, generator=generator)]
        self.memory = memory
        self.weights = [layout.views(memory[start : start + layout.nbytes]) for start in starts]
        self.table = torch.tensor([memory.data_ptr() + start for start in starts], device=device)
        self.begin, self.end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        random = torch.Generator(device).manual_seed(seed)
        for weights in self.weights:
            for tensor in weights.values():
                inputs = 4 if tensor.dim() == 1 else tensor.shape[0] if case.transposed else tensor.shape[1]
                tensor.copy_(torch.randn(tensor.shape, generator=random, device=device) / inputs**0.5)


def expected(case: Case, weights: list[dict[str, torch.Tensor]], hidden, experts, scale) -> torch.Tensor:
    """float64 (tokens, d_model), but rounded between the matmuls, as the kernels do.

    Args:
        weights: of each expert.
        hidden, experts, scale: as the kernels' hidden, experts and weights.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert, parts in enumerate(weights):
        wide = {name: part.to(hidden.device).double() for name, part in parts.items()}

        def linear(x: torch.Tensor, name: str, wide=wide) -> torch.Tensor:
            return x @ (wide[name] if case.transposed else wide[name].T) + wide.get(f"{name}_bias", 0)

        token, k = (experts == expert).nonzero(as_tuple=True)
        x = hidden[token].double()
        up = linear(x, "up")
        if callable(case.activation):
            inner = case.activation(up.to(case.dtype))
        elif case.gated:
            gate, up = up.chunk(2, dim=1) if case.fused else (linear(x, "gate"), up)
            inner = ACTIVATIONS[case.activation](gate) * up
        else:
            inner = ACTIVATIONS[case.activation](up)
        inner = inner.to(case.dtype).double()
        output.index_add_(0, token, linear(inner, "down") * scale[token, k, None].double())
    return output


def counters(experts: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """routed and hits, with something in them."""
    return torch.full((experts,), 7, dtype=torch.int32, device=device), torch.full((experts,), 7, dtype=torch.int32, device=device)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}[actual.dtype]  # two roundings
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def compute(hidden: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """What a snapshot has left."""
    output = kernels.room(hidden, groups)
    kernels.run(hidden, weights, groups, output)
    return kernels.combine(output, weights.shape[1])


def layer(place: Place, case: Case, hidden, experts, weights) -> torch.Tensor:
    """A whole layer, no slots."""
    groups = grouping.group(experts, case.shape())
    grouping.snapshot(groups, place.table, 0, 0, *counters(len(case.counts), hidden.device.type))
    return compute(hidden, weights, groups)


# Results


def output_is_right(device: str, case: Case) -> None:
    assert torch.empty(3, device=device).isnan().all() and torch.empty(3).new_empty(3).isnan().all()
    place = Place(case, device, seed=1)
    hidden, experts, weights = case.inputs(device)
    output = layer(place, case, hidden, experts, weights)
    assert output.dtype == case.dtype and output.shape == hidden.shape
    close(output, expected(case, place.weights, hidden, experts, weights))


CASES = {
    "switch": Case(),
    "switch-bfloat16": Case(dtype=BF16),
    "switch-float16": Case(dtype=FP16),
    "no-tokens": Case(counts=(0, 0), nobody=0),
    "no-experts": Case(counts=(0, 0), nobody=40),
    "one-token": Case(counts=(0, 1), nobody=0),
    "few-pairs": Case(counts=(3, 0, 1, 8), nobody=4),
    "top-2": Case(top_k=2, index=torch.int32),
    "top-2-bfloat16": Case(top_k=2, dtype=BF16),
    "top-4": Case(top_k=4, activation="silu", gated=True),
    "many-tokens": Case(counts=(150, 10)),
    "many-tokens-bfloat16": Case(counts=(150, 10), nobody=0, dtype=BF16, transposed=True),
    "many-experts": Case(counts=(1, 2, 0) * 20, d_model=212, nobody=4, d_ff=48),
    "gated": Case(gated=True, activation="silu", dtype=BF16),
    "gated-bias": Case(gated=True, bias=True, activation="gelu"),
    "gated-transposed-bias": Case(gated=True, transposed=True, bias=True, activation="gelu_tanh"),
    "fused": Case(gated=True, fused=True, activation="gelu_tanh"),
    "fused-bias": Case(gated=True, fused=True, bias=True, activation="relu", dtype=FP16),
    "fused-transposed-bias": Case(gated=True, fused=True, transposed=True, bias=True, activation="gelu", top_k=2),
    "linear-transposed-bias": Case(transposed=True, bias=True, activation="none"),
    "own-activation": Case(activation=squared, bias=True, counts=(5, 20)),
    "own-gate": Case(gated=True, fused=True, transposed=True, bias=True, activation=clamped_gate, top_k=4),
    "odd-sizes": Case(counts=(2, 18), d_model=37, d_ff=51),
    "odd-sizes-fused-bfloat16": Case(counts=(2, 20), d_model=37, d_ff=51, gated=True, fused=True, bias=True, dtype=BF16),
    "tiny": Case(counts=(2, 18), d_model=4, d_ff=8, transposed=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_token_gets_the_weighted_sum_of_its_experts_and_one_without_gets_zero(check, name):
    check(output_is_right, CASES[name])


REAL = {
    "one-token": Case(counts=(0, 1) + (0,) * 62, nobody=0),
    "sentence": Case(counts=(1, 0, 3, 0) * 4 + (0,) * 48, nobody=8),
    "batch": Case(counts=(0, 5, 16, 70) * 16, nobody=100),
    "documents": Case(counts=(30, 100, 128, 300) * 16, nobody=100),
    "top-2": Case(counts=(0, 5, 16, 70) * 16, nobody=100, top_k=2),
    "gated": Case(counts=(0, 5, 16, 70) * 16, nobody=100, gated=True, fused=True, activation="silu"),
    "gated-documents": Case(counts=(30, 100, 128, 300) * 16, nobody=100, gated=True, activation="silu", top_k=2),
    "transposed": Case(counts=(0, 5, 16, 70) * 16, nobody=100, transposed=True),
}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name, dtype):
    output_is_right("cuda", replace(REAL[name], dtype=dtype, d_model=768, d_ff=3072))


def bits_are_the_same(device: str) -> None:
    case = Case(counts=(0, 5, 70), nobody=1, top_k=4, dtype=BF16)
    place, inputs = Place(case, device, seed=1), case.inputs(device)
    assert torch.equal(layer(place, case, *inputs), layer(place, case, *inputs))


def test_the_same_input_gives_the_same_bits(check):
    check(bits_are_the_same)


def a_nan_stays_where_it_is(device: str) -> None:
    case = Case(counts=(0, 5, 30), nobody=1)
    place, (hidden, experts, weights) = Place(case, device, seed=1), case.inputs(device)
    spoiled = int((experts == 2).nonzero()[3, 0])
    hidden[spoiled, 7] = torch.nan
    assert layer(place, case, hidden, experts, weights).isnan().any(dim=1).nonzero().tolist() == [[spoiled]]


def test_a_nan_is_neither_hidden_nor_spread(check):
    check(a_nan_stays_where_it_is)


# Order and tiles


def pairs_are_sorted(device: str, case: Case) -> None:
    experts = case.experts(device)
    groups = grouping.group(experts, case.shape())
    key = torch.where(experts < 0, len(case.counts), experts).flatten()
    torch.testing.assert_close(groups.order.cpu(), key.argsort(stable=True).int().cpu())
    counts = torch.tensor([*case.counts, case.nobody], dtype=torch.int32)
    torch.testing.assert_close(groups.counts.cpu(), counts)
    torch.testing.assert_close(groups.offsets.cpu(), (counts.cumsum(0) - counts).int())

    grouping.snapshot(
        groups, torch.zeros(len(case.counts), dtype=torch.int64, device=device), 0, 0, *counters(len(counts) - 1, device)
    )
    tiles = -(-counts // groups.tiles.rows)
    assert groups.tile_count.item() == tiles.sum() <= len(groups.tile_experts)
    torch.testing.assert_close(groups.tile_experts[: tiles.sum()].cpu(), torch.arange(len(counts)).repeat_interleave(tiles).int())
    torch.testing.assert_close(groups.first_tiles.cpu(), (tiles.cumsum(0) - tiles).int())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "case",
    [
        Case(counts=(0, 1, 0), nobody=0),
        Case(counts=(100, 0, 155), nobody=1),  # one block of pairs
        Case(counts=(100, 0, 156), nobody=1, top_k=1),  # and one pair more
        Case(counts=(2049, 0, 1, 2900), nobody=250, top_k=4),  # several
        Case(counts=(65,) * 7 + (1,) * 10, nobody=65),  # as many tiles as there can be
        Case(counts=(0, 2) * 150, nobody=3),  # few pairs, many experts
        Case(counts=(0, 0, 9000), nobody=0),  # more tiles of one expert than are written at once
    ],
    ids=lambda case: f"{sum(case.counts) + case.nobody}-pairs-{len(case.counts)}-experts",
)
def test_pairs_are_sorted_by_expert_and_keep_their_order(check, case, index):
    check(pairs_are_sorted, replace(case, index=index))


def strangers_are_nobody(device: str) -> None:
    shape = Case(counts=(0,) * 4).shape()
    experts = torch.tensor([[3], [4], [-1], [0], [2**31 - 1], [-7], [2**40], [3]], device=device)
    groups = grouping.group(experts, shape)
    assert groups.counts.tolist() == [1, 0, 0, 2, 5] and groups.order.tolist() == [3, 0, 7, 1, 2, 4, 5, 6]


def test_a_number_that_is_no_expert_is_none(check):
    check(strangers_are_nobody)


# The table


def snapshot_decides(device: str, pinned: bool) -> None:
    """Two places with other weights each: the result tells which was read."""
    case = Case(d_model=64, d_ff=96, dtype=BF16)
    slots, host = Place(case, device, seed=1), Place(case, device, seed=2, pinned=pinned)
    table = host.table.clone()
    table[1] = slots.table[1]
    hidden, experts, weights = case.inputs(device)
    routed, hits = counters(5, device)

    groups = grouping.group(experts, case.shape())
    table[1], table[2], table[0] = host.table[1], slots.table[2], slots.table[0]  # while the caller waited for copies
    grouping.snapshot(groups, table, slots.begin, slots.end, routed, hits)
    table[1], table[2], table[3] = slots.table[1], host.table[2], slots.table[3]  # too late
    output = compute(hidden, weights, groups)

    assert routed.tolist() == list(case.counts), "assigned, not added"
    assert hits.tolist() == [0, 0, 1, 0, 0], "expert 0 is in a slot, but has no pair"
    close(output, expected(case, [(slots if e == 2 else host).weights[e] for e in range(5)], hidden, experts, weights))


def test_the_snapshot_decides_where_experts_are_read(check):
    check(snapshot_decides, False)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_experts_are_read_from_host_memory_in_place():
    snapshot_decides("cuda", True)


def slots_have_bounds(device: str) -> None:
    case = Case(counts=(1, 1, 1, 1, 0), nobody=1)
    begin, end = 2**46, 2**46 + 4096
    table = torch.tensor([begin - 256, begin, end - 256, end, begin], device=device)
    for slots, wanted in (((begin, end), [0, 1, 1, 0, 0]), ((0, 0), [0] * 5)):
        groups = grouping.group(case.experts(device), case.shape())
        routed, hits = counters(5, device)
        grouping.snapshot(groups, table, *slots, routed, hits)
        assert hits.tolist() == wanted and routed.tolist() == [1, 1, 1, 1, 0]
        assert torch.equal(groups.address, table)


def test_a_hit_is_an_expert_with_tokens_in_a_slot(check):
    check(slots_have_bounds)


def parts_make_a_whole(device: str, top_k: int) -> None:
    """Experts are computed when they come into slots, each once; what comes later, or goes, changes nothing."""
    case = Case(counts=(3, 0, 20, 1, 70, 2), nobody=6, top_k=top_k)
    slots, host = Place(case, device, seed=1), Place(case, device, seed=1)
    hidden, experts, weights = case.inputs(device)
    whole = layer(host, case, hidden, experts, weights)
    table, (routed, hits) = host.table.clone(), counters(6, device)
    groups = grouping.group(experts, case.shape())
    owner = torch.where(experts < 0, -1, experts).flatten()
    output = kernels.room(hidden, groups).fill_(torch.nan)
    values, done = output.clone(), {-1}  # pairs without expert are zero from the first part on
    for change, last in ({0: slots, 1: slots, 4: slots}, False), ({}, False), ({0: host, 2: slots}, False), ({4: host}, True):
        for expert, place in change.items():
            table[expert] = place.table[expert]
        grouping.snapshot(groups, table, slots.begin, slots.end, routed, hits, last=last)
        seen = table.clone()
        table.zero_()  # what the table becomes later is not seen
        kernels.run(hidden, weights, groups, output)
        table.copy_(seen)
        now = ({*change} if not last else {*range(6)}) - done
        done |= now
        written = torch.tensor([expert in now for expert in owner.tolist()], device=device)
        assert output[~written & values.isnan().all(1) & (owner != -1)].isnan().all(), "not yet"
        values[written] = output[written]
        output[written] = 7.0
    values[owner == -1] = output[owner == -1]
    assert (output[owner != -1] == 7.0).all(), "computed twice"
    assert routed.tolist() == list(case.counts)
    assert hits.tolist() == [1, 0, 1, 0, 1, 0], "read from slots, in whatever part"
    assert torch.equal(kernels.combine(values, top_k), whole)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_may_be_computed_in_parts(check, top_k):
    check(parts_make_a_whole, top_k)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_replay_of_a_graph_follows_the_table_and_the_router(top_k):
    case = Case(counts=(0, 5, 16, 70) * 16, nobody=100, top_k=top_k, dtype=BF16, d_model=768, d_ff=3072)
    slots, host = Place(case, "cuda", seed=1), Place(case, "cuda", seed=2, pinned=True)
    table, (routed, hits) = host.table.clone(), counters(64, "cuda")
    hidden, experts, weights = case.inputs("cuda")

    def forward() -> torch.Tensor:
        groups = grouping.group(experts, case.shape())
        grouping.snapshot(groups, table, slots.begin, slots.end, routed, hits)
        return compute(hidden, weights, groups)

    forward()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    for seed, resident in ((0, []), (1, range(0, 64, 3)), (2, range(64)), (3, range(1, 64, 2))):
        for old, new in zip((hidden, experts, weights), case.inputs("cuda", seed), strict=True):
            old.copy_(new)
        table.copy_(host.table)
        table[list(resident)] = slots.table[list(resident)]
        output.fill_(torch.nan)
        graph.replay()
        here = [(slots if expert in resident else host).weights[expert] for expert in range(64)]
        close(output, expected(case, here, hidden, experts, weights))
        assert routed.tolist() == list(case.counts)
        assert hits.tolist() == [int(expert in resident and n > 0) for expert, n in enumerate(case.counts)]
