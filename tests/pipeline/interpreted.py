"""A process in which Triton interprets its kernels, so that tests run them without a GPU.

Triton decides that when it is imported, and for a whole process. The process of the tests may have imported it already, and
other tests may want it compiled; hence another process, to which functions are sent by name.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class Interpreter:
    """Use as a context: leaving it ends the process."""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret)

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.shutdown()

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of some module over there; raises here what it raises."""
        return self._process.submit(function, *args, **kwargs).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton: this module has none
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    torch.set_num_threads(1)
    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # Triton 3.9 multiplies the bit patterns of bfloat16
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
