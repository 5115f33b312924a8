"""`plan`: will it fit, how fast, and what budget should it have? Answered before loading, from headers and a recorded routing.

No weight is read or downloaded, but for what recorded.py says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.machine import hardware
from pipeline.plan.expected import MIN, Expected, Pace, expect, knee, moves_when_warm
from pipeline.plan.footprint import Footprint, footprint, gb
from pipeline.plan.link import measure
from pipeline.plan.picture import draw
from pipeline.plan.provenance import provenance
from pipeline.plan.recorded import Recorded, replay
from pipeline.plan.trial import SAMPLED, tried
from pipeline.prepare import load_tokenizer
from pipeline.reports.metrics import versions
from pipeline.reports.output import PLANS, check_lasting, write_whole
from pipeline.tasks.registry import Task, make_task
from store.eviction import POLICIES


def plan(config: Config) -> dict[str, Any]:
    """Prints what is to be expected of a config and of other budgets; writes plan.json and plan.png; returns what plan.json holds.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    output = Path(config.output_dir)
    check_lasting(output)
    known = footprint(config)
    budgets = _budgets(config, known)
    recorded, task, origin = None, None, None
    if config.plan.trace is not None:
        task = make_task(config, known.model, load_tokenizer(known.model.tokenizer))
        recorded = replay(config, known.model)
        origin = provenance(config, known.model, task, recorded.batches)
    _check_writable(output)
    for line in known.sentences() + ([] if origin is None else origin.warnings(config)):
        print(line)
    link = measure(known.directory, known.layout.slot_bytes, known.device)
    print(_of_the_link(known, link))
    rows, pace = [], None
    if recorded is not None and task is not None:
        pace = _pace(config, known, task, recorded, link, list(budgets.values()))
        policies = config.plan.policies or list(POLICIES)
        rows = [expect(recorded.routed, b, s, p, pace) for b, s in budgets.items() for p in [*policies, MIN]]
        print(_of_the_trace(recorded, pace))
        print("\n".join(table(rows, recorded.routed.count, known.free // known.layout.slot_bytes, config.store.policy)))
    else:
        print("no plan.trace: how many experts must move is not known; record one with `train`, predictor.kind=oracle")
    best = _knee(config, rows)
    report = _report(known, rows, best, link, pace) | {"trace": None if origin is None else origin.to_dict()}
    for line in _advice(config, known, rows, pace, recorded, report):
        print(line)
    written = [write_whole(output / PLANS[0], json.dumps(report | {"config": config.to_dict()}, indent=1) + "\n")]
    if recorded is not None:
        written += draw(rows, recorded.routed.count, best, output / PLANS[1])
    for path in written:
        print(f"wrote {path}")
    return report


def _check_writable(path: Path) -> None:
    """Before the work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"output_dir: {path} cannot be written to")


def _budgets(config: Config, known: Footprint) -> dict[str, int]:
    """Those to weigh and the config's own, as written -> slots; ascending."""
    wanted = {budget: known.slots(budget, "plan.budgets") for budget in config.plan.budgets if budget != "auto"}
    own = known.auto()[0] if config.store.budget == "auto" else config.store.budget
    wanted[own] = known.slots(own, "store.budget")
    return dict(sorted(wanted.items(), key=lambda item: item[1]))


def _pace(config: Config, known: Footprint, task: Task, recorded: Recorded, link: float | None, slots: list[int]) -> Pace:
    sample = recorded.first(SAMPLED[torch.device(known.device).type])
    found = tried(known, task, sample, slots, config.store.policy, config.routing)
    return pace_of(config.store.policy, sample, [(one.slots, one.seconds) for one in found], known, link)


def pace_of(policy: str, sample: Recorded, found: list[tuple[int, float]], known: Footprint, link: float | None) -> Pace:
    """
    Args:
        found: slots, seconds per batch of the sample.
    """
    points = [(moves_when_warm(sample.routed, slots, policy), seconds) for slots, seconds in found]
    predict_s = sample.predict_s / len(sample.batches)
    return Pace.of(points, predict_s, None if link is None else known.layout.slot_bytes / link)


def _knee(config: Config, rows: list[Expected]) -> str | None:
    """The budget beyond which more buys little, under the config's policy, or the first that was weighed."""
    if not rows:
        return None
    policy = config.store.policy if any(row.policy == config.store.policy for row in rows) else rows[0].policy
    curve = [row for row in rows if row.policy == policy]
    slots = knee([(row.slots, row.moves) for row in curve])
    return next((row.budget for row in curve if row.slots == slots), None)


def _report(known: Footprint, rows: list[Expected], best: str | None, link: float | None, pace: Pace | None) -> dict[str, Any]:
    budget, reason = known.auto()
    return {
        "bytes": {
            "arena": known.layout.nbytes,
            "backbone": known.layout.backbone_bytes,
            "experts": known.layout.expert_bytes,
            "slot": known.layout.slot_bytes,
        },
        "free_bytes": {"device": known.device_free, "host": known.host_free, "shm": known.directory_free},
        "fits": {"arena": known.arena_fits, "experts": known.experts_fit},
        "link_gb_per_s": None if link is None else round(link / 1e9, 2),
        "compute_ms": None if pace is None or pace.compute_s is None else round(pace.compute_s * 1e3, 4),
        "tried": [] if pace is None else [{"moves": round(m, 2), "ms": round(s * 1e3, 4)} for m, s in pace.tried],
        "rows": [
            {
                "budget": row.budget,
                "policy": row.policy,
                "hit_rate": round(row.hit_rate, 4),
                "samples_per_second": None if row.samples_per_second is None else round(row.samples_per_second, 2),
                "slots": row.slots,
                "moves": row.moves,
            }
            for row in rows
        ],
        "knee": best,
        "auto": {"budget": budget, "reason": reason},
        "hardware": hardware(known.device),
        "versions": versions(),
    }


def _of_the_link(known: Footprint, link: float | None) -> str:
    if link is None:
        return f"link: not measured, {known.directory} has no room for a few experts"
    took = known.layout.slot_bytes / link * 1e3
    return f"link: {link / 1e9:.1f} GB/s from {known.directory} to the device; an expert takes {took:.3g} ms"


def _of_the_trace(recorded: Recorded, pace: Pace) -> str:
    batches, layers = len(recorded.batches), len(recorded.routed.uses[0])
    used = recorded.routed.count / batches / layers
    text = f"trace: {recorded.routed.samples} rows in {batches} batches; each uses {used:.1f} experts per MoE layer"
    if pace.compute_s is not None:
        text += f" and takes {pace.compute_s * 1e3:.3g} ms where least has to move"
    return f"{text}; {recorded.tables}, {recorded.predict_s / batches * 1e3:.3g} ms to make"


def table(rows: list[Expected], uses: int, fit: int, policy: str) -> list[str]:
    """Lines for people: a row per budget with each policy's moves per use and, where known, samples per second under one of them.

    Args:
        fit: slots for which there is room now.
        policy: whose samples per second are shown, beside those of MIN.
    """
    policies = list(dict.fromkeys(row.policy for row in rows))
    timed = [policy, MIN] if policy in policies else [policies[0], MIN]
    lines = [f"{'':>12} {'':>6}  {'moves per use':<{11 * len(policies)}}  rows/s"]
    names = "".join(f"{name:>11}" for name in policies) + "  " + "".join(f"{name:>11}" for name in timed)
    lines.append(f"{'budget':>12} {'slots':>6}{names}")
    for budget, slots in {row.budget: row.slots for row in rows}.items():
        mine = {row.policy: row for row in rows if row.budget == budget}
        cells = "".join(f"{mine[name].moves / max(uses, 1):>11.3f}" for name in policies) + "  "
        for name in timed:
            rate = mine[name].samples_per_second
            cells += f"{'-' if rate is None else f'{rate:,.1f}':>11}"
        lines.append(f"{budget:>12} {slots:>6}{cells}" + ("" if slots <= fit else "  does not fit now"))
    return [*lines, "moves: experts copied or read in place; below 1 per use is reuse; min: perfect foresight, the bound"]


def _advice(
    config: Config, known: Footprint, rows: list[Expected], pace: Pace | None, recorded: Recorded | None, report: dict[str, Any]
) -> list[str]:
    lines, batches, uses = [], 0, 0
    if recorded is not None:
        batches, uses = len(recorded.batches), recorded.routed.count
    if report["knee"] is not None:
        lines.append(f"the knee is at {report['knee']}: beyond it more slots save little")
    if pace is not None and pace.tried and batches:
        bound = [row for row in rows if row.policy == config.store.policy and pace.is_link_bound(row.moves / batches)]
        if bound:
            lines.append(f"the link is the bound up to a budget of {bound[-1].budget}: moves take longer there than computing does")
        elif rows:
            lines.append("computing is the bound under every budget: the link keeps up")
    lines.append(f"store.budget=auto would take {report['auto']['budget']}: {report['auto']['reason']}")
    own = report["auto"]["budget"] if config.store.budget == "auto" else config.store.budget
    slots = known.slots(own, "store.budget")
    wanted = slots * known.layout.slot_bytes
    lines.append(f"store.budget: {own} is {slots} slots, {gb(wanted)}, {gb(known.free)} are free for experts")
    if wanted > known.free:
        lines[-1] += ": `run` would refuse it"
    for row in rows:
        if (row.budget, row.policy) == (own, config.store.policy):
            rate = "" if row.samples_per_second is None else f", {row.samples_per_second:,.1f} rows/s"
            lines[-1] += f"; {row.moves / max(uses, 1):.3f} moves per use under {row.policy}{rate}"
    return lines
