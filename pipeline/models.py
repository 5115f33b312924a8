"""A transformers model on a device without its experts.

`describe` reads config.json and safetensors headers and says all that the three actors must know of a model; it loads no weights.
`build` makes the model from that description and an arena: on the meta device first, so that no expert is ever
allocated, then with the backbone's weights from the arena.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from pipeline.classifier import SwitchTransformersForSequenceClassification
from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.experts import Current, SlotMoE
from pipeline.families import FAMILIES, Family, MoELayer
from pipeline.hub import local_checkpoint
from predictor.tokens import RoutingShape
from store.arena import Arena
from store.checkpoint import Checkpoint
from store.copies import CopyEngine
from store.errors import CheckpointError
from store.load import Placement

OWN_ARCHITECTURES = {"SwitchTransformersForSequenceClassification": SwitchTransformersForSequenceClassification}


@dataclass(frozen=True)
class ModelSpec:
    """All that describes a model but its weights; travels to the actors."""

    directory: Path
    config: dict[str, Any]
    """config.json, complete."""
    architecture: str
    dtype: str
    placement: Placement
    shape: RoutingShape
    embedding: str
    """The name of the input embeddings' weight in the arena's backbone."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.config["model_type"]]

    @property
    def is_encoder_decoder(self) -> bool:
        return self.architecture.endswith("ForConditionalGeneration")

    def pretrained_config(self) -> transformers.PretrainedConfig:
        return AutoConfig.for_model(**self.config)


def describe(config: ModelConfig, device: torch.device) -> tuple[ModelSpec, Checkpoint]:
    """Reads a model's config.json and its checkpoint's headers.

    Raises:
        ModelError: no such model, a family that is not served, or a model without experts.
        CheckpointError: a damaged file, or a tensor that is missing or of a wrong shape.
    """
    directory = local_checkpoint(config.path)
    try:
        pretrained = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{directory / 'config.json'}: not a model config: {' '.join(str(error).split())}") from None
    model_type = pretrained.model_type
    if model_type not in FAMILIES:
        raise ModelError(f"{directory}: model type {model_type!r} has no experts that are served; served: {', '.join(FAMILIES)}")
    architecture = (pretrained.architectures or ["none"])[0]
    checkpoint = Checkpoint(directory)
    model, layers, expert_shapes = _skeleton(pretrained, architecture, None, Current(), directory)
    if not layers:
        raise ModelError(f"{directory}: the model has no experts (no sparse layers in config.json): nothing to offload")
    dtype: str = config.dtype
    if dtype == "auto":
        stored = checkpoint.info(layers[0].experts[0]["wi"]).dtype
        dtype = "float32" if device.type == "cpu" else str(stored).removeprefix("torch.")
    for name, wanted in expert_shapes.items():
        _check_shape(checkpoint, name, wanted)
    family = FAMILIES[model_type]
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return ModelSpec(
        directory,
        pretrained.to_dict() | {"architectures": [architecture]},
        architecture,
        dtype,
        Placement(
            experts=tuple(layer.experts for layer in layers),
            backbone=_backbone(model, checkpoint),
            dtype=dtype,
            routers=tuple(f"{layer.name}.{n}" for layer in layers for n in _router_tensors(model, layer)),
        ),
        RoutingShape(
            experts=tuple(len(layer.experts) for layer in layers),
            streams=tuple(layer.stream for layer in layers),
            top_k=family.top_k,
            vocab_size=pretrained.vocab_size,
        ),
        embedding,
    ), checkpoint


def build(spec: ModelSpec, arena: Arena, engine: CopyEngine, current: Current, device: torch.device) -> PreTrainedModel:
    """The model in eval mode, its experts read through `engine`, its backbone on `device`.

    On a CPU the backbone's tensors are the arena's own pages: no second copy, and never to be written.
    """
    model, _, _ = _skeleton(spec.pretrained_config(), spec.architecture, engine, current, spec.directory)
    weights = {name: tensor.to(device) for name, tensor in arena.backbone().items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    untied = {name: tensor for name, tensor in weights.items() if name in model.all_tied_weights_keys}
    model.load_state_dict(untied, strict=False, assign=True)  # tied by the config, stored with values of their own
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"{left[0]} has no value: describe() should have refused the checkpoint"
    return model.eval().requires_grad_(False)


def _skeleton(
    config: transformers.PretrainedConfig, architecture: str, engine: CopyEngine | None, current: Current, directory: Path
) -> tuple[PreTrainedModel, list[MoELayer], dict[str, tuple[int, ...]]]:
    """The model on the meta device with a SlotMoE in the place of every MoE layer; and the shapes of what was there."""
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        model = _model_class(architecture, config, directory)(config)
    layers = family.moe_layers(model)
    shapes = {name: tuple(model.get_parameter(name).shape) for layer in layers for e in layer.experts for name in e.values()}
    for i, layer in enumerate(layers):
        router = model.get_submodule(f"{layer.name}.router")
        model.set_submodule(layer.name, SlotMoE(family, router, i, layer.stream, engine, current))
    return model, layers, shapes


def _model_class(architecture: str, config: transformers.PretrainedConfig, directory: Path) -> type[PreTrainedModel]:
    if architecture in OWN_ARCHITECTURES:
        return OWN_ARCHITECTURES[architecture]
    found = getattr(transformers, architecture, None)
    if found is None or getattr(found, "config_class", None) is not type(config):
        raise ModelError(
            f"{directory / 'config.json'}: architectures names {architecture!r}, which is no {config.model_type} of transformers"
        )
    return found


def _backbone(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The model's name of every backbone tensor that has to be loaded -> its name in the checkpoint, shapes checked.

    A tensor that the config ties to another is loaded only if the checkpoint holds both with different values: transformers then
    does not tie them either.
    """
    tied: dict[str, str] = model.all_tied_weights_keys  # target -> source
    names = {}
    for name, tensor in model.state_dict().items():
        aliases = [target for target, source in tied.items() if source == name]
        stored = next((n for n in [name, *aliases] if n in checkpoint.tensors), None)
        if stored is None:
            if name in tied:
                continue  # tie_weights makes it
            raise CheckpointError(f"{checkpoint.directory}: lacks the tensor {name}, which config.json asks for")
        _check_shape(checkpoint, stored, tuple(tensor.shape))
        source = tied.get(name)
        if source is None or (source in checkpoint.tensors and not _equal(checkpoint, name, source)):
            names[name] = stored
    return names


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    a, b = checkpoint.info(name), checkpoint.info(other)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(checkpoint.read(name), checkpoint.read(other))


def _check_shape(checkpoint: Checkpoint, name: str, wanted: tuple[int, ...]) -> None:
    info = checkpoint.info(name)
    if info.shape != wanted:
        raise CheckpointError(f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(wanted)}")


def _router_tensors(model: nn.Module, layer: MoELayer) -> list[str]:
    router = model.get_submodule(f"{layer.name}.router")
    return [f"router.{name}" for name in router.state_dict()]


def load_embedding(arena_path: Path, name: str) -> torch.Tensor:
    """The model's input embeddings from an arena, (vocab_size, d_model): what predictors read.

    A copy, since a predictor has no lock on the arena.
    """
    arena = Arena.attach(arena_path)
    assert arena is not None, arena_path
    embedding = arena.backbone()[name].clone()
    arena.close()
    return embedding
