"""Figures while a run is under way, for Ray's dashboard, Prometheus and Grafana (docs/grafana.json draws them).

Counted by the driver, from what comes back of each batch: nothing is asked for it, and no actor knows of it. Rates and shares are
the reader's to make of the counters: a hit rate is what found_total grew by over what uses_total grew by.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from pipeline.batch_result import BatchStats

COUNTERS = {
    "rows": "rows answered",
    "tokens": "tokens computed, padding not counted",
    "batches": "batches answered",
    "uses": "times that a batch's MoE layer used an expert",
    "found": "of these, those whose expert was in a slot",
    "stall_ms": "milliseconds that compute waited for copies under way",
    "judged": "tokens of which both a table's and a router's choice is known, of all MoE layers",
    "top1": "of these, those whose expert the table named first",
    "top3": "of these, those whose expert was among the first three",
}
WAYS = ("prefetch", "demand", "read_in_place")


class Live:
    """One run's."""

    def __init__(self) -> None:
        keys = ("executor",)
        self._counters = {name: Counter(f"sida_{name}", text, tag_keys=keys) for name, text in COUNTERS.items()}
        self._moved = Counter("sida_moved_bytes", "bytes of experts that crossed the link", tag_keys=("executor", "way"))
        self._queue = Gauge("sida_queue", "batches that an Executor has been sent and has not answered", tag_keys=keys)
        self._lost = Counter("sida_lost", "actors and machines that died", tag_keys=("what",))

    def saw(self, stats: BatchStats, rows: int) -> None:
        tags = {"executor": str(stats.executor)}
        seen = {
            "rows": rows,
            "tokens": stats.tokens,
            "batches": 1,
            "uses": sum(stats.hits) + sum(stats.misses),
            "found": sum(stats.hits),
            "stall_ms": stats.stall_ms,
            "judged": sum(stats.accuracy.tokens),
            "top1": sum(stats.accuracy.top1),
            "top3": sum(stats.accuracy.top3),
        }
        for name, value in seen.items():
            if value:  # Ray refuses to count nothing
                self._counters[name].inc(value, tags)
        for way, nbytes in zip(WAYS, (stats.prefetch_bytes, stats.demand_bytes, stats.read_in_place_bytes), strict=True):
            if nbytes:
                self._moved.inc(nbytes, tags | {"way": way})
        self._queue.set(stats.queued, tags)

    def lost(self, what: str) -> None:
        self._lost.inc(1, {"what": what})
