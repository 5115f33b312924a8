"""simulate.json for people: tables in simulate.md, and a picture where matplotlib is there.

Knows the rows of simulate.json (simulate.py) and nothing of how they came about. `python -m pipeline.plan.simulate_report FILE`
makes them again.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.reports.markdown import table
from pipeline.reports.output import write_whole
from pipeline.reports.picture import figure, save_small

Row = dict[str, Any]
COLOURS = ("#7d8797", "#3573cf", "#b07a10", "#9c4fa8", "#35a892", "#d1583a")
WIDEST, THINNEST = 5.5, 1.5
"""Lines often lie on each other: the first policy's is the widest and lowest."""
DPI, SHADES = 90, 200
"""A picture stays below 100 kB, and fits a repository."""


def markdown(report: dict[str, Any]) -> str:
    """The text of simulate.md."""
    lines = [
        f"Model {report['model']}, {len(report['experts'])} MoE layers, {sum(report['experts'])} experts; "
        f"data {report['workload']}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}.",
        "",
        "A use is an expert that a MoE layer of a batch needs. A move is an expert that crosses the link, copied or read in place. "
        "MIN: moves per use with perfect foresight. The other columns: how many times MIN a policy moves.",
    ]
    for title, rows in (("copies ahead of tables", report["rows"]), ("experts one by one, slots per layer", report["one_by_one"])):
        for batch in dict.fromkeys(row["batch"] for row in rows):
            lines += ["", *_table(title, [row for row in rows if row["batch"] == batch])]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[Row]) -> list[str]:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    some = rows[0]
    lines = [
        f"## Batch {some['batch']}, {title}",
        "",
        f"{some['batches']} batches, {some['experts_used_per_layer']} experts used per MoE layer, {some['uses']} uses.",
        "",
    ]
    cells = []
    predictors, budgets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("predictor", "budget"))
    for predictor, budget in product(predictors, budgets):
        mine = {row["policy"]: row for row in rows if (row["predictor"], row["budget"]) == (predictor, budget)}
        any_row = next(iter(mine.values()))
        bound = f"{any_row['fewest_moves'] / max(any_row['uses'], 1):.3f}"
        ratios = [f"{mine[policy]['ratio_to_fewest']:.3f}" for policy in policies]
        cells.append([predictor or "-", budget, any_row["slots"], bound, *ratios])
    return [*lines, *table(["predictor", "budget", "slots", "MIN", *policies], cells)]


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
    """Writes simulate.png: moves per use over the budget, a line per policy, MIN below; says what to install where that cannot be
    done. Returns what was written."""
    rows = [row | {"predictor": f"tables: {row['predictor']}"} for row in report["rows"]]
    rows += [row | {"predictor": "experts one by one"} for row in report["one_by_one"]]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    predictors = list(dict.fromkeys(row["predictor"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    drawn = figure(3.4 * len(batches), 2.3 * len(predictors) + 0.8)
    if drawn is None:
        return []
    panels = drawn.subplots(len(predictors), len(batches), squeeze=False, sharex=True)
    for down, predictor in enumerate(predictors):
        for across, batch in enumerate(batches):
            axes = panels[down][across]
            mine = [row for row in rows if (row["predictor"], row["batch"]) == (predictor, batch)]
            _panel(axes, mine, policies)
            if down == 0:
                axes.set_title(f"batches of {batch}: {mine[0]['experts_used_per_layer']:g} experts per layer", fontsize=9)
            if across == 0:
                axes.set_ylabel(f"{predictor}\nmoves per use", fontsize=8)
            if down == len(predictors) - 1:
                axes.set_xlabel("budget: share of experts with a slot", fontsize=8)
    every = {name: line for axes in panels.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in [*policies, "MIN"] if name in every]  # not every panel has every policy
    drawn.legend(
        [every[name] for name in names],
        names,
        loc="outside lower center",
        ncols=min(len(names), 1 + 2 * len(batches)),
        fontsize=8,
        frameon=False,
    )
    drawn.suptitle(f"{Path(report['model']).stem}, {Path(report['workload']).name}: fewer moves are better", fontsize=10)
    return [save_small(drawn, directory / "simulate.png", DPI, SHADES)]


def _panel(axes: Any, rows: list[Row], policies: list[str]) -> None:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    for policy in [name for name in policies if any(row["policy"] == name for row in rows)]:
        ys = [row["moves"] / max(row["uses"], 1) for row in rows if row["policy"] == policy]
        at = policies.index(policy)
        width = WIDEST - (WIDEST - THINNEST) * at / max(1, len(policies) - 1)
        axes.plot(range(len(ys)), ys, linewidth=width, color=COLOURS[at % len(COLOURS)], label=policy, solid_capstyle="round")
    least = {row["budget"]: row["fewest_moves"] / max(row["uses"], 1) for row in rows}
    axes.plot(range(len(budgets)), list(least.values()), "--", color="black", linewidth=1.2, label="MIN")
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set_ylim(0, min(2.5, axes.get_ylim()[1]))
    axes.tick_params(labelsize=7)
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = json.loads(file.read_text())
    for path in [write_whole(file.parent / "simulate.md", markdown(found)), *draw(found, file.parent)]:
        print(f"wrote {path}")
