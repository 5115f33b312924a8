"""The model that a rehearsal runs: the backbone and routers of the arena, stand-ins in the place of experts.

On a CPU its parameters are the arena's own pages, and on a device those of the Executor's model, if both are in one process.
Its tokens are grouped by expert and padded to the largest group, so that a layer is a few batched matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.data import pad
from pipeline.gpu.rehearsed import NamedExperts
from pipeline.models import ModelSpec, build, load_embedding
from pipeline.routing import Expert, Experts, Routing, are_probabilities
from predictor.errors import PredictorError
from predictor.matrices import Matrices
from predictor.rehearsal import Rehearsed
from predictor.stand_ins import StandIns
from predictor.tokens import TokenBatch
from store.arena import Arena


@dataclass
class Rehearsing:
    """One rehearsal under way, for the MoE layers of one model.

    Attributes:
        real: per stream the positions of real tokens in the padded batch, int64 (tokens,).
        tokens: per stream how many there are with padding.
        said: MoE layer -> what its router has said of real tokens.
    """

    real: tuple[torch.Tensor, ...] = ()
    tokens: tuple[int, ...] = ()
    said: dict[int, Routing] = field(default_factory=dict)
    everywhere: tuple[torch.Tensor, ...] | None = None
    """Instead, padding is computed and spoken of too: per stream bool (tokens, 1), whether a position is real."""


class StandInExperts:
    """What stands for the experts of one MoE layer (pipeline.routing.Experts)."""

    def __init__(self, layer: int, stream: int, expert: Expert, parts: Mapping[str, Matrices], now: Rehearsing):
        """
        Args:
            parts: stand-ins of the experts' tensors; none: the layer adds nothing.
        """
        self._layer, self._stream, self._expert = layer, stream, expert
        self._parts, self._now = parts, now

    def __call__(self, hidden: torch.Tensor, route: Callable[[], Routing]) -> torch.Tensor:
        if self._now.everywhere is not None:
            return self._everywhere(hidden, route(), self._now.everywhere[self._stream])
        real, routing = self._now.real[self._stream], route()
        if len(hidden) != self._now.tokens[self._stream]:
            raise _cannot(f"MoE layer {self._layer} is not given every token")
        if routing.logits is None:
            raise _cannot(f"the router of MoE layer {self._layer} does not hand out what it thinks of all experts")
        said = Routing(routing.experts[real], routing.weights[real], routing.chosen[real], routing.logits[real])
        self._now.said.setdefault(self._layer, said)
        output = torch.zeros_like(hidden)
        return output.index_copy(0, real, self._run(hidden[real], said.experts, said.weights)) if self._parts else output

    def _everywhere(self, hidden: torch.Tensor, routing: Routing, real: torch.Tensor) -> torch.Tensor:
        """Of a router that chooses one expert, without a question to the device."""
        self._now.said.setdefault(self._layer, routing)
        if not self._parts:
            return torch.zeros_like(hidden)
        own = routing.experts[:, 0]
        parts: dict[str, Any] = {part: matrices.each(own.clamp(min=0), hidden.dtype) for part, matrices in self._laid.items()}
        results = (self._expert(parts, hidden) * routing.weights).to(hidden.dtype)
        return torch.where(real & (own >= 0)[:, None], results, 0)

    def lay(self, dtype: torch.dtype) -> None:
        """Stand-ins as `_everywhere` reads them."""
        self._laid: dict[str, Any] = {part: cast(Any, matrices).laid(dtype) for part, matrices in self._parts.items()}
        self._parts = self._laid  # once on a device

    def _run(self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tokens: (tokens, d_model).
            experts, weights: (tokens, top_k); expert -1 is none.
        """
        by_expert = experts.reshape(-1).argsort(stable=True)  # positions in (tokens, top_k), those of one expert together
        by_expert = by_expert[experts.reshape(-1)[by_expert] >= 0]
        used, group, counts = experts.reshape(-1)[by_expert].unique_consecutive(return_inverse=True, return_counts=True)
        if not len(used):
            return torch.zeros_like(tokens)
        place = torch.arange(len(by_expert), device=tokens.device) - (counts.cumsum(0) - counts)[group]
        rows = by_expert // experts.shape[1]
        padded = tokens.new_zeros(len(used), int(counts.max()), tokens.shape[1]).index_put((group, place), tokens[rows])
        some = {part: matrices.of(used, tokens.dtype) for part, matrices in self._parts.items()}
        results = self._expert(some, padded)[group, place] * weights.reshape(-1)[by_expert, None]
        return torch.zeros_like(tokens).index_add(0, rows, results.to(tokens.dtype))


class Rehearser:
    """Runs rehearsals of one model on one device (`predictor.rehearsal.Rehearse`)."""

    def __init__(self, spec: ModelSpec, arena: Arena, stand_ins: StandIns, device: torch.device):
        """
        Args:
            stand_ins: on that device.
        """
        self._now, self._layers = Rehearsing(), spec.shape.layers
        self._pad = getattr(spec.pretrained_config().get_text_config(), "pad_token_id", None) or 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # beside whatever else this process does there

        self._experts: list[StandInExperts] = []
        self._are_probabilities: dict[int, bool] = {}

        def experts(layer: int, stream: int, expert: Expert) -> Experts:
            self._experts.append(StandInExperts(layer, stream, expert, stand_ins.layers[layer], self._now))
            return self._experts[-1]

        self.model = build(spec, arena, experts, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights and stand-ins came on other streams

        self._shape = spec.shape
        self._needs_groups = stand_ins.method not in ("none", "svd") or spec.shape.top_k > 1

    def namer(self) -> NamedExperts | None:
        """Who names experts on the device itself; None: here that is done better from what `__call__` says. Not while it learns."""
        return None if self._needs_groups or self._device.type == "cpu" else self.on_device()

    def on_device(self) -> NamedExperts:
        for experts in self._experts:
            experts.lay(self.model.dtype)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return NamedExperts(self._route_everywhere, self._shape.streams, self._pad, self._stream, self._device)

    def _route_everywhere(self, inputs: dict[str, torch.Tensor]) -> list[Routing]:
        masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
        self._now.said, self._now.everywhere = {}, tuple(mask.reshape(-1, 1) > 0 for mask in masks)
        try:
            _forward(self.model, inputs)
        finally:
            self._now.everywhere = None
        said = [self._now.said[layer] for layer in range(self._layers)]
        return [replace(routing, logits=self._logits(layer, routing)) for layer, routing in enumerate(said)]

    @torch.inference_mode()
    def __call__(self, tokens: TokenBatch) -> list[Rehearsed]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # stand-ins in training change on that one
        with torch.cuda.stream(self._stream):
            return [
                Rehearsed(self._logits(i, r).cpu().numpy(), r.chosen.cpu().numpy(), r.weights.float().cpu().numpy())
                for i, r in enumerate(self.route(tokens))
            ]

    def logits(self, tokens: TokenBatch) -> list[torch.Tensor]:
        """Per MoE layer (tokens, experts), on the device; with gradients, if the stand-ins have any."""
        return [self._logits(layer, routing) for layer, routing in enumerate(self.route(tokens))]

    def _logits(self, layer: int, routing: Routing) -> torch.Tensor:
        """float32 (tokens, experts); some routers hand out probabilities instead, which is looked at once."""
        assert routing.logits is not None, "what has none is not said"
        scores = routing.logits.float()
        if layer not in self._are_probabilities:
            self._are_probabilities[layer] = are_probabilities(scores)
        return scores.clamp(min=1e-9).log() if self._are_probabilities[layer] else scores

    def route(self, tokens: TokenBatch) -> list[Routing]:
        """What every router says of real tokens, on the device.

        Raises:
            PredictorError: a model that cannot be rehearsed.
        """
        inputs: dict[str, torch.Tensor] = {}
        for stream, prefix in zip(range(len(tokens.streams)), ("", "decoder_"), strict=False):
            ids, mask = pad(tokens, stream, self._pad)
            inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
        self._now.real = tuple(mask.reshape(-1).nonzero().squeeze(1).to(self._device) for mask in masks)
        self._now.tokens, self._now.said = tuple(mask.numel() for mask in masks), {}
        _forward(self.model, {name: tensor.to(self._device) for name, tensor in inputs.items()})
        missing = sorted(set(range(self._layers)) - self._now.said.keys())
        if missing:
            raise _cannot(f"text does not reach MoE layer {missing[0]}")
        return [self._now.said[layer] for layer in range(self._layers)]


def _cannot(reason: str) -> PredictorError:
    return PredictorError(f"predictor.kind: rehearsal cannot predict this model: {reason}; name another kind")


def _forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """The layers of a model, without what is made of their last states."""
    if "decoder_input_ids" not in inputs:
        stack = model.get_submodule("encoder") if hasattr(model, "encoder") else model.base_model
        stack(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return
    states = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    model.get_decoder()(  # without its own mask, as the tasks run it: what pads it comes after all that counts
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=states.last_hidden_state,
        encoder_attention_mask=inputs["attention_mask"],
        use_cache=False,
    )


@dataclass(frozen=True)
class ArenaModel:
    """What predictors may ask of a model whose weights lie in an arena (`predictor.registry.Model`); travels to actors."""

    spec: ModelSpec
    arena: Path
    attached: Arena | None = None
    """The arena as this process has it already: its backbone is then not brought to the device again."""

    def embedding(self) -> torch.Tensor:
        return load_embedding(self.arena, self.spec.embedding)

    def rehearser(self, stand_ins: StandIns, device: str) -> Rehearser:
        """On a CPU it reads the arena's pages, but has no lock on it: a predictor must not keep an arena from being removed.

        Raises:
            PredictorError: the model cannot be rehearsed.
        """
        arena = self.attached or Arena.attach(self.arena)
        assert arena is not None, self.arena
        rehearser = Rehearser(self.spec, arena, stand_ins.to(torch.device(device)), torch.device(device))
        one = np.zeros(1, dtype=np.int64)
        with torch.no_grad():  # a model that cannot be rehearsed says so now
            rehearser.logits(TokenBatch(((one,),) * (1 + max(self.spec.shape.streams))))
        if self.attached is None:
            arena.close()  # what is mapped stays
        return rehearser
