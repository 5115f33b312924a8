"""Checkpoints as they are published: per expert or fused, in shards, of any float type, quantised; and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.models import describe
from pipeline.weights.published import Published
from store.arena import Arena
from store.checkpoint import INDEX, SINGLE
from store.errors import CheckpointError
from tests.pipeline.test_families import CPU, Served, assert_exact, make_batches
from tests.pipeline.tiny_families import architecture, save_tiny


def load(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return architecture(family).from_pretrained(directory, dtype=dtype).eval()


def assert_served(tmp_path: Path, directory: Path, whole: PreTrainedModel) -> None:
    served = Served(directory, tmp_path)
    with served.store():
        assert_exact(served, whole, make_batches())


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_served_as_transformers_loads_it(tmp_path, family, dtype):
    save_tiny(family, tmp_path / "model", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / SINGLE).values()} == {dtype}
    assert_served(tmp_path, tmp_path / "model", load(tmp_path / "model", family))


def test_shards_are_served(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "one")
    load(tmp_path / "one", "qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(set(json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"].values())) > 2
    assert_served(tmp_path, tmp_path / "model", load(tmp_path / "model", "qwen3_moe"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_may_be_stored_fused_as_the_model_has_them(tmp_path, family):
    save_tiny(family, tmp_path / "model")
    assert any("experts.3." in name for name in load_file(tmp_path / "model" / SINGLE)), "published one by one"
    whole = load(tmp_path / "model", family)
    save_file({name: t.contiguous() for name, t in whole.state_dict().items()}, tmp_path / "model" / SINGLE, {"format": "pt"})
    assert_served(tmp_path, tmp_path / "model", whole)


def test_what_a_model_keeps_in_float32_stays_there(tmp_path):
    """A router's correction bias decides between near scores: rounded, it would route otherwise."""
    save_tiny("glm4_moe", tmp_path / "model", dtype=torch.bfloat16)
    spec, weights = describe(ModelConfig(str(tmp_path / "model"), "bfloat16"), CPU)
    theirs = {n: str(t.dtype) for n, t in load(tmp_path / "model", "glm4_moe", torch.bfloat16).state_dict().items()}
    ours = {part.name: f"torch.{part.dtype}" for part in spec.placement.layout(weights).backbone}
    assert "torch.float32" in ours.values()
    assert ours == {name: theirs[name] for name in ours}


def test_an_expert_is_one_contiguous_block(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    whole = load(tmp_path / "model", "qwen3_moe").state_dict()
    served = Served(tmp_path / "model", tmp_path)
    with served.store():
        arena = Arena.attach(served.arena)
        block = arena.layout.layers[1].block
        assert [part.name for part in block.parts] == ["gate_up_proj", "down_proj"]
        for part, view in block.views(arena.block(1, 5)).items():
            assert torch.equal(view, whole[f"model.layers.1.mlp.experts.{part}"][5])
        arena.close()


def test_loading_holds_one_expert_at_a_time(tmp_path, monkeypatch):
    save_tiny("qwen3_moe", tmp_path / "model")
    spec, weights = describe(ModelConfig(str(tmp_path / "model")), CPU)
    sizes = []
    convert = Published._convert

    def watched(self, step, tensors, expert):
        made = convert(self, step, tensors, expert)
        sizes.extend(value.shape[0] for value in made.values() if expert is not None)
        return made

    monkeypatch.setattr(Published, "_convert", watched)
    for layer in spec.placement.experts:
        for expert in layer:
            for name in expert.values():
                weights.read(name)
    assert set(sizes) == {1}
    assert len(sizes) == 2 * 8 * 2


# quantised


def quantise_fp8(directory: Path, block: int = 8) -> dict[str, torch.Tensor]:
    """Replaces every projection by FP8 and scales per square block; returns what they mean, by name."""
    tensors, meant = {}, {}
    for name, tensor in load_file(directory / SINGLE).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = meant[name] = tensor
            continue
        rows, columns = tensor.shape
        squares = tensor.view(rows // block, block, columns // block, block)
        scale = squares.abs().amax(dim=(1, 3)) / 448
        tensors[name] = (squares / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        dequantised = tensors[name].float().view(squares.shape) * scale[:, None, :, None]
        meant[name] = dequantised.reshape(rows, columns)
    save_file(tensors, directory / SINGLE, {"format": "pt"})
    change_config(
        directory, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    )
    return meant


def test_fp8_is_dequantised_into_the_arena(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    save_tiny("qwen3_moe", tmp_path / "meant")
    save_file(quantise_fp8(tmp_path / "model"), tmp_path / "meant" / SINGLE, {"format": "pt"})
    assert load_file(tmp_path / "model" / SINGLE)["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert_served(tmp_path, tmp_path / "model", load(tmp_path / "meant", "qwen3_moe"))


def test_mxfp4_experts_are_dequantised_into_the_arena(tmp_path):
    save_tiny("gpt_oss", tmp_path / "model")
    save_tiny("gpt_oss", tmp_path / "meant")
    tensors = load_file(tmp_path / "model" / SINGLE)
    meant = dict(tensors)
    for name, tensor in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, max(1, inputs // 32), min(16, inputs // 2)), dtype=torch.uint8)
            scales = torch.randint(123, 126, blocks.shape[:-1], dtype=torch.uint8)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert meant[name].shape == tensor.shape
    save_file(tensors, tmp_path / "model" / SINGLE, {"format": "pt"})
    save_file(meant, tmp_path / "meant" / SINGLE, {"format": "pt"})
    change_config(tmp_path / "model", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]})
    assert_served(tmp_path, tmp_path / "model", load(tmp_path / "meant", "gpt_oss"))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_quantised_formats_are_refused_by_name(tmp_path, method):
    save_tiny("qwen3_moe", tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"quantised with '{method}'.*fp8, mxfp4") as refused:
        describe(ModelConfig(str(tmp_path / "model")), CPU)
    assert str(tmp_path / "model") in str(refused.value)


# damaged


def test_a_missing_expert_is_named(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    for part in ("gate", "up", "down"):
        del tensors[f"model.layers.1.mlp.experts.7.{part}_proj.weight"]
    save_file(tensors, tmp_path / "model" / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts.*7 experts, config\.json asks for 8"):
        describe(ModelConfig(str(tmp_path / "model")), CPU)


def test_an_expert_of_another_shape_is_named(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    change_config(tmp_path / "model", moe_intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"gate_up_proj\[0\] has shape \[32, 32\], config\.json asks for \[48, 32\]"):
        describe(ModelConfig(str(tmp_path / "model")), CPU)


def test_infinite_weights_are_named(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model" / SINGLE, {"format": "pt"})
    _, weights = describe(ModelConfig(str(tmp_path / "model")), CPU)
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or infinite"):
        weights.read("model.layers.0.mlp.experts.gate_up_proj[2]")
