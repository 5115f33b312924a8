"""What a run says on the terminal: what it is about to do, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data import blank_lines
from pipeline.losses import KINDS
from pipeline.prepare import Prepared
from pipeline.reports.output import METRICS, PREDICTIONS
from predictor.registry import SILENT
from predictor.stand_ins import Plan


def say_plan(prepared: Prepared, entries: list[dict[str, Any]]) -> None:
    """Before anything starts.

    Args:
        entries: of a run that goes on, those that it has.
    """
    layout, rows, shape = prepared.layout, len(prepared.rows), prepared.model.shape
    say(f"{rows} rows in {len(prepared.batches)} batches from {prepared.config.data.path}")
    if blank := blank_lines(prepared.rows):
        say(f"{blank} blank lines between them are no rows: a row's number counts the others")
    if prepared.truncated:
        say(f"{prepared.truncated} texts were longer than {prepared.config.batch.max_tokens} tokens and are cut")
    say(
        f"{sum(shape.experts)} experts in {shape.layers} MoE layers, {mb(layout.expert_bytes)}; budget "
        f"{prepared.config.store.budget}: {prepared.slots} slots, {mb(prepared.budget_bytes)}"
        + (f", for each of {prepared.config.executors} Executors" if prepared.config.executors > 1 else "")
    )
    if prepared.stand_ins is not None:
        say(f"the rehearsal's stand-ins: {said_of(prepared.stand_ins)}")
    kind, task = prepared.config.predictor.kind, prepared.config.task
    if kind == "recent" and task != "generate":
        say(
            f"predictor.kind: recent predicts while a model writes, which task {task} does not: nothing will be copied ahead; "
            "predictor.kind=rehearsal predictor.path=null predicts here"
        )
    if entries:
        say(f"resuming: {sum(len(entry['results']) for entry in entries)} rows are done already")


def said_of(stand_ins: Plan) -> str:
    rank = f" of rank {stand_ins.size}" if stand_ins.method == "svd" else ""
    return f"{stand_ins.method}{rank}, {mb(stand_ins.nbytes)}"


def say_results(metrics: dict[str, Any], path: Path) -> None:
    """At the end.

    Args:
        metrics: what metrics.json holds.
        path: of the output directory.
    """
    moved, executors, config = metrics["copied_bytes"], metrics["executors"], metrics["config"]
    count = max(config["executors"], len(executors))  # one may not have answered a batch
    of_each = f"; budget {config['store']['budget']} for each of {count} Executors" if count > 1 else ""
    quality = ", ".join(f"{name} {value:.4g}" for name, value in metrics["quality"].items())
    say(
        f"{metrics['samples']} rows in {metrics['seconds']:.1f} s, {metrics['samples_per_second']:.1f}/s"
        + (f"; {quality}" if quality else "")
    )
    say(
        f"experts: {metrics['hit_rate'] or 0:.1%} of {metrics['uses']} uses found in a slot; {mb(moved['prefetch'])} prefetched, "
        f"{mb(moved['read_in_place'])} read in place; resident at most {mb(metrics['expert_bytes']['resident_peak'])} "
        f"of {mb(metrics['expert_bytes']['total'])}{of_each}"
    )
    say(f"moves: {metrics['moves'] / max(metrics['uses'], 1):.2f} experts copied or read in place per use; below 1 is reuse")
    never = metrics["expert_bytes"]["budget"] and not metrics["expert_bytes"]["resident_peak"]
    if never and metrics["prediction"]["kind"] not in SILENT:
        say("nothing was copied: the predictor was never surer than not of an expert; train it on more rows like these")
    if "new_tokens" in metrics:
        each = metrics["ms_per_token"] or {"p50": 0.0}
        say(
            f"written: {metrics['new_tokens']} tokens, {metrics['new_tokens_per_second']:.1f}/s; first after "
            f"{metrics['ms_to_first_token']['p50']:.1f} ms, then one every {each['p50']:.1f} ms (medians)"
        )
    if len(executors) > 1:
        each = ", ".join(f"{e['batches']} batches with {e['hit_rate'] or 0:.1%} found" for e in executors)
        say(f"Executors: {each}")
    gone = ", ".join(f"{metrics['lost'][kind + 's']} {kind}" for kind in KINDS if metrics["lost"][kind + "s"])
    if gone:
        say(f"lost on the way: {gone}; {metrics['lost']['batches_redone']} batches were sent again, no row is lost")
    if metrics["prediction"]["top1"] is not None:
        top1, top3 = metrics["prediction"]["top1"], metrics["prediction"]["top3"]
        say(f"prediction ({metrics['prediction']['kind']}): top-1 {top1:.1%}, top-3 {top3:.1%}")
    if "fidelity" in metrics:
        shares = [f"same label {metrics['fidelity']['same_label']:.1%}"] if "same_label" in metrics["fidelity"] else []
        shares += [f"{name} {value:.1%} of exact" for name, value in metrics["fidelity"]["ratio"].items()]
        say("fidelity of hash routing: " + ", ".join(shares))
    say(f"look at {path}:")
    say(f"  {PREDICTIONS:<18} one answer per row, in order")
    say(f"  {METRICS:<18} every figure of this run")
    say("  timeline.json      predict, copy and compute lanes: open it at https://ui.perfetto.dev")
    say("  report.html        the pictures: open it in a browser")


def say(text: str) -> None:
    print(text, flush=True)


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
