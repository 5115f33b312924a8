"""Progress bars: for whatever may take more than two seconds; quiet when not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(label: str, total: int, unit: str = "row", **options: Any) -> tqdm:
    """A bar on stderr that leaves nothing behind; `unit="B"` counts in megabytes."""
    quiet = not sys.stderr.isatty()
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=quiet, leave=False, delay=0.5, **options)
