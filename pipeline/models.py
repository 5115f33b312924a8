"""A transformers model on a device without its experts.

`describe` reads a model's config, and its safetensors headers if it has any, and says all that the three actors must know of it; it
loads no weights. `build` makes the model from that description and an arena: on the meta device first, so that no expert is ever
allocated, then with the backbone's weights from the arena.
"""

from __future__ import annotations

from collections.abc import Callable
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
from pipeline.families import FAMILIES, Family, MoELayer
from pipeline.hub import headers, local_checkpoint, local_tokenizer
from pipeline.recipes import RECIPES
from predictor.tokens import RoutingShape
from store.arena import Arena
from store.checkpoint import CheckpointSource
from store.errors import CheckpointError
from store.headers import Headers
from store.load import Placement
from store.random_weights import RandomWeights
from store.weights import Source, Weights

MakeMoE = Callable[[Family, nn.Module, int, int], nn.Module]
"""From a family, a MoE layer's own router, the layer's number and its stream: the module that stands in the layer's place."""
OWN_ARCHITECTURES: dict[str, type[PreTrainedModel]] = {
    "SwitchTransformersForSequenceClassification": SwitchTransformersForSequenceClassification
}


@dataclass(frozen=True)
class ModelSpec:
    """All that describes a model but its weights; travels to the actors."""

    source: Source
    """Where its weights come from; as a string, what messages call the model."""
    tokenizer: Path
    """A directory."""
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


def describe(config: ModelConfig, device: torch.device, only_headers: bool = False) -> tuple[ModelSpec, Weights]:
    """Reads a model's config and its checkpoint's headers, or what its random weights would be.

    Args:
        only_headers: read no value, and download none: what the config ties and the checkpoint has twice counts as tied.

    Raises:
        ModelError: no such model or tokenizer, a family that is not served, or a model without experts.
        CheckpointError: a damaged file, or a tensor that is missing or of a wrong shape.
    """
    directory, known = None, None
    if config.path is not None:
        directory, known = headers(config.path) if only_headers else (local_checkpoint(config.path), None)
    file = directory / "config.json" if directory else Path(config.config or "")
    pretrained = _read_config(file)
    model_type = pretrained.model_type
    if model_type not in FAMILIES:
        raise ModelError(f"{file}: model type {model_type!r} has no experts that are served; served: {', '.join(FAMILIES)}")
    architecture = (pretrained.architectures or ["none"])[0]
    model = on_meta(pretrained, architecture, str(file))
    source: Source = CheckpointSource(directory.absolute()) if directory else _random_weights(config, file, model)
    tokenizer = local_tokenizer(config.tokenizer) if config.tokenizer is not None else directory
    assert tokenizer is not None, "a config without model.path names a tokenizer"
    weights = known or source.open()
    layers, expert_shapes = _without_experts(model, _only_router)
    if not layers:
        raise ModelError(f"{source}: the model has no experts (no sparse layers in its config): nothing to offload")
    dtype: str = config.dtype
    if dtype == "auto":
        stored = weights.info(layers[0].experts[0]["wi"]).dtype
        dtype = "float32" if device.type == "cpu" else str(stored).removeprefix("torch.")
    for name, wanted in expert_shapes.items():
        _check_shape(weights, name, wanted)
    family = FAMILIES[model_type]
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return ModelSpec(
        source,
        tokenizer,
        pretrained.to_dict() | {"architectures": [architecture]},
        architecture,
        dtype,
        Placement(
            experts=tuple(layer.experts for layer in layers),
            backbone=_backbone(model, weights, file),
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
    ), weights


def build(spec: ModelSpec, arena: Arena, moe: MakeMoE, device: torch.device) -> PreTrainedModel:
    """The model in eval mode, `moe`'s modules in the place of its MoE layers, its backbone on `device`.

    On a CPU the backbone's tensors are the arena's own pages: no second copy, and never to be written.
    """
    model = on_meta(spec.pretrained_config(), spec.architecture, str(spec.source))
    _without_experts(model, moe)
    assign(model, {name: tensor.to(device) for name, tensor in arena.backbone().items()})
    return model


def on_meta(config: transformers.PretrainedConfig, architecture: str, file: str) -> PreTrainedModel:
    """A model of transformers, or one of ours, that has shapes and no values.

    Args:
        file: the config's, for messages.

    Raises:
        ModelError: no architecture of that name and of the config's family.
    """
    cls = OWN_ARCHITECTURES.get(architecture) or getattr(transformers, architecture, None)
    if cls is None or getattr(cls, "config_class", None) is not type(config):
        raise ModelError(f"{file}: architectures names {architecture!r}, which is no {config.model_type} of transformers")
    with torch.device("meta"):
        return cls(config)


def assign(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model from `on_meta` its values, by the model's own names, as they are; and puts it into eval mode."""
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    untied = {name: tensor for name, tensor in weights.items() if name in model.all_tied_weights_keys}
    model.load_state_dict(untied, strict=False, assign=True)  # tied by the config, stored with values of their own
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"{left[0]} has no value: describe() should have refused the checkpoint"
    model.eval().requires_grad_(False)


def _read_config(file: Path) -> transformers.PretrainedConfig:
    if not file.is_file():
        raise ModelError(f"{file}: no such file; model.config names a model's config.json, configs/models has some")
    try:
        return AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{file}: not a model config: {' '.join(str(error).split())}") from None


def _random_weights(config: ModelConfig, file: Path, model: PreTrainedModel) -> RandomWeights:
    """The weights that the config's recipe and seed give to every tensor of a whole model."""
    recipe = RECIPES[config.random.recipe or ""]
    own = [(name, tuple(t.shape)) for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys]
    dtype = model.config.dtype or torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{file}: dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    return RandomWeights(file, {name: recipe(name, shape) for name, shape in own}, dtype, config.random.seed)


def _without_experts(model: PreTrainedModel, moe: MakeMoE) -> tuple[list[MoELayer], dict[str, tuple[int, ...]]]:
    """Replaces every MoE layer of a model on the meta device; says what was there: the layers, and the shapes of their experts."""
    family = FAMILIES[model.config.model_type]
    layers = family.moe_layers(model)
    shapes = {name: tuple(model.get_parameter(name).shape) for layer in layers for e in layer.experts for name in e.values()}
    for i, layer in enumerate(layers):
        router = model.get_submodule(f"{layer.name}.router")
        model.set_submodule(layer.name, moe(family, router, i, layer.stream))
    return layers, shapes


def _only_router(family: Family, router: nn.Module, layer: int, stream: int) -> nn.Module:
    """In a model that is only described."""
    return nn.ModuleDict({"router": router})


def _backbone(model: PreTrainedModel, weights: Weights, file: Path) -> dict[str, str]:
    """The model's name of every backbone tensor that has to be loaded -> its name in the weights, shapes checked.

    A tensor that the config ties to another is loaded only if the weights have both with different values: transformers then
    does not tie them either.
    """
    tied: dict[str, str] = model.all_tied_weights_keys  # target -> source
    names = {}
    for name, tensor in model.state_dict().items():
        aliases = [target for target, source in tied.items() if source == name]
        stored = next((n for n in [name, *aliases] if n in weights.tensors), None)
        if stored is None:
            if name in tied:
                continue  # tie_weights makes it
            raise CheckpointError(f"{file.parent}: lacks the tensor {name}, which config.json asks for")
        _check_shape(weights, stored, tuple(tensor.shape))
        source = tied.get(name)
        if source is None or (source in weights.tensors and not _equal(weights, name, source)):
            names[name] = stored
    return names


def _equal(weights: Weights, name: str, other: str) -> bool:
    a, b = weights.info(name), weights.info(other)
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and (isinstance(weights, Headers) or torch.equal(weights.read(name), weights.read(other)))


def _check_shape(weights: Weights, name: str, wanted: tuple[int, ...]) -> None:
    info = weights.info(name)
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
