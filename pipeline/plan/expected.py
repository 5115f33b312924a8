"""What a recorded routing lets one expect of a budget and a policy: moves from a simulation, samples per second from them.

Knows batches as the experts that each MoE layer used and the tables said; nothing of the model's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.bench.limit import fewest_moves
from pipeline.window import Window
from store.simulator import Moves, Tables, Uses, layout_of, simulate

MIN = "min"
"""Not a policy that a run can have: perfect foresight, which says what is left to win."""


@dataclass(frozen=True)
class Routed:
    """A workload, in batches as they would be executed.

    Attributes:
        experts: of each MoE layer.
        uses, predicted: what each batch reads, and what its table says beforehand.
        lookahead: how many batches ahead tables are made (predictor.lookahead).
    """

    samples: int
    experts: tuple[int, ...]
    uses: Uses
    predicted: Tables
    lookahead: int | Literal["auto"] = "auto"

    @property
    def count(self) -> int:
        """(batch, MoE layer, expert) uses."""
        return sum(len(layer) for batch in self.uses for layer in batch)


@dataclass(frozen=True)
class Pace:
    """What turns moves into time.

    Attributes:
        compute_s: of all batches, with every expert at hand; None: not known.
        predict_s: of all their tables, made beside the computing.
        link: bytes per second; None: not known.
        block_bytes: of one expert.
        in_place_waits: a kernel that reads an expert in place waits for the link, as on a GPU; on a CPU it reads RAM either way.
    """

    compute_s: float | None
    predict_s: float
    link: float | None
    block_bytes: int
    in_place_waits: bool

    def seconds(self, moves: int, misses: int) -> float | None:
        """Of all batches: copies go on beside the computing, reads in place are part of it, and both share the link."""
        if self.compute_s is None or self.link is None:
            return None
        expert_s = self.block_bytes / self.link
        if not self.in_place_waits:
            return max(self.compute_s, self.predict_s, (moves - misses) * expert_s)
        return max(self.compute_s + misses * expert_s, self.predict_s, moves * expert_s)

    def is_link_bound(self, moves: int) -> bool:
        """Whether the moves take longer than the computing."""
        return bool(self.compute_s and self.link) and moves * self.block_bytes / (self.link or 1) > (self.compute_s or 0)


@dataclass(frozen=True)
class Expected:
    """One budget under one policy. `misses`: uses that find no slot filled and are read in place."""

    budget: str
    slots: int
    policy: str
    moves: int
    misses: int
    hit_rate: float
    samples_per_second: float | None


def expect(routed: Routed, budget: str, slots: int, policy: str, pace: Pace) -> Expected:
    """
    Args:
        policy: a name of store.eviction.POLICIES, or MIN.
    """
    total = routed.count
    if policy == MIN:
        moves = fewest_moves([[(i, e) for e in layer] for batch in routed.uses for i, layer in enumerate(batch)], slots, rounds=1)
        misses = 0 if slots else moves  # who knows all has every expert there in time, if there is a place for it
    else:
        simulation = simulated(routed, slots, policy)
        moves, misses = simulation.moves, simulation.misses
    seconds = pace.seconds(moves, misses)
    rate = None if seconds is None else routed.samples / seconds
    hits = total - (moves if policy == MIN else misses)
    return Expected(budget, slots, policy, moves, misses, hits / max(total, 1), rate)


def knee(curve: Sequence[tuple[int, int]]) -> int | None:
    """Of (slots, moves), ascending, the slots from which on more of them bring much less.

    The point farthest below the straight line between both ends. None: there is no such point, as where the moves fall evenly.
    """
    (x0, y0), (x1, y1) = curve[0], curve[-1]
    if x1 == x0 or y0 <= y1:
        return None
    below = [(1 - (x - x0) / (x1 - x0)) - (y - y1) / (y0 - y1) for x, y in curve]
    deepest = max(range(len(curve)), key=below.__getitem__)
    return curve[deepest][0] if below[deepest] > 0.05 else None


def simulated(routed: Routed, slots: int, policy: str) -> Moves:
    """What a run moves whose copies never come late."""
    window = Window(slots, routed.lookahead)
    window.saw(sum(p for batch in routed.predicted for layer in batch for _, p in layer) / len(routed.predicted))
    layout = layout_of(routed.experts)
    return Moves.of(simulate(layout, slots, policy, routed.uses, routed.predicted, window.lookahead))
