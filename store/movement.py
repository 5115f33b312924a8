"""What moved, counted: the copy engines write it, metrics and reports read it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Movement:
    """What crossed the link, and what waited for it, since the last `take`. Bytes, counts per MoE layer, nanoseconds."""

    layers: int
    prefetch_bytes: int = 0
    demand_bytes: int = 0
    """Copies that a forward asked for. None where misses are read in place."""
    read_in_place_bytes: int = 0
    """Of misses, those included that stayed in a slot (just_in_time.py)."""
    hits: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    stall_ns: int = 0
    copy_spans: list[list[int]] = field(default_factory=list)
    """[start, end, experts]: runs of back-to-back copies, time.time_ns()."""
    resident: list[int] = field(default_factory=list)
    """Experts in slots per MoE layer, at the moment of `take`."""
    resident_peak_bytes: int = 0
    """The most that ever lay in slots."""

    def __post_init__(self) -> None:
        self.hits, self.misses = [0] * self.layers, [0] * self.layers

    def copied(self, start: int, end: int, nbytes: int, demanded: bool = False) -> None:
        if demanded:
            self.demand_bytes += nbytes
        else:
            self.prefetch_bytes += nbytes
        if self.copy_spans and start - self.copy_spans[-1][1] < 200_000:  # gaps below 0.2 ms are no gaps to look at
            self.copy_spans[-1][1] = end
            self.copy_spans[-1][2] += 1
        else:
            self.copy_spans.append([start, end, 1])
