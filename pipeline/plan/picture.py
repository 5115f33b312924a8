"""plan.png: misses against budget, one line per policy with MIN below (as figure 12 of Towards MoE Deployment)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.plan.expected import MIN, Expected
from pipeline.reports.picture import figure

COLOURS = ("#3573cf", "#d1583a", "#35a892", "#b07a10", "#9c4fa8", "#41399c", "#c0417f")
MARKS = "os^vDP*"
"""Lines that lie on one another are told apart by them."""


def draw(rows: Sequence[Expected], uses: int, knee: str | None, path: Path) -> list[Path]:
    """Writes the picture, and says what to install where that cannot be done; returns what was written.

    Args:
        uses: (batch, MoE layer, expert) uses, that moves are a share of.
    """
    drawn = figure(7, 4.4)
    if drawn is None:
        return []
    axes = drawn.add_subplot()
    policies = [policy for policy in dict.fromkeys(row.policy for row in rows) if policy != MIN]
    for policy, colour, mark in zip(policies, COLOURS * len(policies), MARKS * len(policies), strict=False):
        mine = [row for row in rows if row.policy == policy]
        axes.plot(
            [row.slots for row in mine], [_share(row, uses) for row in mine], f"{mark}-", color=colour, markersize=5, label=policy
        )
    best = [row for row in rows if row.policy == MIN]
    axes.plot([row.slots for row in best], [_share(row, uses) for row in best], "--", color="black", label="MIN: perfect foresight")
    if knee is not None:
        at = next(row.slots for row in rows if row.budget == knee)
        axes.axvline(at, color="#5f6b7c", linewidth=0.8, linestyle=":")
        axes.text(at, axes.get_ylim()[1], f" knee, {knee}", va="top", fontsize=9, color="#5f6b7c")
    axes.set_xlabel("experts that fit the budget (slots)")
    axes.set_ylabel("misses: experts moved, % of uses")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    drawn.savefig(path, dpi=110)
    return [path]


def _share(row: Expected, uses: int) -> float:
    return 100 * row.moves / max(uses, 1)
