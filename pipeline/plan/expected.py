"""What a recorded routing lets one expect of a budget and a policy: moves from a simulation, samples per second from them and from
what was tried (trial.py).

Knows batches as the experts that each MoE layer used and the tables said; nothing of the model's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from pipeline.bench.limit import fewest_moves
from pipeline.window import Window
from store.movement import Movement
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
    """What turns moves into time: what was tried, and straight lines between.

    Attributes:
        tried: (moves per batch, seconds per batch) of one policy under several budgets, moves as simulated, ascending; empty:
            nothing could be tried.
        predict_s: of a batch's table, made beside the computing.
        expert_s: of one move over the link; None: not known.
    """

    tried: tuple[tuple[float, float], ...]
    predict_s: float
    expert_s: float | None

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], predict_s: float, expert_s: float | None) -> Pace:
        """
        Args:
            points: in any order; those that move alike are one, in the middle.
        """
        alike: dict[float, list[float]] = {}
        for moves, seconds in points:
            alike.setdefault(moves, []).append(seconds)
        return cls(tuple((moves, median(alike[moves])) for moves in sorted(alike)), predict_s, expert_s)

    def seconds(self, moves: float) -> float | None:
        """Of a batch that moves so many experts; beyond what was tried, every further one takes the link's time."""
        if not self.tried:
            return None
        most, at_most = self.tried[-1]
        beyond = max(0.0, moves - most) * (self.expert_s or 0.0)
        xs, ys = (np.array(axis) for axis in zip(*self.tried, strict=True))
        return max(self.predict_s, at_most + beyond if beyond else float(np.interp(moves, xs, ys)))

    @property
    def compute_s(self) -> float | None:
        """Of a batch that moves as little as was tried."""
        return self.tried[0][1] if self.tried else None

    def is_link_bound(self, moves: float) -> bool:
        """Whether a batch's moves take longer than its computing."""
        return moves * (self.expert_s or 0.0) > (self.compute_s or 0.0) > 0


@dataclass(frozen=True)
class Expected:
    """One budget under one policy.

    Attributes:
        moves, misses, hit_rate: of a run over the batches, slots empty at first; misses are read in place.
        samples_per_second: when slots are full: as a run over many more such rows has it.
    """

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
    total, batches = routed.count, len(routed.uses)
    if policy == MIN:
        sequence = [[(i, e) for e in layer] for batch in routed.uses for i, layer in enumerate(batch)]
        moves, warm = (fewest_moves(sequence, slots, rounds) for rounds in (1, 2))
        hits = total - moves
        misses = 0 if slots else moves  # who knows all has every expert there in time, if there is a place for it
    else:
        moved = simulated(routed, slots, policy, rounds=2)
        cold = Moves.of(moved[:batches])
        moves, misses, hits = cold.moves, cold.misses, cold.hits
        warm = Moves.of(moved[batches:]).moves
    seconds = pace.seconds(warm / batches)
    rate = None if seconds is None else routed.samples / batches / seconds
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


def simulated(routed: Routed, slots: int, policy: str, rounds: int = 1) -> list[Movement]:
    """What a run moves whose copies never come late, batch by batch, when all batches come so many times."""
    window = Window(slots, routed.lookahead)
    window.saw(sum(p for batch in routed.predicted for layer in batch for _, p in layer) / len(routed.predicted))
    uses, tables = [*routed.uses] * rounds, [*routed.predicted] * rounds
    return simulate(layout_of(routed.experts), slots, policy, uses, tables, window.lookahead)


def moves_when_warm(routed: Routed, slots: int, policy: str) -> float:
    """Per batch, when all come for the second time: what a round of a trial (trial.py) moves."""
    batches = len(routed.uses)
    return Moves.of(simulated(routed, slots, policy, rounds=2)[batches:]).moves / batches
