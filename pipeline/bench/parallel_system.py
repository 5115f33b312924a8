"""Expert parallel as a system on the bench: a rank per device, in processes of their own, each expert at its owner.

Every rank runs a batch at a time, so that as many are under way as there are devices; each has the budget that `sida` has on one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from pipeline.bench.placed import placed
from pipeline.bench.whole import Pass, numbers
from pipeline.bench.workload import Combination, Workload
from pipeline.data import Batch
from pipeline.parallel.group import Group
from pipeline.parallel.processes import Processes
from predictor.actor import Prediction


class Parallel:
    """See `pipeline.bench.systems.Running`."""

    def __init__(self, workload: Workload, given: Combination):
        config = workload.prepared.config
        self._tables = workload.tables[given.predictor or "oracle"]
        plan = placed(workload, given)
        spec = replace(workload.executor_spec(given), policy="lookahead")
        self._devices, self._next = given.devices, 0
        self._group = Group(lambda: Processes(spec, plan, config.parallel.timeout_s), plan)

    def run(self, batches: list[Batch]) -> Pass:
        outputs, times, stats = [], [], []
        start = last = time.perf_counter()
        for number, result in enumerate(self._group.run(self._numbered(batches), "exact")):
            outputs.append(numbers(result.results))
            stats.append(result.stats)
            if number % self._devices == self._devices - 1 or number == len(batches) - 1:  # a step's last: they come together
                now = time.perf_counter()
                together = number % self._devices + 1
                times += [(now - last) * 1e3 / together] * together
                last = now
        return Pass(time.perf_counter() - start, outputs, times, stats)

    def close(self) -> None:
        self._group.close()

    def _numbered(self, batches: list[Batch]) -> Iterator[tuple[Batch, Prediction]]:
        for batch in batches:
            yield replace(batch, index=self._next), self._tables[batch.index % len(self._tables)]
            self._next += 1
