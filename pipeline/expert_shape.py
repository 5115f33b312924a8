"""Where in a block of bytes an expert's weights lie, and what is computed with them: what kernels must know of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertShape:
    """One MoE layer's experts, as the kernels must know them. Every block starts at a multiple of 256 bytes.

    Attributes:
        up, down: bytes from the start of a block to these weights, (out, in).
        gate: the same; None in a gated expert: the part at `up` is fused, its outputs are [gate; up], and so are its biases.
        up_bias, gate_bias, down_bias: the same; None: no bias.
        transposed: weights are (in, out).
        activation: "relu", "silu", "gelu", "gelu_tanh" or "none", of the gate if there is one, else of up; or a callable from
            the raw (pairs, d_ff), gated (pairs, 2 * d_ff), to (pairs, d_ff), each row by itself. It sees uninitialised rows;
            in a gated expert, `up` must be fused.
    """

    experts: int
    d_model: int
    d_ff: int
    dtype: torch.dtype
    up: int
    down: int
    gate: int | None = None
    up_bias: int | None = None
    gate_bias: int | None = None
    down_bias: int | None = None
    gated: bool = False
    transposed: bool = False
    activation: str | Callable[[torch.Tensor], torch.Tensor] = "relu"

    def __post_init__(self) -> None:
        assert self.gated or self.gate is None
        assert self.gate is None or not callable(self.activation)
