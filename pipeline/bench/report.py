"""bench.json for people: a table per model, workload and batch size in bench.md, and two pictures where matplotlib is there.

Knows the rows of bench.json (rows.py) and nothing of how they were measured: `python -m pipeline.bench.report FILE` makes
them again from a file that another machine wrote.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from pipeline.reports.markdown import gb, table
from pipeline.reports.output import write_whole
from pipeline.reports.picture import figure, save_small

Row = dict[str, Any]
COLUMNS = (
    "system",
    "budget",
    "ms per batch (p10-p90)",
    "samples/s",
    "x transformers",
    "x limit",
    "hits",
    "copied / in place, GB per batch",
    "link used",
    "experts / device, GB",
    "predictor (recall)",
    "predict ms",
    "error (x transformers')",
)
COLOURS = ("#3573cf", "#d1583a", "#35a892", "#b07a10", "#9c4fa8", "#41399c", "#5f6b7c", "#18202c", "#c0417f", "#7d8797")
DPI, SHADES = 100, 48
"""A picture stays below 60 kB, and fits a repository."""


def markdown(report: dict[str, Any]) -> str:
    """The text of bench.md."""
    lines = head(report)
    for (model, workload, batch), rows in _sections(report["rows"]).items():
        some = rows[0]
        lines += ["", f"## {model}, {workload}, batch {batch}", ""]
        lines.append(
            f"Batches: {some['batches']}, of {some['tokens']} tokens in all; rounds: {len(some['round_ms'])}; "
            f"a batch uses {some['experts_used_per_layer']} experts per MoE layer."
        )
        lines += ["", *table(COLUMNS, map(_cells, rows))]
    ratio = report["ray_over_in_process"]
    if ratio is not None:
        lines += ["", "Ray's pipeline, throughput as a share of that of direct calls, median over rounds:", ""]
        lines += [f"* batch {each['batch']}, budget {each['budget']}: {each['median']:.1%}" for each in ratio["per_budget"]]
    return "\n".join(lines) + "\n"


def head(report: dict[str, Any]) -> list[str]:
    """Lines on what was measured on, and what of."""
    link, arena = report["link_gb_per_s"], report["arena"]
    return [
        f"Hardware: {report['hardware']}. Versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}.",
        f"Experts {gb(report['expert_bytes'])} GB, backbone {gb(report['backbone_bytes'])} GB. "
        f"Arena {'attached warm' if arena['warm_start'] else 'built'} in {arena['seconds']} s. "
        + (f"Link {link} GB/s." if link else "No link: slots are in the host's memory."),
    ]


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
    """Writes throughput.png and memory.png; says what to install where that cannot be done. Returns what was written."""
    sections = _sections(report["rows"])
    written = []
    for name, panel, height in (("throughput.png", _throughput, 4.0), ("memory.png", _memory, _tallest(sections))):
        drawn = figure(4.2 * len(sections), height)
        if drawn is None:
            break
        for at, (key, rows) in enumerate(sections.items()):
            axes = drawn.add_subplot(1, len(sections), at + 1)
            axes.set_title(f"batch {key[2]}", fontsize=10)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            panel(axes, rows)
        lines, meanings = drawn.axes[0].get_legend_handles_labels()
        if lines:  # the same in every panel
            drawn.legend(lines, meanings, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        names = dict.fromkeys(f"{Path(model).stem}, {Path(data).name}" for model, data, _ in sections)
        drawn.suptitle("; ".join(names), fontsize=10)
        written.append(save_small(drawn, directory / name, DPI, SHADES))
    return written


def _sections(rows: list[Row]) -> dict[tuple[str, str, int], list[Row]]:
    sections: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        sections.setdefault((row["model"], row["workload"], row["batch"]), []).append(row)
    return sections


def _cells(row: Row) -> list[str]:
    ms, moved, batches = row["ms"], row["copied_bytes"], row["batches"]
    copied = "-"
    if moved is not None:
        copied = f"{gb((moved['prefetch'] + moved['demand']) / batches)} / {gb(moved['read_in_place'] / batches)}"
    error = f"{row['median_error']:.1e}"
    if row["error_over_transformers"] is not None:
        error += f" ({row['error_over_transformers']:.2f})"
    predictor = f"{row['predictor']} ({row['recall']:.1%})" if row["predictor"] else "-"
    return [
        _system(row),
        row["budget"] or "-",
        f"{ms['median']:.2f} ({ms['p10']:.2f}-{ms['p90']:.2f})",
        f"{row['samples_per_second']:.1f}",
        _number(row["speedup"]),
        _number(row["ratio_to_limit"]),
        "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        copied,
        "-" if row["link_efficiency"] is None else f"{row['link_efficiency']:.0%}",
        f"{gb(row['expert_bytes_resident_peak'])} / {gb(row['device_memory_peak_bytes'])}",
        predictor,
        _number(row["predict_ms"]),
        error,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _system(row: Row) -> str:
    """`placement` is null but where devices share experts out; reports from before it was a key lack it."""
    return row["system"] + (f", {row['placement']}" if row.get("placement") else "")


def _name(row: Row) -> str:
    return _system(row) + (f" ({row['predictor']})" if row["predictor"] and row["budget"] else "")


def _throughput(axes: Any, rows: list[Row]) -> None:
    """Over the budgets, in the order in which they were measured: a line per system, the limit dashed, the rest across."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"]))
    for number, name in enumerate(dict.fromkeys(_name(row) for row in rows)):
        mine, colour = [row for row in rows if _name(row) == name], COLOURS[number % len(COLOURS)]
        if mine[0]["budget"] is None:
            axes.axhline(mine[0]["samples_per_second"], color=colour, linewidth=1.2, linestyle=":", label=name)
        else:
            where = [budgets.index(row["budget"]) for row in mine]
            axes.plot(where, [row["samples_per_second"] for row in mine], "o-", color=colour, markersize=3.5, label=name)
    limits = {row["budget"]: _at_the_limit(row) for row in rows if row["budget"] and row["limit_ms"]}
    if limits:
        axes.plot([budgets.index(b) for b in limits], list(limits.values()), "--", color="black", linewidth=1.2, label="limit")
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set_xlabel("budget for experts on the device", fontsize=8)
    axes.set_ylabel("samples per second", fontsize=8)
    rates = [*limits.values(), *(row["samples_per_second"] for row in rows)]
    axes.set_yscale("log")
    axes.set_ylim(10 ** math.floor(math.log10(min(rates))), 10 ** (math.floor(math.log10(max(rates))) + 1))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", which="both", linewidth=0.3)


def _at_the_limit(row: Row) -> float:
    return row["samples_per_second"] * row["ms"]["median"] / row["limit_ms"]


def _memory(axes: Any, rows: list[Row]) -> None:
    """A bar per system and budget: the peak on the device; where there is none to measure, that of experts in slots."""
    bars = _bars(rows)
    systems = list(dict.fromkeys(row["system"] for row in rows))
    values = [_occupied(row) / 1e9 for row in bars]
    axes.barh(range(len(bars)), values, color=[COLOURS[systems.index(row["system"]) % len(COLOURS)] for row in bars])
    axes.set_yticks(range(len(bars)), [f"{row['system']} {row['budget'] or ''}".strip() for row in bars])
    for at, value in enumerate(values):
        axes.text(value, at, f" {value:.3g}", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    on_device = any(row["device_memory_peak_bytes"] is not None for row in bars)
    axes.set_xlabel("device memory at its peak, GB" if on_device else "experts in slots at their peak, GB", fontsize=8)


def _bars(rows: list[Row]) -> list[Row]:
    """One per system and budget, whatever its tables and placement; those whose memory is known."""
    first = {(row["system"], row["budget"]): row for row in reversed(rows) if _occupied(row) is not None}
    return sorted(first.values(), key=rows.index)


def _occupied(row: Row) -> Any:
    on_device = row["device_memory_peak_bytes"]
    return row["expert_bytes_resident_peak"] if on_device is None else on_device


def _tallest(sections: dict[tuple[str, str, int], list[Row]]) -> float:
    """Inches."""
    return 1.2 + 0.2 * max(len(_bars(rows)) for rows in sections.values())


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = json.loads(file.read_text())
    for path in [write_whole(file.parent / "bench.md", markdown(found)), *draw(found, file.parent)]:
        print(f"wrote {path}")
