"""Ray's pipeline as a system on the bench: what the three actors cost, beside the same Executor called directly."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from pipeline.actors import Actors
from pipeline.bench.whole import Pass, numbers
from pipeline.bench.workload import Combination, Workload
from pipeline.cluster import cluster
from pipeline.data import Batch
from pipeline.driver import run_batches
from predictor.registry import PredictorSpec


class ThroughRay:
    """See `pipeline.bench.systems.Running`."""

    def __init__(self, workload: Workload, given: Combination):
        prepared = workload.prepared
        self._config, self._slots, self._next = prepared.config, given.slots(workload), 0
        spec = replace(workload.executor_spec(given), threads=1)
        shape = prepared.model.shape
        oracle = PredictorSpec("oracle", workload.trace, shape.top_k, shape, workload.arena.identity)
        self._stack = ExitStack()
        self._stack.enter_context(cluster(prepared.config.cluster.address))
        self._actors = Actors.start(spec, oracle, workload.arena, threads=1, executors=prepared.config.executors)
        self._actors.ready()

    def run(self, batches: list[Batch]) -> Pass:
        batches = [replace(batch, index=self._next + i) for i, batch in enumerate(batches)]
        self._next += len(batches)
        start = time.perf_counter()
        results = list(
            run_batches(self._actors, ((batch, None) for batch in batches), "exact", self._slots, self._config.predictor.lookahead)
        )
        seconds = time.perf_counter() - start
        results.sort(key=lambda result: result.batch)  # of several Executors they come as they end
        stats = [result.stats for result in results]
        return Pass(seconds, [numbers(result.results) for result in results], [(s.end - s.start) / 1e6 for s in stats], stats)

    def close(self) -> None:
        self._actors.finish()
        self._actors.stop()
        self._stack.close()
