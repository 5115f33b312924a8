"""Recipes of random weights: how a model without training spreads its numbers, so that it routes as a trained one does.

A recipe is a function of a tensor's name and shape, and a line in `RECIPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from store.random_weights import RandomTensor

EMBEDDINGS = {"shared", "embed_tokens"}
ATTENTION = {"SelfAttention", "EncDecAttention"}


def switch(name: str, shape: tuple[int, ...]) -> RandomTensor:
    """Spreads a sentence over dozens of experts, as a trained Switch Transformer does; wider weights crowd it onto a handful."""
    modules = name.split(".")
    if len(shape) < 2:
        return RandomTensor(shape, 0.0 if modules[-1] == "bias" else 1.0, 0.0)  # what is no bias is a norm
    if EMBEDDINGS.intersection(modules):
        return RandomTensor(shape, 0.0, 1.0)
    return RandomTensor(shape, 0.0, 0.03 if ATTENTION.intersection(modules) else 0.02)


def decoder(name: str, shape: tuple[int, ...]) -> RandomTensor:
    """Tokens keep telling themselves apart through dozens of layers, and with them their experts: attention, which mixes what they
    have in common into all of them, is weak, so that it does not grow from layer to layer until it is all that routers see."""
    modules = name.split(".")
    if len(shape) < 2:
        return RandomTensor(shape, 0.0 if modules[-1] == "bias" else 1.0, 0.0)
    if EMBEDDINGS.intersection(modules):
        return RandomTensor(shape, 0.0, 1.0)
    return RandomTensor(shape, 0.0, (0.15 if "self_attn" in modules else 0.9) / math.sqrt(shape[-1]))


RECIPES: dict[str, Callable[[str, tuple[int, ...]], RandomTensor]] = {"switch": switch, "decoder": decoder}
"""By `model.random.recipe`."""
