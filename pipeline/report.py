"""report.html: the pictures of a run on one page that needs nothing else: no network, no script, light or dark, wide or narrow.

Figures come from metrics.json's content, so that page and file agree; what changes over time comes from the batches. pipeline.svg
draws. Everything stays small however long the run: time is sampled, and of many MoE layers some get a scatter plot.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from pipeline.executor import BatchStats
from pipeline.svg import PANEL, STYLE, WIDE, Bar, Plot, Span, bars, escape, lanes, responsive, scatter
from predictor.tokens import DECODER, RoutingShape

MAX_SAMPLES = 400
"""Points along a time axis."""
MAX_PANELS = 12
"""Scatter plots."""
MAX_LEGEND = 12

PAGE_STYLE = """
:root{color-scheme:light dark;--page:#f4f5f8;--card:#fff;--ink:#18202c;--muted:#5f6b7c;--line:#e3e7ed;--track:#edf0f4;--early:#35a892;
--late:#41399c;--predict:#b07a10;--copy:#d1583a;--compute:#3573cf;--stall:#8a94a3;--demand:#9c4fa8;--in-place:#7a8699}
@media (prefers-color-scheme:dark){:root{--page:#0f1319;--card:#181e27;--ink:#e8ecf2;--muted:#98a4b5;--line:#2b333f;--track:#232b36;
--early:#2b8f7d;--late:#a3a0f5;--predict:#c08a20;--copy:#dc6a4c;--compute:#4a86dd;--stall:#7d8797;--demand:#b46bc0;--in-place:#8b97aa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 20px 40px}
h1{font-size:26px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;line-height:1.3;margin:0 0 4px}
h3{font-size:14px;margin:0 0 6px}
p{margin:0 0 14px;color:var(--muted);max-width:75ch}
header p{margin:6px 0 18px;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:16px 0}
section>*+h2{margin-top:28px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:10px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 14px;font-variant-numeric:tabular-nums}
.tile *{display:block}
.tile span,.tile small{font-size:13px;line-height:1.35;color:var(--muted)}
.tile b{font-size:23px;line-height:1.35;font-weight:650;white-space:nowrap}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--muted);margin:0 0 10px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:26px 22px}
.panels .bars{margin-top:10px}
footer{font-size:13px;color:var(--muted);overflow-wrap:anywhere}
footer p{max-width:none;margin:0 0 6px}
summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px}
@media (max-width:700px){main{padding:18px 12px 28px}section{padding:14px}.tiles,.panels{grid-template-columns:repeat(2,minmax(0,1fr))}
.tile b{font-size:20px}h1{font-size:22px}}
"""


class Clock:
    """Seconds since the first batch began, the breaks between the sittings of a resumed run cut out.

    Attributes:
        sittings: batches without a break between them; a break is longer than ten times the median batch.
        breaks: seconds at which something was cut out.
        cut_seconds: how much that was.
        seconds: until the last batch ended.
    """

    def __init__(self, stats: Sequence[BatchStats]):
        ordered = sorted(stats, key=lambda s: s.start)
        limit = 10 * median(s.end - s.start for s in stats)
        self.sittings: list[list[BatchStats]] = []
        end = 0
        for s in ordered:
            if not self.sittings or s.start - end > limit:
                self.sittings.append([])
            self.sittings[-1].append(s)
            end = max(end, s.end)
        self._starts = [sitting[0].start for sitting in self.sittings]
        ends = [max(s.end for s in sitting) for sitting in self.sittings]
        lengths = [end - start for start, end in zip(self._starts, ends, strict=True)]
        self._before = [0, *accumulate(lengths)]
        self.breaks = [before / 1e9 for before in self._before[1:-1]]
        self.seconds = max(self._before[-1], 1) / 1e9
        self.cut_seconds = (ends[-1] - self._starts[0] - self._before[-1]) / 1e9

    def __call__(self, time_ns: int) -> float:
        """A time within a break counts as the break's."""
        sitting = max(bisect_right(self._starts, time_ns) - 1, 0)
        return min(self._before[sitting] + max(time_ns - self._starts[sitting], 0), self._before[sitting + 1]) / 1e9


def report(
    metrics: dict[str, Any], stats: list[BatchStats], routed: list[BatchStats], shape: RoutingShape, slots: int
) -> str:
    """The page.

    Args:
        metrics: what metrics.json holds.
        stats: the run's batches, at least one.
        routed: the batches in which the model's own routers were asked: the same, or the second pass of a run by hash routing.
        slots: the budget.
    """
    clock = Clock(stats)
    names, colours = _names(shape), [_shade(layer, shape.layers) for layer in range(shape.layers)]
    body = (
        _header(metrics, slots)
        + _residency(stats, clock, names, colours, slots)
        + _hits(metrics, stats, clock, shape, names, colours)
        + _predictions(metrics, routed, names, colours)
        + _time(metrics, stats, clock)
        + _bytes(metrics)
        + _footer(metrics)
    )
    head = f'<meta charset="utf-8"/><meta name="viewport" content="width=device-width,initial-scale=1"/><title>{escape(_title(metrics))}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{PAGE_STYLE}{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n'


def _header(metrics: dict[str, Any], slots: int) -> str:
    config, held, prediction = metrics["config"], metrics["expert_bytes"], metrics["prediction"]
    latency = metrics["latency_ms"]
    tiles = [
        ("rows answered", f"{metrics['samples']:,}", f"{metrics['tokens']:,} tokens"),
        ("rows per second", f"{metrics['samples_per_second']:,.1f}", f"{metrics['seconds']:,.1f} s in all"),
        *((name, _quality(name, value), "of the answers") for name, value in metrics["quality"].items()),
        ("resident at peak", _percent(held["resident_peak"], held["total"]), f"{_mb(held['resident_peak'])} of {_mb(held['total'])} of experts"),
        ("budget", config["store"]["budget"], f"{slots:,} slots, {_mb(held['budget'])}"),
        ("hit rate", _percent(metrics["hit_rate"]), "of expert uses found a slot"),
        ("prediction", f"{_percent(prediction['top1'])} / {_percent(prediction['top3'])}", "top-1 / top-3"),
        ("latency", f"{latency['p50']:,.1f} / {latency['p95']:,.1f}", "ms per batch, p50 / p95"),
    ]
    if fidelity := metrics.get("fidelity"):
        if "same_label" in fidelity:
            tiles.append(("fidelity", _percent(fidelity["same_label"]), "same label as exact routing"))
        if "mean_logprob_difference_per_token" in fidelity:
            tiles.append(("fidelity", f"{fidelity['mean_logprob_difference_per_token']:.3f}", "nats per token from exact routing"))
        tiles += [("fidelity", _percent(ratio), f"of exact routing's {name}") for name, ratio in fidelity["ratio"].items()]
    shown = "".join(f'<div class="tile"><span>{escape(a)}</span><b>{escape(b)}</b><small>{escape(c)}</small></div>' for a, b, c in tiles)
    about = f"{metrics['routing']} routing, predictor {prediction['kind']}, on {metrics['device']}; {config['data']['path']}"
    return f'<header><h1>{escape(_title(metrics))}</h1><p>{escape(about)}</p><div class="tiles">{shown}</div></header>'


def _residency(stats: list[BatchStats], clock: Clock, names: list[str], colours: list[str], slots: int) -> str:
    most = max(sum(s.resident) for s in stats)
    kept = "The budget was kept" if most <= slots else "The budget was exceeded"
    samples = _sample(stats, lambda s: sum(s.resident))
    ends = [clock(s.end) for s in samples]

    def draw(width: int) -> str:
        high = 1.15 * max(most, slots, 1)
        label = f"experts resident over time, at most {most}; budget {slots} slots"
        plot = Plot((width, 320 if width == WIDE else 250), (clock.seconds, high), ("seconds", "experts in slots, after each batch"), label)
        for layer in reversed(range(len(names))):  # each covers the lower part of the one above it
            plot.steps(ends, [sum(s.resident[: layer + 1]) for s in samples], colours[layer])
        plot.breaks(clock.breaks)
        plot.rule(slots, f"budget: {slots} slots")
        return plot.svg()

    how = "Each band is a MoE layer's share of the slots; their sum may never cross the dashed line."
    return _section(f"{kept}: at most {most} experts were resident", how + _cut(clock), _legend(names, colours) + responsive(draw))


def _hits(
    metrics: dict[str, Any], stats: list[BatchStats], clock: Clock, shape: RoutingShape, names: list[str], colours: list[str]
) -> str:
    used = metrics["experts_used_per_layer"]
    rows = [
        Bar(names[i], rate, _percent(rate) if rate is not None else "not used", colours[i], f"{used[i]:.1f} of {shape.experts[i]} experts per batch")
        for i, rate in enumerate(metrics["hit_rate_per_layer"])
    ]
    window = max(1, min(50, len(stats) // 20))
    hits = [0, *accumulate(sum(s.hits) for s in stats)]
    uses = [0, *accumulate(sum(s.hits) + sum(s.misses) for s in stats)]
    points: list[tuple[float, float | None]] = []
    for i in _sample(range(len(stats)), lambda i: i):
        first = max(0, i + 1 - window)
        whole = uses[i + 1] - uses[first]
        points.append((clock(stats[i].end), 100 * (hits[i + 1] - hits[first]) / whole if whole else None))

    def draw(width: int) -> str:
        plot = Plot((width, 200), (clock.seconds, 100), ("seconds", f"hit rate, over {_count(window, 'batch', 'batches')}"), "hit rate over time", " %")
        plot.breaks(clock.breaks)
        plot.line(points, "var(--compute)")
        return plot.svg()

    title = f"{_percent(metrics['hit_rate'])} of expert uses found their expert in a slot" if uses[-1] else "No expert was used"
    how = "A longer bar means that more of a layer's experts were in a slot when they were needed; the others were read where they lie."
    over = "The line shows whether that changed during the run: it starts cold, with empty slots."
    return _section(title, how, responsive(lambda width: bars(width, rows, "hit rate per MoE layer"))) + _section(
        "Did the hit rate hold over time?", over, responsive(draw)
    )


def _predictions(metrics: dict[str, Any], routed: list[BatchStats], names: list[str], colours: list[str]) -> str:
    prediction, loaded = metrics["prediction"], [s for s in routed if s.load]
    if prediction["top1"] is None or not loaded:
        return _section("Nothing was predicted in this run", "There is nothing to compare with what the routers chose.", "")
    layers = list(_sample(range(len(names)), lambda i: i, MAX_PANELS))
    panels = ""
    for layer in layers:
        true = [sum(column) for column in zip(*(s.load[layer] for s in loaded), strict=True)]
        told = [sum(column) for column in zip(*(s.predicted_load[layer] for s in loaded), strict=True)]
        dots = [(x, y, f"expert {i}: true {x}, predicted {y}") for i, (x, y) in enumerate(zip(true, told, strict=True)) if x or y]
        rates = [prediction["per_layer"][key][layer] for key in ("top1", "top3")]
        right = [Bar(f"top-{k}", rate, _percent(rate), colours[layer]) for k, rate in zip((1, 3), rates, strict=True)]
        picture = scatter(dots, ("tokens, true", "tokens, predicted"), colours[layer], f"{names[layer]}: predicted against true")
        panels += f'<div><h3>{escape(names[layer])}</h3>{picture}<div class="bars">{bars(PANEL, right, "top-1 and top-3")}</div></div>'
    how = (
        "Each dot is an expert: to the right, the tokens that the router gave it; upwards, those that the predictor's first choice gave it. "
        "On the diagonal both agree. Below: how often the router's expert was the first, or among the first three, predicted."
    )
    some = "" if len(layers) == len(names) else f" {len(layers)} of {len(names)} MoE layers are shown."
    title = f"The predictor named the router's expert for {_percent(prediction['top1'])} of tokens"
    return _section(title, how + some, f'<div class="panels">{panels}</div>')


def _time(metrics: dict[str, Any], stats: list[BatchStats], clock: Clock) -> str:
    busy = {
        "predict": sum(s.predict_span[1] - s.predict_span[0] for s in stats if s.predict_span) / 1e9,
        "copy": sum(end - start for s in stats for start, end, _ in s.copy_spans) / 1e9,
        "compute": sum(s.end - s.start for s in stats) / 1e9,
        "stall": metrics["stall_ms"] / 1e3,
    }
    rows = [Bar(name, s / clock.seconds, _percent(s, clock.seconds), f"var(--{name})", f"{s:,.2f} s") for name, s in busy.items()]
    title = f"Executing batches took {_percent(busy['compute'], clock.seconds)} of the time, waiting for copies {_percent(busy['stall'], clock.seconds)}"
    how = (
        f"How long each lane was busy, as a share of the {clock.seconds:,.1f} s from the first batch's start to the last one's end; stall is "
        "the part of compute that waited for copies under way."
    )
    sitting = max(clock.sittings, key=len)
    numbers = {id(s): number for number, s in enumerate(stats)}

    def draw(width: int) -> str:
        count = 40 if width == WIDE else 12
        first = max(0, (len(sitting) - count) // 2)
        window = sitting[first : first + count]
        start, end = window[0].start, max(s.end for s in window)

        def span(a: int, b: int, title: str, text: str = "") -> list[Span]:
            return [Span((a - start) / 1e6, (b - start) / 1e6, title, text)] if b > start and a < end else []

        def batch(s: BatchStats, a: int, b: int) -> list[Span]:
            return span(a, b, f"batch {numbers[id(s)]}: {(b - a) / 1e6:.1f} ms, {s.tokens} tokens", str(numbers[id(s)]))

        predict = [x for s in sitting if s.predict_span for x in batch(s, *s.predict_span)]
        copy = [x for s in sitting for a, b, n in s.copy_spans for x in span(a, b, f"{_count(n, 'expert')}: {(b - a) / 1e6:.1f} ms")]
        compute = [x for s in window for x in batch(s, s.start, s.end)]
        rows = [(name, f"var(--{name})", spans) for name, spans in (("predict", predict), ("copy", copy), ("compute", compute))]
        return lanes(width, rows, max(end - start, 1) / 1e6, "milliseconds", "what predicted, copied and computed when")

    zoom = "A few dozen batches from the middle of the run: where blocks lie above each other, work was hidden behind other work. Numbers are batches."
    return _section(title, how, responsive(lambda width: bars(width, rows, "busy seconds per lane"))) + _section(
        "Do the lanes overlap?", zoom, responsive(draw)
    )


def _bytes(metrics: dict[str, Any]) -> str:
    moved = metrics["copied_bytes"]
    whole, most = sum(moved.values()), max(*moved.values(), 1)
    rows = [
        Bar(name.replace("_", " "), moved[name] / most, _mb(moved[name]), f"var(--{colour})", f"{_percent(moved[name], whole)} of all that moved")
        for name, colour in (("prefetch", "copy"), ("demand", "demand"), ("read_in_place", "in-place"))
    ]
    title = f"{_percent(moved['prefetch'], whole)} of the bytes that moved came ahead of time" if whole else "No expert crossed the link"
    how = "Prefetch was copied because a table asked for it, demand because a forward did; what nobody brought in time was read in place."
    return _section(title, how, responsive(lambda width: bars(width, rows, "bytes by way")))


def _footer(metrics: dict[str, Any]) -> str:
    arena, config = metrics["arena"], metrics["config"]
    how = "found warm" if arena["warm_start"] else "built"
    versions = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    lines = [
        f"Versions: {versions}",
        f"Arena: {arena['name']}, {_mb(arena['bytes'])}, {how} in {arena['seconds']:.2f} s. Seed: {config['seed']}.",
        "To repeat the run: its whole config is the key config of metrics.json, beside this page.",
    ]
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<footer>{text}<details><summary>config</summary><pre>{escape(json.dumps(config, indent=1))}</pre></details></footer>"


def _section(title: str, how: str, pictures: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(how)}</p>{pictures}</section>"


def _legend(names: list[str], colours: list[str]) -> str:
    shown = _sample(range(len(names)), lambda i: i, MAX_LEGEND)
    return f'<div class="legend">{"".join(f"""<span><i style="background:{colours[i]}"></i>{escape(names[i])}</span>""" for i in shown)}</div>'


def _names(shape: RoutingShape) -> list[str]:
    """The MoE layers' names, by their numbers; of an encoder-decoder also the half that they are in."""
    halves = [", decoder" if stream == DECODER else ", encoder" for stream in shape.streams]
    return [f"MoE layer {i}" + (half if len(set(halves)) > 1 else "") for i, half in enumerate(halves)]


def _shade(layer: int, layers: int) -> str:
    return f"color-mix(in oklab,var(--late) {round(100 * layer / max(layers - 1, 1))}%,var(--early))"


def _sample(items, key, most=MAX_SAMPLES):
    """At most `most` of the items, evenly: of each stretch the one with the highest key."""
    size = -(-len(items) // most)
    return [max(items[i : i + size], key=key) for i in range(0, len(items), size)]


def _title(metrics: dict[str, Any]) -> str:
    return f"Run of {metrics['config']['model']['path']}"


def _cut(clock: Clock) -> str:
    if not clock.breaks:
        return ""
    return f" The run was resumed: {_count(len(clock.breaks), 'break')} ({clock.cut_seconds:,.0f} s in all) cut out at the dotted lines."


def _quality(name: str, value: float) -> str:
    return _percent(value) if name == "accuracy" else f"{value:,.4g}"


def _percent(part: float | None, whole: float = 1) -> str:
    return "–" if part is None or not whole else f"{100 * part / whole:.1f} %"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
