"""When batches ran: a clock without the breaks of a resumed run, and what several Executors had in their slots together."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from statistics import median

from pipeline.batch_result import BatchStats


class Clock:
    """Seconds since the first batch began, without the breaks between the sittings of a resumed run.

    Attributes:
        sittings: numbers of batches, by start; between two sittings nothing ran for ten times as long as the median batch.
        breaks: where a sitting ends and the next begins, in seconds.
        seconds: from the first start to the last end, > 0.
    """

    def __init__(self, stats: list[BatchStats]):
        limit = 10 * median(s.end - s.start for s in stats)
        self.sittings: list[list[int]] = []
        ends: list[int] = []
        for number in sorted(range(len(stats)), key=lambda i: stats[i].start):
            if not ends or stats[number].start - ends[-1] > limit:
                self.sittings.append([])
                ends.append(0)
            self.sittings[-1].append(number)
            ends[-1] = max(ends[-1], stats[number].end)
        self._starts = [stats[sitting[0]].start for sitting in self.sittings]
        self._before = [0, *accumulate(end - start for start, end in zip(self._starts, ends, strict=True))]
        self.breaks = [before / 1e9 for before in self._before[1:-1]]
        self.seconds = max(self._before[-1], 1) / 1e9

    def __call__(self, time_ns: int) -> float:
        """A time within a break is where the break was."""
        sitting = max(bisect_right(self._starts, time_ns) - 1, 0)
        return min(self._before[sitting] + max(time_ns - self._starts[sitting], 0), self._before[sitting + 1]) / 1e9


def together(stats: list[BatchStats]) -> list[BatchStats]:
    """In the order in which they ended, `resident` being what all Executors had in slots then, each after its latest batch."""
    latest: dict[int, list[int]] = {}
    summed = []
    for s in sorted(stats, key=lambda s: s.end):
        latest[s.executor] = s.resident
        summed.append(replace(s, resident=[sum(layer) for layer in zip(*latest.values(), strict=True)]))
    return summed
