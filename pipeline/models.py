"""A transformers model on a device without its experts.

`describe` reads a model's config, and its safetensors headers if it has any, and says all that the three actors must know of it; it
loads no weights. `build` makes the model from that description and an arena: on the meta device first, so that no expert is ever
allocated, then with the backbone's weights from the arena.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.families.adapters import nobody, serve
from pipeline.families.door import NAME, stacked
from pipeline.routing import MakeExperts, MoELayer
from pipeline.weights.empty import assign, kept_dtypes, on_meta
from pipeline.weights.hub import headers, local_checkpoint, local_tokenizer
from pipeline.weights.published import PublishedSource
from pipeline.weights.recipes import RECIPES
from predictor.tokens import RoutingShape
from store.arena import Arena
from store.checkpoint import Checkpoint
from store.errors import CheckpointError
from store.headers import Headers
from store.layout import torch_dtype
from store.load import Placement
from store.random_weights import RandomWeights
from store.weights import Source, Weights

_BACKBONES: WeakKeyDictionary[Arena, dict[torch.device, dict[str, torch.Tensor]]] = WeakKeyDictionary()
"""By where they are: those that `build` has brought to a device."""


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
    stop: tuple[int, ...] = ()
    """Ids with which it ends what it writes."""

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.get("is_encoder_decoder")) and self.architecture.endswith("ForConditionalGeneration")

    @property
    def context(self) -> int | None:
        """The most tokens that it can read; None: its positions have no end."""
        context = getattr(self.pretrained_config().get_text_config(), "max_position_embeddings", None)
        return context if isinstance(context, int) and context > 0 else None

    @property
    def may_pad(self) -> bool:
        """Whether a batch may be padded further than it has to: not where a router's capacity counts all tokens of the batch."""
        return self.config["model_type"] != "nllb-moe"

    @property
    def generates(self) -> bool:
        """Whether it writes text."""
        cls = getattr(transformers, self.architecture, None)
        return cls is not None and cls.can_generate()

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
    directory: Path | None = None
    checkpoint: Checkpoint | Headers | None = None
    if config.path is not None and only_headers:
        directory, checkpoint = headers(config.path)
    elif config.path is not None:
        directory = local_checkpoint(config.path)
        checkpoint = Checkpoint(directory.absolute())
    file = directory / "config.json" if directory else Path(config.config or "")
    pretrained = _read_config(file)
    architecture = (pretrained.architectures or ["none"])[0]
    dtype = _dtype(config.dtype, device, pretrained, checkpoint)
    model = on_meta(pretrained, architecture, str(file), torch_dtype(dtype))
    source: Source
    if checkpoint is not None:
        assert directory is not None
        source = published = PublishedSource(directory.absolute(), pretrained.to_dict(), architecture, dtype)
        weights: Weights = published.of(checkpoint)
    else:
        source = weights = _random_weights(config, file, model)
    tokenizer = local_tokenizer(config.tokenizer) if config.tokenizer is not None else directory
    assert tokenizer is not None, "a config without model.path names a tokenizer"
    layers = serve(model, nobody)
    if not layers:
        raise ModelError(
            f"{source}: the model has no experts that are served (model type {pretrained.model_type!r}, {architecture}): nothing "
            "to offload; docs/models.md lists the families that have some"
        )
    for layer in layers:
        for expert in layer.experts:
            for part, name in expert.items():
                _check_shape(weights, name, layer.shapes[part])
    kept = kept_dtypes(model, torch_dtype(dtype))
    backbone = _backbone(model, weights, file, only_headers)
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return ModelSpec(
        source,
        tokenizer,
        pretrained.to_dict() | {"architectures": [architecture]},
        architecture,
        dtype,
        Placement(
            experts=tuple(layer.experts for layer in layers),
            backbone=backbone,
            dtype=dtype,
            routers=tuple(dict.fromkeys(name for layer in layers for name in _router_tensors(model, layer, backbone))),
            kept={name: str(kept[name]).removeprefix("torch.") for name in backbone if name in kept},
        ),
        RoutingShape(
            experts=tuple(len(layer.experts) for layer in layers),
            streams=tuple(layer.stream for layer in layers),
            top_k=max(layer.top_k for layer in layers),
            vocab_size=pretrained.get_text_config().vocab_size,
        ),
        embedding,
        _stop(pretrained, directory),
    ), weights


def _stop(config: transformers.PretrainedConfig, directory: Path | None) -> tuple[int, ...]:
    """As generation_config.json says, where there is one; else as the config does."""
    try:
        stop = GenerationConfig.from_pretrained(directory).eos_token_id if directory is not None else None
    except (OSError, ValueError, TypeError):
        stop = None
    stop = stop if stop is not None else getattr(config.get_text_config(), "eos_token_id", None)
    return tuple(stop) if isinstance(stop, list | tuple) else (stop,) if stop is not None else ()


def build(spec: ModelSpec, arena: Arena, make: MakeExperts, device: torch.device) -> PreTrainedModel:
    """The model in eval mode, `make`'s experts in the place of its own, its backbone on `device`.

    On a CPU the backbone's tensors are the arena's own pages: no second copy, and never to be written. On a device all models that
    are built of one `Arena` share one copy.
    """
    model = on_meta(spec.pretrained_config(), spec.architecture, str(spec.source), torch_dtype(spec.dtype))
    if stacked(model):
        model.set_experts_implementation(NAME)
    serve(model, make)
    there = _BACKBONES.setdefault(arena, {})
    if device not in there:
        there[device] = {name: tensor.to(device) for name, tensor in arena.backbone().items()}
    assign(model, there[device], device)
    return model


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
    experts = stacked(model)
    own: list[tuple[str, tuple[int, ...]]] = []
    for name, tensor in model.state_dict().items():
        if name in experts:
            own += [(f"{name}[{expert}]", tuple(tensor.shape[1:])) for expert in range(experts[name])]
        elif name not in model.all_tied_weights_keys:
            own.append((name, tuple(tensor.shape)))
    dtype = model.config.dtype or torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{file}: dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    return RandomWeights(file, {name: recipe(name, shape) for name, shape in own}, dtype, config.random.seed)


def _dtype(
    wanted: str, device: torch.device, config: transformers.PretrainedConfig, checkpoint: Checkpoint | Headers | None
) -> str:
    """What `model.dtype` means: auto is float32 on a CPU; on a GPU as stored, and what was quantised as its config says."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "float32"
    sizes: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values() if checkpoint is not None else ():
        if info.dtype.is_floating_point and 1 < info.dtype.itemsize < 8:
            sizes[info.dtype] += info.nbytes
    quantised = getattr(config, "quantization_config", None) is not None
    stored = config.dtype or torch.bfloat16 if quantised or not sizes else sizes.most_common(1)[0][0]
    return str(stored).removeprefix("torch.")


def _backbone(model: PreTrainedModel, weights: Weights, file: Path, only_headers: bool) -> dict[str, str]:
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
        if source is None or (source in weights.tensors and not _equal(weights, name, source, only_headers)):
            names[name] = stored
    return names


def _equal(weights: Weights, name: str, other: str, only_headers: bool) -> bool:
    a, b = weights.info(name), weights.info(other)
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and (only_headers or torch.equal(weights.read(name), weights.read(other)))


def _check_shape(weights: Weights, name: str, wanted: tuple[int, ...]) -> None:
    info = weights.info(name)
    if info.shape != wanted:
        raise CheckpointError(f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(wanted)}")


def _router_tensors(model: PreTrainedModel, layer: MoELayer, backbone: dict[str, str]) -> list[str]:
    """The weights' names of what tells one router from another: what beside the experts has a row for each."""
    state = {n: t for n, t in model.get_submodule(layer.router).state_dict().items() if f"{layer.router}.{n}" in backbone}
    rows = [name for name, tensor in state.items() if tensor.shape[:1] == (len(layer.experts),)]
    return [backbone[f"{layer.router}.{name}"] for name in rows or state]


def load_embedding(arena_path: Path, name: str) -> torch.Tensor:
    """The model's input embeddings from an arena, (vocab_size, d_model): what predictors read.

    A copy, since a predictor has no lock on the arena.
    """
    arena = Arena.attach(arena_path)
    assert arena is not None, arena_path
    embedding = arena.backbone()[name].clone()
    arena.close()
    return embedding
