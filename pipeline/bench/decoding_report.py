"""bench.md of task generate, and a line for each row: knows the rows (decoding.py) and nothing of how they were measured."""

from __future__ import annotations

from typing import Any

from pipeline.bench.report import head
from pipeline.reports.markdown import gb, table

COLUMNS = (
    "system",
    "budget",
    "ms per token (p10-p90)",
    "tokens/s",
    "x limit",
    "limit / MIN, ms",
    "first token, ms (x limit)",
    "hits",
    "copied / in place, GB",
    "experts / device, GB",
    "forwards",
    "error, median / most",
)


def markdown(report: dict[str, Any]) -> str:
    """The text of bench.md."""
    lines = head(report)
    for at in sorted({row["texts"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["texts"] == at]
        some = rows[0]
        lines += ["", f"## {some['model']}, batch {some['batch']}, prompts of {some['prompt_tokens']} tokens", ""]
        lines.append(
            f"Text forced from {some['workload']}. A step reads {some['experts_per_token']} experts in all MoE layers together, "
            "over its rows."
        )
        lines += ["", *table(COLUMNS, map(_cells, rows))]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """One row for a person."""
    each = row["ms_per_token"]
    text = f"batch {row['batch']:>3}  prompt {row['prompt_tokens']:>4}  {row['budget'] or '-':>5}  {row['system']:<13}"
    text += f"{each['mean']:>9.2f} ms per token  first {row['ms_to_first_token']:>9.1f} ms  experts {row['experts_per_token']:.0f}"
    if row["hit_rate"] is not None:
        text += f"  hits {row['hit_rate']:.0%}"
    if row["median_error"] is not None:
        text += f"  error {row['median_error']:.1e}"
    return text


def _cells(row: dict[str, Any]) -> list[str]:
    each, moved = row["ms_per_token"], row["copied_bytes"]
    errors = "-" if row["median_error"] is None else f"{row['median_error']:.1e} / {row['max_error']:.1e}"
    first = f"{row['ms_to_first_token']:.1f}"
    if row.get("first_ratio_to_limit") is not None:
        first += f" ({row['first_ratio_to_limit']:.2f})"
    limit = "-" if row.get("limit_ms_per_token") is None else f"{row['limit_ms_per_token']:.2f} / {row['min_ms_per_token']:.2f}"
    return [
        row["system"] + (f" ({row['predictor']})" if row["predictor"] else ""),
        row["budget"] or "-",
        f"{each['mean']:.2f} ({each['p10']:.2f}-{each['p90']:.2f})",
        f"{row['tokens_per_second']:.1f}",
        "-" if row.get("ratio_to_limit") is None else f"{row['ratio_to_limit']:.2f}",
        limit,
        first,
        "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        "-" if moved is None else f"{gb(moved['prefetch'] + moved['demand'])} / {gb(moved['read_in_place'])}",
        f"{gb(row['expert_bytes_resident_peak'])} / {gb(row['device_memory_peak_bytes'])}",
        ", ".join(f"{count} {way}" for way, count in (row["graphs"] or {}).items()) or "-",
        errors,
    ]
