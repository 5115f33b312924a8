"""What static and dynamic gating cost, beside what the paper says of them: per setting, and as gating.md."""

from __future__ import annotations

from typing import Any

from pipeline.bench.gating_layer import Setting
from pipeline.reports.markdown import table

COLUMNS = (
    "setting",
    "waste factor",
    "paper: times as fast",
    "slice, at the same batch, up to",
    "slice, best throughput of each",
    "MoE layer alone, up to",
    "paper: activations at batch 8, GB",
    "slice at batch 8, GB",
    "largest batch, static / dynamic",
)


def summary(setting: Setting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the paper says of a setting beside what was measured here."""
    done = {
        kind: {row["batch"]: row for row in rows if row["kind"] == kind and "layer_ms" in row} for kind in ("static", "dynamic")
    }
    both = sorted(done["static"].keys() & done["dynamic"].keys())
    if not both:
        return {"setting": setting.name, "waste": setting.waste, "paper": setting.paper, "largest_batch": None}

    def best(kind: str, what: str) -> float:
        return max(row["tokens"] / row[what] for row in done[kind].values())

    at = {batch: {kind: done[kind][batch] for kind in done} for batch in both}
    ratios = {
        what: {batch: round(pair["static"][f"{what}_ms"] / pair["dynamic"][f"{what}_ms"], 2) for batch, pair in at.items()}
        for what in ("layer", "slice")
    }
    return {
        "setting": setting.name,
        "waste": round(setting.waste, 2),
        "paper": setting.paper,
        "largest_batch": {kind: max(done[kind]) for kind in done},
        "times_as_fast": ratios,
        "best_throughput": {
            what: round(best("dynamic", f"{what}_ms") / best("static", f"{what}_ms"), 2) for what in ("layer", "slice")
        },
        "slice_gb_at_8": {kind: _gb(done[kind].get(8, {}).get("slice_bytes")) for kind in done},
    }


def _gb(nbytes: int | None) -> float | None:
    return None if nbytes is None else round(nbytes / 1e9, 2)


def markdown(report: dict[str, Any]) -> str:
    """gating.md: the paper's figures and these."""
    rows = []
    for one in report["settings"]:
        if one["largest_batch"] is None:
            continue
        paper, gb, largest = one["paper"], one["slice_gb_at_8"], one["largest_batch"]
        rows.append(
            [
                one["setting"],
                one["waste"],
                paper["factor"],
                max(one["times_as_fast"]["slice"].values()),
                one["best_throughput"]["slice"],
                max(one["times_as_fast"]["layer"].values()),
                f"{paper['static_gb']} / {paper['dynamic_gb']}" if "static_gb" in paper else "-",
                f"{gb['static']} / {gb['dynamic']}",
                f"{largest['static']} / {largest['dynamic']}",
            ]
        )
    return "\n".join(table(COLUMNS, rows)) + "\n"
