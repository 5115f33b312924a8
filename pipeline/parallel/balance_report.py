"""balance.json for people: tables in balance.md, and a picture where matplotlib is there.

Knows the rows of balance.json (balance.py) and nothing of how they came about. `python -m pipeline.parallel.balance_report FILE`
makes them again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.reports.markdown import table
from pipeline.reports.output import write_whole
from pipeline.reports.picture import figure, save_small

Row = dict[str, Any]
COLOURS = {"round_robin": "#7d8797", "greedy": "#3573cf", "anti_correlation": "#35a892"}
DPI, SHADES = 90, 200
"""A picture stays below 100 kB, and fits a repository."""


def markdown(report: dict[str, Any]) -> str:
    """The text of balance.md."""
    rows: list[Row] = report["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"Model {report['model']}, experts per MoE layer: {report['experts']}; data {report['workload']}. Versions: {versions}.",
        "",
        "Avg Max Load / Max Load on the second half of the batches: the busiest device's share of a batch's tokens, its mean over "
        "batches and MoE layers, and the worst. `even`: what perfect balance would be.",
    ]
    placements = list(dict.fromkeys(row["placement"] for row in rows))
    for batch, part in dict.fromkeys((row["batch"], row["part"]) for row in rows):
        mine = [row for row in rows if (row["batch"], row["part"]) == (batch, part)]
        lines += ["", f"## Batches of {batch}, {part}", "", f"{mine[0]['batches']} batches.", ""]
        cells = []
        for key in dict.fromkeys((row["devices"], row["replicas"], row["planned_on"]) for row in mine):
            found = {row["placement"]: row for row in mine if (row["devices"], row["replicas"], row["planned_on"]) == key}
            loads = [f"{found[name]['avg_max_load']:.3f} / {found[name]['max_load']:.3f}" for name in placements]
            cells.append([key[0], f"{1 / key[0]:.3f}", *key[1:], *loads])
        lines += table(["devices", "even", "replicas", "planned on", *placements], cells)
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
    """Writes balance.png: bars of Avg Max Load by placement and number of devices, planned on the first half, without replicas if
    there is a row without, Max Load as a mark above; says what to install where that cannot be done. Returns what was written."""
    least = min(row["replicas"] for row in report["rows"])
    first = report["rows"][0]["planned_on"]
    rows = [row for row in report["rows"] if row["replicas"] == least and row["planned_on"] == first]
    batches, parts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("batch", "part"))
    drawn = figure(1.2 + 2.8 * len(batches), 1.2 + 2.2 * len(parts))
    if drawn is None:
        return []
    panels = drawn.subplots(len(parts), len(batches), squeeze=False, sharey=True)
    for across, batch in enumerate(batches):
        for down, part in enumerate(parts):
            _panel(panels[down][across], [row for row in rows if (row["batch"], row["part"]) == (batch, part)])
        panels[0][across].set_title(f"batches of {batch}", fontsize=9)
    for down, part in enumerate(parts):
        panels[down][0].set_ylabel(f"{part}: busiest device's\nshare of a batch's tokens", fontsize=8)
    bars, names = panels[0][0].get_legend_handles_labels()
    drawn.legend(bars, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    title = f"{Path(report['model']).stem}, {Path(report['workload']).name}: planned on the first half, judged on the second"
    drawn.suptitle(title, fontsize=10)
    return [save_small(drawn, directory / "balance.png", DPI, SHADES)]


def _panel(axes: Any, rows: list[Row]) -> None:
    devices = list(dict.fromkeys(row["devices"] for row in rows))
    placements = list(dict.fromkeys(row["placement"] for row in rows))
    width = 0.8 / len(placements)
    for at, placement in enumerate(placements):
        mine = [row for row in rows if row["placement"] == placement]
        places = [i + width * (at - (len(placements) - 1) / 2) for i in range(len(mine))]
        axes.bar(places, [row["avg_max_load"] for row in mine], width * 0.9, color=COLOURS.get(placement), label=placement)
        marks = {"color": "black", "s": 14, "marker": "_", "zorder": 3}
        axes.scatter(places, [row["max_load"] for row in mine], **marks, label="Max Load" if at == len(placements) - 1 else None)
    for i, count in enumerate(devices):
        label = "even" if i == 0 else None
        axes.plot([i - 0.45, i + 0.45], [1 / count] * 2, "--", color="#d1583a", linewidth=1, label=label)
    axes.set_xticks(range(len(devices)), [f"{count} devices" for count in devices], fontsize=8)
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = json.loads(file.read_text())
    for path in [write_whole(file.parent / "balance.md", markdown(found)), *draw(found, file.parent)]:
        print(f"wrote {path}")
