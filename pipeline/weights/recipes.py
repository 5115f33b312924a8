"""Recipes of random weights: how a model without training spreads its numbers, so that it routes as a trained one does.

A recipe is a function of a tensor's name and shape, and a line in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable

from store.random_weights import RandomTensor

EMBEDDINGS = {"shared", "embed_tokens"}
ATTENTION = {"SelfAttention", "EncDecAttention", "self_attn"}


def switch(name: str, shape: tuple[int, ...]) -> RandomTensor:
    """Spreads a sentence over dozens of experts, as trained models do; wider weights crowd it onto a handful."""
    modules = name.split(".")
    if len(shape) < 2:
        return RandomTensor(shape, 0.0 if modules[-1] == "bias" else 1.0, 0.0)  # what is no bias is a norm
    if EMBEDDINGS.intersection(modules):
        return RandomTensor(shape, 0.0, 1.0)
    return RandomTensor(shape, 0.0, 0.03 if ATTENTION.intersection(modules) else 0.02)


RECIPES: dict[str, Callable[[str, tuple[int, ...]], RandomTensor]] = {"switch": switch}
"""By `model.random.recipe`."""
