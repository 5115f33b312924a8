"""The model that a rehearsal runs: the backbone and routers of the arena, stand-ins in the place of experts.

On a CPU its parameters are the arena's own pages, and on a device those of the Executor's model, if both are in one process.
Its tokens are grouped by expert and padded to the largest group, so that a layer is a few batched matmuls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.data import pad
from pipeline.families import Family, Routing
from pipeline.models import ModelSpec, build, load_embedding
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
        said: what each router has said so far, of real tokens.
    """

    real: tuple[torch.Tensor, ...] = ()
    said: list[Routing] = field(default_factory=list)


class StandInMoE(nn.Module):
    """A MoE layer without its experts."""

    def __init__(self, family: Family, router: nn.Module, stream: int, parts: Mapping[str, Matrices], now: Rehearsing):
        """
        Args:
            parts: stand-ins of the experts' tensors; none: the layer adds nothing.
        """
        super().__init__()
        self.router = router
        self._family, self._stream, self._parts, self._now = family, stream, parts, now

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, d_model) -> the same; zero for padding and for tokens that the router drops."""
        real = self._now.real[self._stream]
        routing = self._family.route(self.router, hidden)
        said = Routing(routing.experts[real], routing.weights[real], routing.chosen[real], routing.logits[real])
        self._now.said.append(said)
        if not self._parts:
            return torch.zeros_like(hidden)
        states = hidden.reshape(-1, hidden.shape[-1])
        output = torch.zeros_like(states)
        output = output.index_copy(0, real, self._run(states[real], said.experts, said.weights))
        return output.reshape(hidden.shape)

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
        results = self._family.apply(some, padded)[group, place] * weights.reshape(-1)[by_expert, None]
        return torch.zeros_like(tokens).index_add(0, rows, results.to(tokens.dtype))


class Rehearser:
    """Runs rehearsals of one model on one device (`predictor.rehearsal.Rehearse`)."""

    def __init__(self, spec: ModelSpec, arena: Arena, stand_ins: StandIns, device: torch.device):
        """
        Args:
            stand_ins: on that device.
        """
        self._now, self._pad = Rehearsing(), spec.config["pad_token_id"] or 0
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # beside whatever else this process does there

        def moe(family: Family, router: nn.Module, layer: int, stream: int) -> nn.Module:
            return StandInMoE(family, router, stream, stand_ins.layers[layer], self._now)

        self.model = build(spec, arena, moe, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights and stand-ins came on other streams

    @torch.inference_mode()
    def __call__(self, tokens: TokenBatch) -> list[Rehearsed]:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # stand-ins in training change on that one
        with torch.cuda.stream(self._stream):
            return [
                Rehearsed(r.logits.float().cpu().numpy(), r.chosen.cpu().numpy(), r.weights.float().cpu().numpy())
                for r in self.route(tokens)
            ]

    def logits(self, tokens: TokenBatch) -> list[torch.Tensor]:
        """Per MoE layer (tokens, experts), on the device; with gradients, if the stand-ins have any."""
        return [routing.logits for routing in self.route(tokens)]

    def route(self, tokens: TokenBatch) -> list[Routing]:
        """What every router says of real tokens, on the device."""
        inputs: dict[str, torch.Tensor] = {}
        for stream, prefix in zip(range(len(tokens.streams)), ("", "decoder_"), strict=False):
            ids, mask = pad(tokens, stream, self._pad)
            inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
        self._now.real = tuple(mask.reshape(-1).nonzero().squeeze(1).to(self._device) for mask in masks)
        self._now.said = []
        _forward(self.model, {name: tensor.to(self._device) for name, tensor in inputs.items()})
        return self._now.said


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
        """On a CPU it reads the arena's pages, but has no lock on it: a predictor must not keep an arena from being removed."""
        arena = self.attached or Arena.attach(self.arena)
        assert arena is not None, self.arena
        rehearser = Rehearser(self.spec, arena, stand_ins.to(torch.device(device)), torch.device(device))
        if self.attached is None:
            arena.close()  # what is mapped stays
        return rehearser
