"""Which modules of a transformers model are MoE layers, whatever its family: there are three kinds of them.

Most families hand their experts' work to a function that can be replaced (door.py); Switch Transformers and NLLB-MoE keep one
module per expert (own_routers.py). All else is backbone: shared experts, dense layers, routers. Nothing here knows slots, budgets
or batches.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from pipeline.families.door import Door
from pipeline.families.own_routers import NLLB, Switch
from pipeline.routing import Expert, Experts, MakeExperts, MoELayer


class Kind(Protocol):
    """A kind of MoE layer."""

    def find(self, model: PreTrainedModel, name: str, module: nn.Module) -> MoELayer | None:
        """The layer that this module is, if it is one of this kind.

        Raises:
            ModelError: it is, but computes something that is not served.
        """

    def serve(self, model: PreTrainedModel, layer: MoELayer, make: MakeExperts, number: int) -> None:
        """Takes the layer's experts out of a model on the meta device, and puts what `make` gives in their place."""


KINDS: tuple[Kind, ...] = (Door(), Switch(), NLLB())


def moe_layers(model: PreTrainedModel) -> list[tuple[Kind, MoELayer]]:
    """In the order of the forward.

    Raises:
        ModelError: experts that compute something that is not served.
    """
    found = []
    for name, module in model.named_modules():
        for kind in KINDS:
            layer = kind.find(model, name, module)
            if layer is not None:
                found.append((kind, layer))
    return sorted(found, key=lambda pair: pair[1].stream)  # stable: the encoder runs before the decoder


def serve(model: PreTrainedModel, make: MakeExperts) -> list[MoELayer]:
    """Takes all experts out of a model on the meta device, and puts what `make` gives in their place; says what was there."""
    layers = moe_layers(model)
    for number, (kind, layer) in enumerate(layers):
        kind.serve(model, layer, make, number)
    return [layer for _, layer in layers]


def nobody(number: int, stream: int, expert: Expert) -> Experts:
    """For a model that is only described."""

    def refuse(*args: object) -> None:
        raise AssertionError("a described model does not run")

    return refuse  # type: ignore[return-value]
