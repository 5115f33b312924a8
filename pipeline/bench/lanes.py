"""A picture of a timeline's lanes, where copies are seen under compute: `python -m pipeline.bench.lanes timeline.json [ms [from]]`

Draws so many milliseconds (40) from a moment on (around the batch in the middle), as timeline.png beside the file. Needs
matplotlib. Knows the file (pipeline/reports/timeline.py) and nothing of what was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.reports.picture import figure, save_small
from pipeline.reports.timeline import LANES

COLOURS = {"predict": "#b07a10", "copy": "#3573cf", "compute": "#d1583a"}
GAP_US = 20.0
"""Copies that follow each other so closely are one bar: thousands of them are none to look at."""


def draw_lanes(events: list[dict[str, Any]], ms: float, begin_ms: float | None, path: Path) -> Path | None:
    """
    Args:
        events: of the timeline's `traceEvents` those with a duration.
        begin_ms: None: the batch in the middle is in the picture's.

    Returns: the picture; None: there is no matplotlib.
    """
    drawn = figure(10, 2.2)
    if drawn is None:
        return None
    computed = sorted(event["ts"] / 1e3 for event in events if event["cat"] == LANES[-1])
    begin = max(0.0, computed[len(computed) // 2] - ms / 2) if begin_ms is None else begin_ms
    axes = drawn.add_subplot()
    for height, lane in enumerate(reversed(LANES)):
        bars = [
            (start / 1e3 - begin, (end - start) / 1e3)
            for start, end in merged([e for e in events if e["cat"] == lane], GAP_US if lane == "copy" else 0.0)
            if end / 1e3 > begin and start / 1e3 < begin + ms
        ]
        axes.broken_barh(
            bars, (height + 0.1, 0.8), color=COLOURS[lane], edgecolor="none" if lane == "copy" else "white", linewidth=0.6
        )
        busy = sum(min(at + wide, ms) - max(at, 0.0) for at, wide in bars) / ms
        axes.text(ms * 1.005, height + 0.5, f"{busy:.0%}", va="center", fontsize=8)
    axes.set_yticks([height + 0.5 for height in range(len(LANES))], list(reversed(LANES)), fontsize=9)
    axes.set_xlim(0, ms)
    axes.set_xlabel("milliseconds; right: the share of the time that a lane is busy", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return save_small(drawn, path, dpi=100, shades=32)


def merged(events: list[dict[str, Any]], gap: float) -> list[tuple[float, float]]:
    """(start, end) in microseconds, of several that touch, or nearly, one; batches under way at once count as one."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        if spans and (start - spans[-1][1] <= gap if gap else start < spans[-1][1]):
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def main(arguments: list[str]) -> None:
    file, *numbers = arguments
    events = [event for event in json.loads(Path(file).read_text())["traceEvents"] if event["ph"] == "X"]
    ms = float(numbers[0]) if numbers else 40.0
    drawn = draw_lanes(events, ms, float(numbers[1]) if len(numbers) > 1 else None, Path(file).with_suffix(".png"))
    if drawn is not None:
        print(f"wrote {drawn}")


if __name__ == "__main__":
    main(sys.argv[1:])
