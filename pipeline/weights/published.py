"""A checkpoint as it was published, read by the names of transformers' model, one expert at a time.

Published names differ from a model's: experts one by one or fused, projections split, renamed, rotated, quantised. transformers
says how to convert each family's (`conversion_mapping`), for whole layers at once. Here its operations are given one expert's
tensors, or one expert's slice of a fused tensor, so that loading holds no more than an expert of its own. An expert's part is
called by the name of the model's 3-D parameter and the expert's number: "model.layers.0.mlp.experts.gate_up_proj[3]".

Published MXFP4 and FP8 weights are dequantised (quantised.py) by transformers' own functions, the same way.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from pipeline.families.door import stacked
from pipeline.weights.empty import kept_dtypes, on_meta
from pipeline.weights.quantised import dequantizer
from store.checkpoint import Checkpoint
from store.errors import CheckpointError
from store.headers import Headers
from store.layout import torch_dtype
from store.weights import TensorInfo


@dataclass(frozen=True)
class PublishedSource:
    """How to open a published checkpoint, wherever (store.weights.Source).

    Attributes:
        directory: absolute: who opens it may work in another directory.
        config: config.json, complete.
        dtype: of the model that is made of it.
    """

    directory: Path
    config: dict[str, Any]
    architecture: str
    dtype: str

    def open(self) -> Published:
        return self.of(Checkpoint(self.directory))

    def of(self, checkpoint: Checkpoint | Headers) -> Published:
        """With what is known of the checkpoint, in whole or by its headers."""
        config = AutoConfig.for_model(**copy.deepcopy(self.config))
        model = on_meta(config, self.architecture, str(self.directory / "config.json"), torch_dtype(self.dtype))
        return Published(checkpoint, model, torch_dtype(self.dtype))

    def __str__(self) -> str:
        return str(self.directory)


@dataclass
class Step:
    """How some tensors of the model are made of some of the checkpoint's.

    Attributes:
        first: the model's name of the first tensor that comes out.
        sources: pattern of the converter -> the checkpoint's names that match it, in their order.
        converter: None: there is one source, and it is only called differently.
        experts: how many experts' slices `first` has; 0: it is no experts' tensor.
    """

    first: str
    sources: dict[str, list[str]]
    converter: WeightConverter | None
    experts: int


class Published:
    """A checkpoint by its model's names, as Weights (store.weights)."""

    def __init__(self, checkpoint: Checkpoint | Headers, model: PreTrainedModel, dtype: torch.dtype):
        """Reads no weights.

        Args:
            model: on the meta device, whole.

        Raises:
            CheckpointError: experts that are not as many as the model has, or tensors that cannot be converted.
            ModelError: a quantised checkpoint that is not served.
        """
        self._checkpoint, self._model, self._dtype = checkpoint, model, dtype
        self._kept = kept_dtypes(model, dtype)
        self._buffers = {name for name, _ in model.named_buffers()}  # a limit may well be infinite
        self._quantizer = dequantizer(model, checkpoint.directory)
        self._places: dict[str, tuple[Step, str, int | None]] = {}
        tensors: dict[str, TensorInfo] = {}
        for step in self._steps():
            tensors |= self._describe(step)
        self.tensors: Mapping[str, TensorInfo] = tensors
        made_by = f"{checkpoint.fingerprint} {transformers.__version__} {type(model).__name__}"  # whose conversions these are
        self.fingerprint = hashlib.sha256(made_by.encode()).hexdigest()

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self._checkpoint.directory}: lacks the tensor {name}")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        info = self.info(name)
        out = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.info(name)
        step, target, expert = self._places[name]
        if step.converter is None:
            self._checkpoint.read_into(next(iter(step.sources.values()))[0], out, expert, finite=name not in self._buffers)
            return
        tensors = {pattern: [self._source(step, *where) for where in self._of(step, pattern, expert)] for pattern in step.sources}
        value = self._convert(step, tensors, expert)[target]
        value = value if expert is None else value[0]
        if value.shape != out.shape:
            raise CheckpointError(f"{self.info(name).file}: {name} has shape {list(value.shape)}, not {list(out.shape)}")
        out.copy_(value)
        if not torch.isfinite(out).all():
            raise CheckpointError(f"{self.info(name).file}: {name} holds NaN or infinite weights; the checkpoint is damaged")

    def sample(self) -> str:
        return self._checkpoint.sample()

    def _steps(self) -> list[Step]:
        """As `transformers.core_model_loading.convert_and_load_state_dict_in_model` gathers them."""
        model = self._model
        mapping = get_model_conversion_mapping(model, None, self._quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, known, experts = model.base_model_prefix, model.state_dict(), stacked(model)
        steps: dict[str, Step] = {}
        for key in sorted(self._checkpoint.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name in known:
                converter = converter_of[pattern] if pattern is not None else None
                step = steps.setdefault(name, Step(name, {}, converter, experts.get(name, 0)))
                step.sources.setdefault(pattern or key, []).append(key)
        return list(steps.values())

    def _of(self, step: Step, pattern: str, expert: int | None) -> list[tuple[str, int | None]]:
        """Which of a pattern's tensors, and which row of them, go into one expert."""
        keys = step.sources[pattern]
        if expert is None:
            return [(key, None) for key in keys]
        if len(keys) == 1 and (step.experts > 1 or len(self._checkpoint.info(keys[0]).shape) > 2):
            return [(keys[0], expert)]
        return [(key, None) for key in keys[expert :: step.experts]]  # more than one: Ernie's list has those of two modules

    def _describe(self, step: Step) -> dict[str, TensorInfo]:
        """What a step makes, by name; found by converting tensors without values."""
        file = self._checkpoint.info(next(iter(step.sources.values()))[0]).file
        for keys in step.sources.values() if step.experts else ():
            whole = len(keys) == 1 and self._checkpoint.info(keys[0]).shape[:1] == (step.experts,)
            if not whole and len(keys) % step.experts:
                count = self._checkpoint.info(keys[0]).shape[0] if len(keys) == 1 else len(keys)
                raise CheckpointError(f"{file}: {keys[0]}: {count} experts, config.json asks for {step.experts}")
        expert = 0 if step.experts else None
        first = {pattern: self._of(step, pattern, expert) for pattern in step.sources}
        if step.converter is None:
            (key, row), *_ = next(iter(first.values()))
            info = self._checkpoint.info(key)
            shapes = {step.first: info.shape if row is None else info.shape[1:]}
            dtype = info.dtype
        else:
            empty = {p: [self._source(step, *where, empty=True) for where in places] for p, places in first.items()}
            dtype = self._checkpoint.info(next(iter(first.values()))[0][0]).dtype
            if dtype.itemsize == 1 or not dtype.is_floating_point:  # quantised
                dtype = self._target_dtype(step.first)
            try:
                made = self._convert(step, empty, expert)
            except Exception as error:  # an operation given what it does not expect can raise anything
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise CheckpointError(f"{file}: {step.first} cannot be made of {first}: {reason}") from None
            shapes = {name: tuple(value.shape) if expert is None else tuple(value.shape[1:]) for name, value in made.items()}
        tensors = {}
        for target, shape in shapes.items():
            for number in range(step.experts) if step.experts else (None,):
                name = target if number is None else f"{target}[{number}]"
                self._places[name] = (step, target, number)
                tensors[name] = TensorInfo(file, shape, dtype)
        return tensors

    def _target_dtype(self, name: str) -> torch.dtype:
        return self._kept.get(name, self._dtype)

    def _source(self, step: Step, key: str, row: int | None, empty: bool = False) -> torch.Tensor:
        """One of the checkpoint's tensors, or a row of it with a first dimension of one, as transformers hands it to operations."""
        info = self._checkpoint.info(key)
        shape = info.shape if row is None else (1, *info.shape[1:])
        tensor = torch.empty(shape, dtype=info.dtype, device="meta" if empty else "cpu")
        if not empty:
            self._checkpoint.read_into(key, tensor if row is None else tensor[0], row)
        dtype: torch.dtype | None = self._target_dtype(step.first)
        if self._quantizer is not None:
            dtype = self._quantizer.get_new_dtype(step.converter, tensor, dtype)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _convert(self, step: Step, tensors: dict[str, list[torch.Tensor]], expert: int | None) -> dict[str, torch.Tensor]:
        """The model's tensors, by name; of an expert with a first dimension of one."""
        assert step.converter is not None
        converter = copy.deepcopy(step.converter)  # it gathers what it converts, and several threads convert
        converter.collected_tensors = defaultdict(list, tensors)  # type: ignore[arg-type]  # it takes tensors too
        model: Any = self._model if expert is None else OneExpert(self._model)
        made = converter.convert(step.first, model=model, config=self._model.config, hf_quantizer=self._quantizer)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class OneExpert:
    """A model whose 3-D parameters have one expert: what operations that look at the model's shapes must see."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._model.get_parameter(name)[:1]
