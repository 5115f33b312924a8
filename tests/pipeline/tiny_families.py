"""Tiny random checkpoints of every family that transformers routes through its door for experts, saved as published ones are."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_n_heads": 4, "mamba_dt_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "index_head_dim": 8, "index_n_heads": 4, "index_topk": 64,
    "moe_hidden_size": 16, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "router_hidden_size": 16,
}  # fmt: skip
SMALL_TOWER = {
    "depth": 1, "num_heads": 4, "num_layers": 1, "num_hidden_layers": 1, "patch_size": 8, "image_size": 32, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32, "projector_hidden_size": 32,
    "pos_emb_height": 4, "pos_emb_width": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "d_model": 32, "num_mel_bins": 16, "output_dim": 32,
    "max_source_positions": 32, "downsample_hidden_size": 8, "hidden_dim": 32, "mlp_dim": 32, "projection_intermediate_size": 32,
    "position_embedding_size": 64, "output_proj_dims": 32, "global_attn_indexes": [0], "output_channels": 8,
}  # fmt: skip
"""Of vision and audio, which no text reaches."""
LINEAR_AND_FULL = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
OTHERWISE: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": LINEAR_AND_FULL,
    "BeamConfig": {"num_hidden_layers": 4},
    "DeepseekOcr2TextConfig": {"n_group": None, "topk_group": None, "mlp_layer_types": ["dense", "sparse"]},
    "DeepseekV3Config": {"num_hidden_layers": 4},
    "DeepseekV32Config": {"num_hidden_layers": 4},
    "Dots1Config": {"n_shared_experts": 1},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 8], "rope_parameters": MROPE},
    "FlintConfig": {"num_hidden_layers": 4},
    "Gemma4TextConfig": {"enable_moe_block": True, "num_hidden_layers": 2},
    "Glm4vMoeTextConfig": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "head_dim": 0, "num_hidden_layers": 4},
    "GlmMoeDsaConfig": {"num_hidden_layers": 4},
    "GraniteMoeHybridConfig": {**LINEAR_AND_FULL, "mamba_n_heads": 4, "mamba_expand": 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "KimiLinearConfig": {**LINEAR_AND_FULL, "q_lora_rank": None, "mlp_layer_types": ["dense", "sparse"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MiMoV2FlashConfig": {"layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 2},
    "MuseSparkConfig": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "patch_sizes": [4, 2, 2, 2], "hidden_sizes": [8] * 4, "depths": [1] * 4},
    "NemotronHConfig": {"n_groups": 2, "moe_shared_expert_intermediate_size": 16, "expand": 2},
    "PixtralVisionConfig": {"head_dim": 8},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 120},  # a published config.json has it
    "Qwen3NextConfig": LINEAR_AND_FULL,
    "Qwen3_5MoeTextConfig": LINEAR_AND_FULL,
    "Qwen4ExpTextConfig": {**LINEAR_AND_FULL, "hc_lowrank": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                           "indexer_budget": 64, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid"},
    "ZayaConfig": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family's config needs beside or instead."""
ARCHITECTURES = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}
"""Where a modelling file has several with experts: the one that reads and writes text."""
SEEING = {
    "aria": "AriaForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "inkling": "InklingForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
"""Second classes of families whose first reads text only: with a vision tower, which no text reaches."""
WRITERS = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")


def families() -> list[str]:
    """The modelling files of the installed transformers that decorate their experts, by their names."""
    models = Path(transformers.__file__).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if re.search(r"^@use_experts_implementation", file.read_text(), re.MULTILINE)]


def architecture(family: str) -> type[PreTrainedModel]:
    """The family's class that reads text: for causal language modelling if there is one."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in ARCHITECTURES:
        return getattr(module, ARCHITECTURES[family])
    for suffix in WRITERS:
        names = [
            n for n, c in vars(module).items() if n.endswith(suffix) and inspect.isclass(c) and c.__module__ == module.__name__
        ]
        if names:
            return getattr(module, min(names, key=len))
    raise AssertionError(f"{family} has no model that reads text")


def tiny_config(cls: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """Every size that the class knows made small, its sub-configs' too."""
    known = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    settings = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:
        settings.pop("head_dim", None)
    if any(word in cls.__name__.lower() for word in ("vision", "audio", "sam")):
        settings |= {name: value for name, value in SMALL_TOWER.items() if name in known}
    for name, sub in cls.sub_configs.items():
        kind = getattr(sub, "model_type", "") or getattr(getattr(cls, "sub_configs_defaults", {}).get(name), "model_type", "")
        if kind:
            settings[name] = tiny_config(sub if getattr(sub, "model_type", "") else CONFIG_MAPPING[kind])
    return cls(**settings | OTHERWISE.get(cls.__name__, {}) | changes)


def save_tiny(
    family: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, seeing: bool = False, **changes: Any
) -> type[PreTrainedModel]:
    """Writes a random checkpoint with the names that the family's published ones have; returns its class.

    Args:
        seeing: of the class in `SEEING`.
        changes: of the config.
    """
    cls = getattr(transformers, SEEING[family]) if seeing else architecture(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(tiny_config(cls.config_class, **changes)).parameters())
    assert size < 2**23, f"{family}: {size} parameters are not tiny; something in its config is missing in SMALL"
    torch.manual_seed(seed)
    model = cls(tiny_config(cls.config_class, **changes)).eval()
    roughen(model)
    model.to(dtype).save_pretrained(directory)
    return cls


@torch.no_grad()
def roughen(model: PreTrainedModel) -> None:
    """Numbers wide enough that every expert matters to the answer, and no bias is zero."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
