"""Stand-ins for the matrices of all experts of a MoE layer: small approximations that are multiplied with, not unpacked to disk.

A kind holds one matrix for every expert, (experts, out, in), in few bytes, and gives those of some experts as something that
`torch.nn.functional.linear` takes as its weight: what an expert computes by it runs on stand-ins unchanged, all experts at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

FLOAT = torch.float16
"""What factors and scales are stored in."""
SMALL = 512
"""Matrices with a smaller side get their exact singular vectors; others those that a few rounds of iteration find."""
ROUNDS = 4
SPARE = 8
"""Directions more than asked for, while iterating: the last of those wanted are then found as well as the first."""
STEPS_TRIED = 48
"""Widths of a quantiser's step that are tried, for the one of least squared error."""


Multiply = Callable[[torch.Tensor], torch.Tensor]


class Matrices(Protocol):
    """A stand-in for each expert's matrix."""

    tensors: dict[str, torch.Tensor]
    """What is stored, the first dimension that of experts."""

    def of(self, experts: torch.Tensor, dtype: torch.dtype) -> Any:
        """The matrices of some experts, int64 (used,), as a weight for `linear` on (used, tokens, in)."""


class Grouped:
    """Matrices of several experts as one weight: `linear` calls `multiply` for them, and of `T` the other one."""

    def __init__(self, dtype: torch.dtype, multiply: Multiply, transposed: Multiply):
        """
        Args:
            multiply, transposed: (used, tokens, in) -> (used, tokens, out), and the other way round.
        """
        self.dtype = dtype
        self._multiply, self._transposed = multiply, transposed

    @property
    def T(self) -> Grouped:
        return Grouped(self.dtype, self._transposed, self._multiply)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func is not torch.nn.functional.linear or not isinstance(given["weight"], Grouped):
            return NotImplemented
        result = given["weight"]._multiply(given["input"])
        return result if given.get("bias") is None else result + given["bias"]


class Whole:
    """What is no matrix, a bias say, is small and kept: (experts, n)."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    @classmethod
    def make(cls, whole: torch.Tensor) -> Whole:
        return cls({"whole": whole.to(FLOAT)})

    def of(self, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors["whole"][experts].to(dtype)[:, None]


class LowRank:
    """Two factors per expert: up (experts, out, rank) @ down (experts, rank, in)."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    @classmethod
    def make(cls, whole: torch.Tensor, rank: int) -> LowRank:
        """The best approximation of that rank: the truncated SVD. whole: (experts, out, in), any floating dtype."""
        u, s, v = _leading(whole.float(), rank)
        root = s.sqrt()
        up, down = u * root[:, None, :], root[:, :, None] * v
        return cls({"up": up.to(FLOAT).contiguous(), "down": down.to(FLOAT).contiguous()})

    @staticmethod
    def nbytes(shape: tuple[int, int], experts: int, rank: int) -> int:
        return experts * rank * sum(shape) * FLOAT.itemsize

    def of(self, experts: torch.Tensor, dtype: torch.dtype) -> Grouped:
        down, up = (self.tensors[name][experts].to(dtype) for name in ("down", "up"))

        def multiply(tokens: torch.Tensor) -> torch.Tensor:
            return torch.bmm(torch.bmm(tokens, down.transpose(1, 2)), up.transpose(1, 2))

        return Grouped(dtype, multiply, lambda tokens: torch.bmm(torch.bmm(tokens, up), down))


class Quantised:
    """Entries as `bits` bits, a step per row: entry = (code - middle) * step, levels even about zero.

    Codes lie packed in bytes, (experts, out, in * bits / 8); steps are (experts, out, 1).
    """

    def __init__(self, tensors: dict[str, torch.Tensor], bits: int):
        self.tensors, self._bits = tensors, bits

    @classmethod
    def make(cls, whole: torch.Tensor, bits: int) -> Quantised:
        """whole: (experts, out, in), any floating dtype; `in` a multiple of the codes in a byte."""
        whole = whole.float()
        middle = (2**bits - 1) / 2
        widest = whole.abs().amax(dim=2, keepdim=True).clamp(min=1e-8) / middle
        step, least = widest, torch.full_like(widest, torch.inf)
        for part in torch.linspace(1 / STEPS_TRIED, 1, STEPS_TRIED).tolist():
            tried = (widest * part).to(FLOAT).float().clamp(min=1e-7)
            error = (_values(_codes(whole, tried, middle), tried, middle) - whole).square().sum(dim=2, keepdim=True)
            step, least = torch.where(error < least, tried, step), torch.minimum(error, least)
        codes = _codes(whole, step, middle).to(torch.uint8)
        packed = torch.zeros(*codes.shape[:2], codes.shape[2] * bits // 8, dtype=torch.uint8, device=whole.device)
        for place in range(8 // bits):
            packed |= codes[:, :, place :: 8 // bits] << (bits * place)
        return cls({"codes": packed, "steps": step.to(FLOAT)}, bits)

    @staticmethod
    def nbytes(shape: tuple[int, int], experts: int, bits: int) -> int:
        return experts * (shape[0] * shape[1] * bits // 8 + shape[0] * FLOAT.itemsize)

    def of(self, experts: torch.Tensor, dtype: torch.dtype) -> Grouped:
        packed, steps = self.tensors["codes"][experts], self.tensors["steps"][experts].to(dtype)
        shifts = torch.arange(0, 8, self._bits, dtype=torch.uint8, device=packed.device)
        codes = (packed[..., None] >> shifts) & (2**self._bits - 1)  # (used, out, bytes, codes in a byte)
        centred = codes.flatten(2).to(dtype) - (2**self._bits - 1) / 2
        across = steps.transpose(1, 2)

        def multiply(tokens: torch.Tensor) -> torch.Tensor:
            return torch.bmm(tokens, centred.transpose(1, 2)) * across

        return Grouped(dtype, multiply, lambda tokens: torch.bmm(tokens * across, centred))


def _codes(whole: torch.Tensor, step: torch.Tensor, middle: float) -> torch.Tensor:
    return (whole / step + middle).round().clamp(0, 2 * middle)


def _values(codes: torch.Tensor, step: torch.Tensor, middle: float) -> torch.Tensor:
    return (codes - middle) * step


def _leading(whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors and values: (experts, out, rank), (experts, rank), (experts, rank, in). The same every time."""
    if min(whole.shape[1:]) <= SMALL or 2 * rank >= min(whole.shape[1:]):
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        return u[:, :, :rank], s[:, :rank], v[:, :rank]
    generator = torch.Generator(device=whole.device).manual_seed(0)
    start = torch.randn(whole.shape[2], rank + SPARE, generator=generator, device=whole.device)
    basis = torch.linalg.qr(whole @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(whole @ torch.linalg.qr(whole.transpose(1, 2) @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.transpose(1, 2) @ whole, full_matrices=False)
    return (basis @ u)[:, :, :rank], s[:, :rank], v[:, :rank]
