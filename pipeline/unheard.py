"""A standard output whose reader may go: `| head -6` has seen enough, and the work goes on as if everything had been read.

Of output only. A broken pipe to anybody else is still an error.
"""

from __future__ import annotations

import contextlib
import io
from typing import TextIO


def unheard(stream: TextIO) -> TextIO:
    """Writes where `stream`, which has a file descriptor, writes; nowhere once nobody reads there."""
    stream.flush()
    raw = _ToWhoeverReads(stream.fileno(), "w", closefd=False)
    at_once = getattr(stream, "write_through", False)  # `python -u`, as Ray runs a job, whose log is read meanwhile
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=at_once or raw.isatty())


class _ToWhoeverReads(io.FileIO):
    def write(self, data) -> int:  # any buffer, for which Python 3.11 has no name
        with contextlib.suppress(BrokenPipeError):
            return super().write(data)
        return memoryview(data).nbytes
