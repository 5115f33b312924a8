"""What the kernels of a GPU are told of each kind of expert, interpreted on a CPU: they compute what the expert itself does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.families.door import Door, DoorExpert
from pipeline.families.own_routers import TwoLinears
from pipeline.gpu import grouping, kernels
from pipeline.routing import Expert
from store.layout import BlockLayout, LayerLayout
from tests.pipeline.interpreted import Interpreter
from tests.pipeline.tiny_families import architecture, roughen, tiny_config

EXPERTS, TOKENS, WIDTH = 4, 11, 32


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def assert_same(expert: Expert, parts: dict[str, torch.Tensor]) -> None:
    """
    Args:
        parts: each (experts, ...), of all experts.
    """
    block = BlockLayout.of({name: (tuple(tensor.shape[1:]), "float32") for name, tensor in parts.items()})
    experts = len(next(iter(parts.values())))
    memory = torch.full((experts * block.nbytes,), 255, dtype=torch.uint8)  # NaN between parts
    blocks = [block.views(memory[e * block.nbytes : (e + 1) * block.nbytes]) for e in range(experts)]
    for e, views in enumerate(blocks):
        for name, view in views.items():
            view.copy_(parts[name][e])
    shape = expert.shape(LayerLayout(block, experts, 0, experts))
    assert (shape.experts, shape.d_model) == (experts, WIDTH)

    hidden, weights = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, 2)
    chosen = torch.rand(TOKENS, experts).topk(2, dim=1).indices
    groups = grouping.group(chosen, shape)
    table = torch.tensor([memory.data_ptr() + e * block.nbytes for e in range(experts)])
    counters = torch.zeros(2, experts, dtype=torch.int32)
    grouping.snapshot(groups, table, 0, 0, *counters)
    output = kernels.room(hidden, groups)
    kernels.run(hidden, weights, groups, output)
    output = kernels.combine(output, weights.shape[1])

    wanted = torch.zeros_like(hidden)
    for token in range(TOKENS):
        for k in range(2):
            wanted[token] += expert(blocks[chosen[token, k]], hidden[token : token + 1])[0] * weights[token, k]
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def door(family: str) -> None:
    torch.manual_seed(0)
    cls = architecture(family)
    model = cls(tiny_config(cls.config_class)).eval()
    roughen(model)
    name, module = next((name, module) for name, module in model.named_modules() if Door().find(model, name, module))
    parts = {part: getattr(module, part) for part in Door().find(model, name, module).shapes}
    assert_same(DoorExpert(module), parts)


@torch.inference_mode()
def two_linears(bias: bool) -> None:
    torch.manual_seed(0)
    parts = {"up": torch.randn(EXPERTS, 48, WIDTH) / 6, "down": torch.randn(EXPERTS, WIDTH, 48) / 6}
    if bias:
        parts |= {"up.bias": torch.randn(EXPERTS, 48), "down.bias": torch.randn(EXPERTS, WIDTH)}
    assert_same(TwoLinears("up", "down"), parts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "gemma4", "aria", "beam", "deepseek_v4", "phimoe"])
def test_families_behind_the_door(interpreter: Callable, family):
    interpreter(door, family)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_two_linears(interpreter: Callable, bias):
    interpreter(two_linears, bias)


def test_a_norm_after_each_expert_is_refused_on_a_gpu():
    with pytest.raises(ModelError, match="no GPU kernel"):
        door("muse_spark")
