"""What all who record CUDA graphs in one process share: one records at a time, and none leaves a recording open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

RECORDING = threading.Lock()


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
