"""Pictures of results: drawn with matplotlib where it is there, small enough for a repository. Knows nothing of what they show."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches; None, and what to install is said, where that cannot be had."""
    try:
        from matplotlib.figure import Figure  # an extra, and half a second to import
    except ImportError:
        print("no picture: it needs matplotlib; pip install -e '.[plots]'")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_small(drawn: Any, path: Path, dpi: int, shades: int) -> Path:
    """As a PNG of few colours.

    Args:
        drawn: what `figure` gave.
    """
    from PIL import Image  # matplotlib brings it

    whole = BytesIO()
    drawn.savefig(whole, dpi=dpi)
    Image.open(whole).convert("RGB").quantize(shades).save(path, optimize=True)
    return path
