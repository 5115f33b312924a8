"""timeline.json: what predicted, copied and computed when, in Chrome's trace format; open it in Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from typing import Any

from pipeline.batch_result import BatchStats

LANES = ("predict", "copy", "compute")
PIDS = 2**22
"""More than Linux ever counts to."""


def timeline(stats: list[BatchStats]) -> str:
    """The JSON text. Times in microseconds from the first event; a lane per kind of work, a process per process of an Executor."""
    origin = min(min([s.start, *(s.predict_span or [])[:1], *(c[0] for c in s.copy_spans)]) for s in stats)
    events: list[dict[str, Any]] = []

    def event(s: BatchStats, lane: str, name: str, start: int, end: int, args: dict[str, Any]) -> None:
        where = {"pid": _process(s), "tid": LANES.index(lane) + 1}
        times = {"ts": (start - origin) / 1e3, "dur": (end - start) / 1e3}
        events.append({"name": name, "cat": lane, "ph": "X", **where, **times, "args": args})

    for number, s in enumerate(stats):
        if s.predict_span:
            start, end = s.predict_span
            event(s, "predict", f"batch {number}", start, end, {"expected expert uses": round(s.predicted_uses, 1)})
        for start, end, experts in s.copy_spans:
            event(s, "copy", f"{experts} experts", start, end, {"experts": experts})
        seen = {"tokens": s.tokens, "hits": sum(s.hits), "misses": sum(s.misses), "stall_ms": s.stall_ms}
        event(s, "compute", f"batch {number}", s.start, s.end, seen)
    processes = {_process(s): f"Executor {s.executor}, process {s.pid}" for s in sorted(stats, key=lambda s: s.executor)}
    names = [
        {"name": "thread_name", "ph": "M", "pid": process, "tid": i + 1, "args": {"name": lane}}
        for process in processes
        for i, lane in enumerate(LANES)
    ] + [{"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}} for process, name in processes.items()]
    return json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"})


def _process(s: BatchStats) -> int:
    """Two machines may give two processes one number."""
    return s.executor * PIDS + s.pid
