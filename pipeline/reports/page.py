"""report.html: the pictures of a run on one page that needs nothing else: no network, no script; light or dark, wide or narrow.

Figures are those of metrics.json, so that page and file agree; what changes over time comes from the batches; svg.py draws.
The page stays small however long the run: time is sampled, and only some of very many MoE layers get a scatter plot.
"""

from __future__ import annotations

from itertools import accumulate

from pipeline.batch_result import BatchStats
from pipeline.reports.clock import Clock, together
from pipeline.reports.svg import PANEL, STYLE, WIDE, Bar, Plot, Span, bars, escape, lanes, responsive, sample, scatter
from predictor.tokens import DECODER, RoutingShape

MAX_POINTS, MAX_LAYERS = 400, 12  # along a time axis; with a scatter plot and a place in the legend
QUALITY = {"accuracy": "of the labels are right", "f1": "of the second label", "perplexity": "per token; less is better"}

Layers = list[tuple[str, str]]  # name and colour of each MoE layer


def report(metrics: dict, stats: list[BatchStats], routed: list[BatchStats], shape: RoutingShape, slots: int) -> str:
    """The page, of what metrics.json holds, the run's batches (at least one) and a budget of `slots`, of all Executors together.

    Args:
        routed: those in which the model's own routers were asked: the same, or the second pass of a run by hash routing.
    """
    stats = together(stats)
    clock, layers = Clock(stats), _layers(shape)
    body = _header(metrics, slots) + _residency(metrics, stats, clock, layers, slots)
    body += _hits(metrics, stats, clock, layers, shape) + _predictions(metrics, routed, layers)
    body += _busy(metrics, stats, clock) + _overlap(stats, clock) + _bytes(metrics) + _losses(metrics) + _footer(metrics)
    title = escape(f"Run of {metrics['config']['model']['path']}")
    head = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main><h1>{title}</h1>{body}</main></body></html>\n'


def _header(metrics: dict, slots: int) -> str:
    config, held, prediction, latency = (metrics[key] for key in ("config", "expert_bytes", "prediction", "latency_ms"))
    guesses = " / ".join("none" if rate is None else f"{100 * rate:.1f}" for rate in (prediction["top1"], prediction["top3"]))
    peak, total, executors = held["resident_peak"], held["total"], max(config["executors"], len(metrics["executors"]))
    each = f"for each of {executors} Executors; in all " if executors > 1 else ""
    tiles = [
        ("rows answered", f"{metrics['samples']:,}", f"{metrics['tokens']:,} tokens"),
        ("rows per second", f"{metrics['samples_per_second']:,.1f}", f"{metrics['seconds']:,.1f} s in all"),
        *((name, f"{value:,.4g}", QUALITY.get(name, "")) for name, value in metrics["quality"].items()),
        ("resident at peak", _percent(peak, total), f"{_mb(peak)} of {_mb(total)}"),
        ("budget", config["store"]["budget"], f"{each}{slots:,} slots, {_mb(held['budget'])}"),
        ("hit rate", _percent(metrics["hit_rate"]), "of expert uses found a slot"),
        ("prediction", guesses, "% right, top-1 / top-3"),
        ("latency", f"{latency['p50']:,.1f} / {latency['p95']:,.1f}", "ms per batch, p50 / p95"),
    ]
    fidelity = metrics.get("fidelity", {"ratio": {}})
    if "same_label" in fidelity:
        tiles.append(("fidelity", _percent(fidelity["same_label"]), "same label as exact routing"))
    if "mean_logprob_difference_per_token" in fidelity:
        tiles.append(("fidelity", f"{fidelity['mean_logprob_difference_per_token']:.3g}", "nats per token from exact routing"))
    tiles += [("fidelity", _percent(ratio), f"of exact routing's {name}") for name, ratio in fidelity["ratio"].items()]
    about = f"{metrics['routing']} routing, {prediction['kind']} predictor, {metrics['device']}, {config['data']['path']}"
    shown = "".join(f'<div class="tile">{escape(a)}<b>{escape(b)}</b>{escape(c)}</div>' for a, b, c in tiles)
    return f'<p>{escape(about)}</p><div class="tiles">{shown}</div>'


def _residency(metrics: dict, stats: list[BatchStats], clock: Clock, layers: Layers, slots: int) -> str:
    held, most = metrics["expert_bytes"], max(sum(s.resident) for s in stats)
    samples = [stats[i] for i in sample(len(stats), MAX_POINTS, lambda i: sum(stats[i].resident))]
    sums = [list(accumulate(s.resident)) for s in samples]

    def draw(width: int) -> str:
        highs, titles = (clock.seconds, 1.12 * max(most, slots, 1)), ("seconds", "experts in slots, after each batch")
        plot = Plot((width, 330 if width == WIDE else 250), highs, titles, "experts resident over time")
        for layer, (_, colour) in reversed(list(enumerate(layers))):  # each covers the lower part of the one behind it
            plot.steps([clock(s.end) for s in samples], [up_to[layer] for up_to in sums], colour)
        plot.cuts(clock.breaks)
        plot.rule(slots, f"budget: {slots:,} slots")
        return plot.svg()

    kept = "kept" if most <= slots and held["resident_peak"] <= held["budget"] else "exceeded"
    title = f"The budget was {kept}: experts took at most {_mb(held['resident_peak'])} of {_mb(held['budget'])}"
    how = "Each band is a MoE layer's share of the slots when a batch had ended; together they must stay below the dashed line."
    how += " Dotted lines: the run was resumed, and the break is cut out." if clock.breaks else ""
    named = [layers[i] for i in sample(len(layers), MAX_LAYERS)]
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in named)
    return _section(title, how, f'<div class="legend">{legend}</div>{responsive(draw)}')


def _hits(metrics: dict, stats: list[BatchStats], clock: Clock, layers: Layers, shape: RoutingShape) -> str:
    rates, used = metrics["hit_rate_per_layer"], metrics["experts_used_per_layer"]
    rows = [
        Bar(name, rate, "not used" if rate is None else _percent(rate), colour, f"{uses:.1f} of {experts} experts per batch")
        for (name, colour), rate, uses, experts in zip(layers, rates, used, shape.experts, strict=True)
    ]
    window = max(1, min(50, len(stats) // 20))
    hits = [0, *accumulate(sum(s.hits) for s in stats)]
    uses = [0, *accumulate(sum(s.hits + s.misses) for s in stats)]
    points: list[tuple[float, float | None]] = []
    for last in sample(len(stats), MAX_POINTS):
        first = max(0, last + 1 - window)
        whole = uses[last + 1] - uses[first]
        points.append((clock(stats[last].end), 100 * (hits[last + 1] - hits[first]) / whole if whole else None))

    def draw(width: int) -> str:
        titles = ("seconds", f"hit rate over the last {window} batches" if window > 1 else "hit rate of each batch")
        plot = Plot((width, 200), (clock.seconds, 100), titles, "hit rate over time", " %")
        plot.cuts(clock.breaks)
        plot.curve(points, "var(--compute)")
        return plot.svg()

    title = f"{_percent(metrics['hit_rate'])} of expert uses found their expert in a slot" if uses[-1] else "No expert was used"
    how = "The longer a layer's bar, the more of its experts were in a slot when needed; the others were read where they lie."
    over = "Slots are empty at first; a line that then stays high says that copies kept up with the run."
    layered = _section(title, how, responsive(lambda width: bars(width, rows, "hit rate per MoE layer")))
    return layered + _section("Did the hit rate hold over time?", over, responsive(draw))


def _predictions(metrics: dict, routed: list[BatchStats], layers: Layers) -> str:
    prediction, judged = metrics["prediction"], [s for s in routed if s.load]
    if prediction["top1"] is None or not judged:
        return _section("No prediction was judged in this run", "There is nothing to hold against what the routers chose.")
    panels, shown = "", sample(len(layers), MAX_LAYERS)
    for layer in shown:
        name, colour = layers[layer]
        true = map(sum, zip(*(s.load[layer] for s in judged), strict=True))
        told = map(sum, zip(*(s.predicted_load[layer] for s in judged), strict=True))
        loads = enumerate(zip(true, told, strict=True))
        dots = [(x, y, f"expert {expert}: true {x}, predicted {y}") for expert, (x, y) in loads if x or y]
        panels += f"<div><h3>{escape(name)}</h3>"
        panels += scatter(dots, ("tokens, true", "tokens, predicted"), colour, f"{name}: predicted against true")
        right = [Bar(f"top-{n}", rate := prediction["per_layer"][f"top{n}"][layer], _percent(rate), colour) for n in (1, 3)]
        panels += bars(PANEL, right, f"{name}: top-1 and top-3") + "</div>"
    how = "Each dot is an expert: to the right, the tokens its router gave it; upwards, those of the predictor's first choice; "
    how += "dotted, where both agree. Below: how often the router's expert was the first, or one of the first three, predicted."
    how += f" {len(shown)} of the {len(layers)} MoE layers are shown." if len(shown) < len(layers) else ""
    title = f"The predictor named the router's expert for {_percent(prediction['top1'])} of tokens"
    return _section(title, how, f'<div class="panels">{panels}</div>')


def _busy(metrics: dict, stats: list[BatchStats], clock: Clock) -> str:
    busy = [("predict", "", sum(s.predict_span[1] - s.predict_span[0] for s in stats if s.predict_span) / 1e9)]
    for number, own in _executors(stats):
        busy += [
            ("copy", number, sum(end - start for s in own for start, end, _ in s.copy_spans) / 1e9),
            ("compute", number, sum(s.end - s.start for s in own) / 1e9),
            ("stall", number, sum(s.stall_ms for s in own) / 1e3),
        ]
    wall, computed = clock.seconds, [seconds for name, _, seconds in busy if name == "compute"]
    rows = [Bar(name + of, s / wall, _percent(s, wall), f"var(--{name})", f"{s:,.2f} s") for name, of, s in busy]
    how = f"Busy time as a share of the {wall:,.2f} s from first start to last end; stall is compute that waited for copies."
    title = f"Batches were computed {_percent(sum(computed) / len(computed), wall)} of the time"
    title += f" by each of {len(computed)} Executors" if len(computed) > 1 else ""
    return _section(title, how, responsive(lambda width: bars(width, rows, "busy time per lane")))


def _overlap(stats: list[BatchStats], clock: Clock) -> str:
    sitting = max(clock.sittings, key=len)

    def draw(width: int) -> str:
        count = 40 if width == WIDE else 12
        first = max(0, (len(sitting) - count) // 2)
        start = stats[sitting[first]].start
        end = max(stats[i].end for i in sitting[first : first + count])

        def span(since: int, until: int, what: str, text: str = "") -> Span:
            return Span((since - start) / 1e6, (until - start) / 1e6, f"{what}, {(until - since) / 1e6:.1f} ms", text)

        spans: dict[tuple[str, str], list[Span]] = {("predict", ""): []}
        lane_of = {}
        for number, own in _executors(stats):
            spans |= {("copy", number): [], ("compute", number): []}
            lane_of[own[0].executor] = number
        for i in sitting:
            s, what, text = stats[i], f"batch {i}, {stats[i].tokens} tokens", "" if i % 5 else str(i)
            number = lane_of[s.executor]
            spans["predict", ""] += [span(s.predict_span[0], s.predict_span[1], what)] if s.predict_span else []
            spans["copy", number] += [span(since, until, f"experts copied: {experts}") for since, until, experts in s.copy_spans]
            spans["compute", number].append(span(s.start, s.end, what, text))
        rows = [(name + of, f"var(--{name})", drawn) for (name, of), drawn in spans.items()]
        return lanes(width, rows, max(end - start, 1) / 1e6, "milliseconds", "what predicted, copied and computed when")

    how = "From the middle of the run: what stands above a blue block happened while that batch (every fifth has a number) ran."
    return _section("How the lanes overlap", how, responsive(draw))


def _bytes(metrics: dict) -> str:
    moved = metrics["copied_bytes"]
    whole, most = sum(moved.values()), max(*moved.values(), 1)
    colours = {"prefetch": "var(--copy)", "demand": "var(--demand)", "read_in_place": "var(--stall)"}
    rows = [
        Bar(way.replace("_", " "), nbytes / most, _mb(nbytes), colours[way], f"{_percent(nbytes, whole)} of all")
        for way, nbytes in moved.items()
    ]
    title = f"{_percent(moved['prefetch'], whole)} of the bytes that moved came ahead of time" if whole else "No expert moved"
    how = "Prefetch was copied because a table asked for it, demand because a forward did; the rest was read where it lies."
    return _section(title, how, responsive(lambda width: bars(width, rows, "bytes by way")))


def _losses(metrics: dict) -> str:
    lost = metrics.get("lost", {}).get("each", [])
    if not lost:
        return ""
    lines = [f"{one['name']}: {one['redone']} batches were sent again" if one["redone"] else one["name"] for one in lost]
    title = f"{len(lost)} times something was lost on the way, and no row with it"
    return _section(
        title, f"{metrics['lost']['batches_redone']} batches in all were sent again. In order: " + "; ".join(lines) + "."
    )


def _footer(metrics: dict) -> str:
    arena, config = metrics["arena"], metrics["config"]
    lines = (
        "Versions: " + ", ".join(f"{name} {number}" for name, number in metrics["versions"].items()),
        f"Arena {arena['name']}, {_mb(arena['bytes'])}, {'warm' if arena['warm_start'] else 'new'}; seed {config['seed']}",
        "To repeat the run: its whole config is the key config of metrics.json, beside this page.",
    )
    return f"<footer>{''.join(f'<p>{escape(line)}</p>' for line in lines)}</footer>"


def _section(title: str, how: str, pictures: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(how)}</p>{pictures}</section>"


def _executors(stats: list[BatchStats]) -> list[tuple[str, list[BatchStats]]]:
    """Those of each Executor, and what to add to a lane's name: nothing, if there is but one."""
    numbers = sorted({s.executor for s in stats})
    return [(f" {n}" if len(numbers) > 1 else "", [s for s in stats if s.executor == n]) for n in numbers]


def _layers(shape: RoutingShape) -> Layers:
    """An encoder-decoder's layers are named after their half as well."""
    halves = ("encoder", "decoder") if DECODER in shape.streams else ()
    names = [f"MoE layer {i}" + (f", {halves[stream]}" if halves else "") for i, stream in enumerate(shape.streams)]
    mix = "color-mix(in oklab,var(--late) {}%,var(--early))"
    return [(name, mix.format(round(100 * i / max(shape.layers - 1, 1)))) for i, name in enumerate(names)]


def _percent(part: float | None, whole: float = 1) -> str:
    return "none" if part is None or not whole else f"{100 * part / whole:.1f} %"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
