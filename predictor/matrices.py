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

    def laid(self, dtype: torch.dtype) -> Whole:
        return self

    def each(self, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """That of each token's expert, int64 (tokens,): (tokens, n)."""
        return self.tensors["whole"][experts].to(dtype)

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

    def laid(self, dtype: torch.dtype) -> LowRank:
        """The same, as `each` reads it without a copy; `dtype` is what it will be asked for, if that is no longer than stored."""
        kept = dtype if dtype.itemsize <= FLOAT.itemsize else FLOAT
        up = self.tensors["up"].transpose(1, 2).to(kept).contiguous().transpose(1, 2)
        return LowRank({"up": up, "down": self.tensors["down"].to(kept).contiguous()})

    def each(self, experts: torch.Tensor, dtype: torch.dtype) -> Grouped:
        """The matrix of each token's expert, int64 (tokens,), for `linear` on (tokens, in).

        Tokens meet the factors of all experts, and keep what their own says: two dense products, and no question to a GPU.
        """
        count, rank, _ = self.tensors["down"].shape
        down, up = self.tensors["down"].to(dtype), self.tensors["up"].to(dtype).transpose(1, 2)
        first, second = down.flatten(0, 1), up.flatten(0, 1)  # (experts * rank, in), (experts * rank, out)
        own = torch.nn.functional.one_hot(experts, count).to(torch.bool)[:, :, None]

        def through(tokens: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
            inner = (tokens @ near.T).view(-1, count, rank)
            return torch.where(own, inner, 0).flatten(1) @ far

        return Grouped(dtype, lambda tokens: through(tokens, first, second), lambda tokens: through(tokens, second, first))

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
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(whole.shape[2], rank + SPARE, generator=generator).to(whole.device)
    basis = _orthonormal(whole @ start)
    for _ in range(ROUNDS):
        basis = _orthonormal(whole @ (whole.transpose(1, 2) @ basis))
    rows = basis.transpose(1, 2) @ whole
    squares, turn = torch.linalg.eigh((rows @ rows.transpose(1, 2)).cpu().double())  # ascending
    turn, s = turn.flip(2)[:, :, :rank].to(rows), squares.flip(1)[:, :rank].clamp(min=1e-30).sqrt().to(rows)
    return basis @ turn, s, turn.transpose(1, 2) @ rows / s[:, :, None]


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """A basis of the same space, (experts, n, k), by Cholesky factors of all experts at once: a GPU's own QR takes one matrix after
    the other. Twice: the first leaves it orthonormal but for rounding."""
    for _ in range(2):
        columns = columns / columns.norm(dim=1, keepdim=True).clamp(min=1e-30)
        inner = (columns.transpose(1, 2) @ columns).double()
        inner.diagonal(dim1=1, dim2=2).add_(1e-6)  # of columns that depend on each other rounding may leave less than nothing
        factor = torch.linalg.cholesky(inner).to(columns)
        columns = torch.linalg.solve_triangular(factor, columns.transpose(1, 2), upper=False).transpose(1, 2)
    return columns
