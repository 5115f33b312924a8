"""What all who record CUDA graphs in one process share: one records at a time, undisturbed, and none leaves a recording open."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

TRIES = 2
"""Recordings of the same that may fail in a row: what broke one may have been no fault of the model's."""

_RECORDING = threading.Lock()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Nobody else records meanwhile, and Python's garbage collector rests.

    It runs whenever it likes, in whichever thread, and what it finds may hold memory or graphs of CUDA's. To give those back from
    the thread that records breaks the recording, at whatever call comes next.
    """
    with _RECORDING:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextlib.contextmanager
def closed(graphs: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
    """Ends the last recording, also when the forward broke: CUDA would refuse all else."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graphs[-1].capture_end()
        raise
    graphs[-1].capture_end()
