"""A decode step whose tensors stay where they are, so that it can be recorded once and replayed for every token.

The cache has room for the whole answer from the beginning (transformers' static layers), the mask is as wide as the cache, and what
changes from step to step (a token per row, its position, which rows go on) is written into buffers. Knows no device: without a
recording the same step runs eagerly, anywhere.
"""

from __future__ import annotations

import inspect

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer, get_layer_types_and_kwargs

from pipeline.inputs import Inputs

ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of layers that a cache of all tokens serves: a window is a matter of the mask. Those of other kinds keep numbers of Python
about their state (a window's fill, a compressed past), which a recording would freeze."""


def why_not_fixed(model: PreTrainedModel) -> str | None:
    """Why a model's steps cannot be recorded; None: they can, as far as can be told beforehand."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder's cross-attention"
    if not model._can_compile_fullgraph:
        return "transformers says that its forward is no single graph"
    if not {"position_ids", "past_key_values"} <= inspect.signature(model.forward).parameters.keys():
        return "its forward takes no positions"
    other = sorted(set(_layer_types(model)) - ATTENTION)
    return f"its cache has layers of kind {', '.join(other)}" if other else None


class FixedStep:
    """One model, one number of rows, one room.

    Attributes:
        inputs: `input_ids` int64 (rows, 1), the newest tokens; `attention_mask` int64 (rows, 1), 1 for rows that go on (as what
            routes tokens to experts wants to know it); `seen` int64 (rows, most), the mask of the cache; `position_ids`.
        cache: reset by `begin`s of later batches.
    """

    def __init__(self, model: PreTrainedModel, rows: int, most: int):
        self._model = model
        self.most = most
        self._layers = [StaticLayer(most) for _ in _layer_types(model)]
        self.cache = Cache(layers=[*self._layers])
        device = model.device
        self.inputs: Inputs = {
            "input_ids": torch.zeros(rows, 1, dtype=torch.int64, device=device),
            "attention_mask": torch.ones(rows, 1, dtype=torch.int64, device=device),
            "seen": torch.ones(rows, most, dtype=torch.int64, device=device),
        }

    @property
    def cache_bytes(self) -> int:
        """0 before the first prompt."""
        return sum(part.nbytes for layer in self._layers for part in (layer.keys, layer.values) if part is not None)

    def reset(self) -> None:
        """Before the prompt of another batch."""
        self.cache.reset()

    def begin(self, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        """After the prompt.

        Args:
            mask: int64 (rows, tokens), the prompt's; it may have ones behind. None: all are ones, which transformers leaves out.
            positions: int64 (..., tokens), the last of which are the next tokens'.
        """
        self.inputs["seen"].fill_(1)  # what has not been written yet is later than the token that looks
        if mask is not None:
            self.inputs["seen"][:, : mask.shape[1]] = mask
        if "position_ids" not in self.inputs:
            self.inputs["position_ids"] = positions[..., -1:].clone()
        self.inputs["position_ids"].copy_(positions[..., -1:])
        self.inputs["position_ids"].sub_(1)  # `advance` adds one

    def advance(self, tokens: torch.Tensor, awake: torch.Tensor) -> None:
        """The next step's inputs; (rows,) both."""
        self.inputs["input_ids"].copy_(tokens[:, None])
        self.inputs["attention_mask"].copy_(awake[:, None])
        self.inputs["position_ids"].add_(1)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """The logits of every row, (rows, vocab_size). No word between host and device in here."""
        return self._model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["seen"],
            position_ids=inputs["position_ids"],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]


def _layer_types(model: PreTrainedModel) -> list[str]:
    types: list[str] = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    return types
