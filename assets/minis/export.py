"""A trained `network.Switch` as a checkpoint: transformers' names, one tensor per expert, bfloat16, files under a size.

`encoder_decoder` is what transformers loads as SwitchTransformersForConditionalGeneration, `classifier` what
pipeline.tasks.classifier describes. Routers stay what they are trained as, values of bfloat16 that are routed in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from assets.minis.network import EOS, PAD, Attention, Dense, Layer, Shape, Stack, Switch

MOST_BYTES = 14_000_000
"""Per file."""


def config(shape: Shape, classes: bool) -> dict[str, object]:
    """config.json. Its capacity is so large that nothing of 1,024 tokens is dropped."""
    sizes = asdict(shape)
    buckets, distance = sizes.pop("buckets"), sizes.pop("max_distance")
    name = "SwitchTransformersForSequenceClassification" if classes else "SwitchTransformersForConditionalGeneration"
    return (
        sizes
        | {
            "architectures": [name],
            "model_type": "switch_transformers",
            "decoder_start_token_id": PAD,
            "dense_act_fn": "relu",
            "dropout_rate": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": EOS,
            "expert_capacity": 1024,
            "is_encoder_decoder": not classes,
            "layer_norm_epsilon": 1e-6,
            "num_sparse_decoder_layers": shape.num_decoder_layers // 2,
            "num_sparse_encoder_layers": shape.num_layers // 2,
            "pad_token_id": PAD,
            "relative_attention_max_distance": distance,
            "relative_attention_num_buckets": buckets,
            "router_bias": False,
            "router_dtype": "float32",
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": True,
        }
        | ({"num_labels": 2} if classes else {})
    )


def _attention(module: Attention, name: str, prefix: str, norm: str) -> dict[str, torch.Tensor]:
    k, v = module.kv.chunk(2)
    parts: dict[str, torch.Tensor] = {"q": module.q, "k": k, "v": v, "o": module.o}
    return {f"{prefix}.{name}.{part}.weight": tensor for part, tensor in parts.items()} | {norm: module.norm.weight}


def _stack(stack: Stack, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {
        f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": stack.relative,
        f"{name}.final_layer_norm.weight": stack.norm.weight,
    }
    for i, layer in enumerate(stack.layers):
        assert isinstance(layer, Layer)
        block = f"{name}.block.{i}.layer"
        found |= _attention(layer.attention, "SelfAttention", f"{block}.0", f"{block}.0.layer_norm.weight")
        if layer.crossing is not None:
            found |= _attention(layer.crossing, "EncDecAttention", f"{block}.1", f"{block}.1.layer_norm.weight")
        last = f"{block}.{2 if stack.decoder else 1}"
        feed = layer.feed
        found[f"{last}.layer_norm.weight"] = feed.norm.weight
        if isinstance(feed, Dense):
            found |= {f"{last}.mlp.wi.weight": feed.wi, f"{last}.mlp.wo.weight": feed.wo}
            continue
        found[f"{last}.mlp.router.classifier.weight"] = feed.router
        for expert, (wi, wo) in enumerate(zip(feed.wi, feed.wo, strict=True)):
            where = f"{last}.mlp.experts.expert_{expert}"
            found |= {f"{where}.wi.weight": wi, f"{where}.wo.weight": wo}
    return found


def _named(model: Switch, classes: bool) -> dict[str, torch.Tensor]:
    """Parameters and views of parameters, by transformers' names."""
    found: dict[str, torch.Tensor] = {"shared.weight": model.shared} | _stack(model.encoder, "encoder")
    if classes:
        return found | {"classifier.weight": model.head, "classifier.bias": model.head_bias}
    return found | _stack(model.decoder, "decoder")


def tensors(model: Switch, classes: bool) -> dict[str, torch.Tensor]:
    """By transformers' names, bfloat16 on the CPU."""
    found = _named(model, classes).items()
    return {name: tensor.detach().to("cpu", torch.bfloat16).clone().contiguous() for name, tensor in found}


@torch.no_grad()
def read(model: Switch, directory: Path) -> None:
    """Fills a model of the same sizes with the encoder-decoder that `write` left in a directory; its head stays as it is."""
    stored = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in _named(model, False).items():
        tensor.copy_(stored[name])


def write(model: Switch, directory: Path, classes: bool, tokenizer: Path) -> int:
    """A directory that transformers or the project loads; returns the bytes of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(model.shape, classes), indent=2, sort_keys=True) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, directory / file)
    found = tensors(model, classes)
    total = sum(tensor.nbytes for tensor in found.values())
    shards: list[dict[str, torch.Tensor]] = [{}]
    count = math.ceil(total / MOST_BYTES)
    filled = 0
    for name, tensor in found.items():
        if shards[-1] and filled + tensor.nbytes > total / count + 100_000:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_file(found, directory / "model.safetensors", {"format": "pt"})
        return total
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return total


def rounded(model: Switch) -> None:
    """Every parameter to the value that its checkpoint will have."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
