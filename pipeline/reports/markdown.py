"""What tables in Markdown are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines: the columns' names, what parts them from the rows, and the rows."""
    return [_line(columns), "|" + "---|" * len(columns), *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def gb(nbytes: float | None) -> str:
    """10**9 bytes, to three digits."""
    return "-" if nbytes is None else f"{nbytes / 1e9:.3g}"
