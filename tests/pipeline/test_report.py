"""report.html says what the batches did, in well-formed pictures, whatever they did, and never runs what it is to print."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from pipeline.batch_result import BatchStats
from pipeline.config import Config, DataConfig, ModelConfig
from pipeline.reports.metrics import batch_metrics
from pipeline.reports.page import Clock, report
from pipeline.reports.svg import NARROW, PANEL, WIDE, Bar, Plot, Span, bars, lanes, sample, scatter, ticks
from predictor.accuracy import Accuracy
from predictor.tokens import RoutingShape

MS, HOUR = 10**6, 3600 * 10**9
BLOCK = 250_000
TITLES = (
    "The budget was kept",
    "of expert uses found their expert in a slot",
    "Did the hit rate hold over time?",
    "The predictor named the router",
    "Batches were computed",
    "How the lanes overlap",
    "of the bytes that moved came ahead of time",
    "Versions:",
)


def shape(layers: int = 3, experts: int = 8) -> RoutingShape:
    """The last of several MoE layers is the decoder's."""
    return RoutingShape((experts,) * layers, (0,) * (layers - 1) + (int(layers > 1),), 1, 100)


def batches(count: int = 30, layers: int = 3, experts: int = 8, pause_ns: int = 0) -> list[BatchStats]:
    """Batches of 40 ms with 2 ms between them, and a pause in another process after the first third."""
    stats, start = [], 1_760_000_000 * 10**9
    for number in range(count):
        if pause_ns and number == count // 3:
            start += pause_ns
        load = [[(number + expert) % 5 for expert in range(experts)] for _ in range(layers)]
        stats.append(
            BatchStats(
                start=start,
                end=start + 40 * MS,
                pid=1 if number < count // 3 else 2,
                tokens=100,
                predict_span=[start - 50 * MS, start - 45 * MS],
                copy_spans=[[start + 5 * MS, start + 9 * MS, 3], [start + 20 * MS, start + 30 * MS, 7]],
                hits=[3] * layers,
                misses=[1] * layers,
                prefetch_bytes=3 * layers * BLOCK,
                demand_bytes=0,
                read_in_place_bytes=layers * BLOCK,
                stall_ms=2.0,
                resident=[2 + layer for layer in range(layers)],
                resident_peak_bytes=sum(2 + layer for layer in range(layers)) * BLOCK,
                predicted_uses=4 * layers,
                accuracy=Accuracy([40] * layers, [60] * layers, [100] * layers),
                load=load,
                predicted_load=[list(reversed(row)) for row in load],
            )
        )
        start += 42 * MS
    return stats


def metrics_of(stats: list[BatchStats], slots: int, model: str = "assets/switch-mini-64") -> dict:
    held = {"total": 400 * BLOCK, "budget": slots * BLOCK, "resident_peak": max(s.resident_peak_bytes for s in stats)}
    metrics = batch_metrics(stats, 4 * len(stats), 0.042 * len(stats))
    metrics["prediction"]["kind"] = "lstm"
    return metrics | {
        "quality": {"accuracy": 0.8312, "f1": 0.8244},
        "routing": "exact",
        "device": "cpu",
        "expert_bytes": held,
        "arena": {"name": "sida-0-abc", "bytes": 400 * BLOCK, "warm_start": True, "seconds": 0.1},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "config": Config(ModelConfig(model), DataConfig("dev.tsv"), seed=1234).to_dict(),
    }


def page_of(stats: list[BatchStats], slots: int = 12, routed: list[BatchStats] | None = None) -> str:
    return report(metrics_of(stats, slots), stats, stats if routed is None else routed, shape(len(stats[0].hits)), slots)


def parse(page: str) -> ET.Element:
    """Stricter than a browser: the page is well-formed XML too."""
    return ET.fromstring(page.removeprefix("<!doctype html>\n"))


def svgs(page: str) -> list[ET.Element]:
    found = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(found) == page.count("<svg")
    return found


def picture(page: str, label: str) -> ET.Element:
    """The wide version of the picture that a screen reader calls so."""
    wide = (svg for svg in svgs(page) if svg.attrib["viewBox"].startswith(f"0 0 {WIDE} "))
    return next(svg for svg in wide if label in svg.attrib["aria-label"])


def texts(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter("text")]


def path_ys(path: ET.Element) -> list[float]:
    return [float(y) for y in re.findall(r"V([-\d.]+)", path.attrib["d"])]


def test_every_section_is_there_in_order():
    page = page_of(batches()).replace("&#x27;", "'")
    places = [page.find(title) for title in TITLES]
    assert -1 not in places and places == sorted(places)


def test_headline_figures_are_those_of_metrics_json():
    tiles = [" ".join(tile.itertext()) for tile in parse(page_of(batches())).iter("div") if tile.get("class") == "tile"]
    for expected in (
        "rows answered 120 3,000 tokens",
        "rows per second 95.2",
        "accuracy 0.8312",
        "f1 0.8244",
        "resident at peak 2.2 % 2.2 MB of 100.0 MB",
        "budget 20% 12 slots, 3.0 MB",
        "hit rate 75.0 %",
        "prediction 40.0 / 60.0",
        "latency 40.0 / 40.0",
    ):
        assert sum(tile.startswith(expected) for tile in tiles) == 1, (expected, tiles)


def test_a_budget_that_each_of_several_has_is_told_as_such():
    page = page_of([replace(s, executor=number % 2) for number, s in enumerate(batches())])
    tiles = [" ".join(tile.itertext()) for tile in parse(page).iter("div") if tile.get("class") == "tile"]
    assert "budget 20% for each of 2 Executors; in all 12 slots, 3.0 MB" in tiles


def test_page_needs_nothing_from_elsewhere():
    page = page_of(batches())
    assert not re.search(r"https?:|<script|<link|<img|src=|url\(|@import", page)


def test_page_and_each_picture_are_well_formed():
    page = page_of(batches())
    assert parse(page).findtext("body/main/h1") == "Run of assets/switch-mini-64"
    pictures = svgs(page)
    assert len(pictures) == 6 * 2 + 3 * 2  # six across the page, in two widths; two for each MoE layer
    for svg in pictures:
        assert float(svg.attrib["viewBox"].split()[2]) in (WIDE, NARROW, PANEL) and len(svg) > 1 and svg.attrib["aria-label"]


def test_hostile_text_is_shown_not_run():
    hostile = "models/<script>alert('1')</script>&\"\x07\ud800"
    stats = batches()
    metrics = metrics_of(stats, 12, hostile)
    metrics["arena"]["name"] = metrics["versions"]["torch"] = metrics["prediction"]["kind"] = "<img src=x onerror=alert(1)>"
    metrics["config"]["data"]["path"] = metrics["config"]["store"]["budget"] = "</style><script>"
    metrics["quality"] = {"<b>": 1.0}
    page = report(metrics, stats, stats, shape(), 12)
    harmless = "html head meta title style body main h1 h2 h3 p b i div span section footer svg g text line path rect circle"
    assert {element.tag for element in parse(page).iter()} <= set(harmless.split())
    assert parse(page).findtext("head/title") == "Run of models/<script>alert('1')</script>&\"\ufffd\ufffd"
    assert page.encode()


def test_areas_stack_up_to_the_residents_under_the_budget_line():
    stats = batches()
    plot = picture(page_of(stats, slots=12), "experts resident")
    line = float(next(rule for rule in plot.iter("line") if rule.get("class") == "rule").attrib["y1"])
    tops = [min(path_ys(path)) for path in plot.iter("path")]  # of all layers, of all but the last, of the first
    floor = max(path_ys(next(plot.iter("path"))))
    assert "budget: 12 slots" in texts(plot)
    assert [(floor - top) / (floor - line) * 12 for top in tops] == pytest.approx([9, 5, 2], abs=0.05)


@pytest.mark.parametrize("change", [{"resident": [9, 9, 9]}, {"resident_peak_bytes": 13 * BLOCK}])
def test_a_broken_budget_is_called_broken(change: dict):
    stats = batches()
    stats[7] = replace(stats[7], **change)
    page = page_of(stats, slots=12)
    assert "The budget was exceeded" in page and "The budget was kept" not in page


def test_sampling_keeps_the_batch_with_most_residents():
    stats = batches(3000)
    stats[1234] = replace(stats[1234], resident=[9, 9, 9])
    plot = picture(page_of(stats, slots=27), "experts resident")
    line = next(rule for rule in plot.iter("line") if rule.get("class") == "rule")
    assert min(path_ys(next(plot.iter("path")))) == float(line.attrib["y1"])


def test_hit_rates_are_given_per_layer_and_over_time():
    stats = [replace(s, hits=[4, 1, 0], misses=[0, 3, 0]) for s in batches()]
    page = page_of(stats)
    layers = texts(picture(page, "hit rate per MoE layer"))
    assert [text for text in layers if text.endswith("%") or "used" in text] == ["100.0 %", "25.0 %", "not used"]
    assert "4.0 of 8 experts per batch" in layers and "MoE layer 2, decoder" in layers
    assert "62.5 % of expert uses found" in page
    curve = next(picture(page, "hit rate over time").iter("path")).attrib["d"]
    assert len({y for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", curve)}) == 1 and curve.count("L") == 29


def test_each_expert_is_a_dot_with_its_sums_over_all_batches():
    told: dict[str, Any] = {"load": [[0, 34, 0]], "predicted_load": [[0, 31, 3]], "hits": [1], "misses": [0], "resident": [1]}
    stats = [replace(s, **told) for s in batches(10, 1, 3)]
    page = page_of(stats)
    assert "expert 1: true 340, predicted 310" in page and "expert 2: true 0, predicted 30" in page
    assert "expert 0:" not in page  # neither wanted nor predicted
    dots = next(svg for svg in svgs(page) if "predicted against true" in svg.attrib["aria-label"])
    assert len(list(dots.iter("circle"))) == 2


def test_hash_routing_is_judged_by_its_second_pass():
    second = batches()
    stats = [replace(s, accuracy=Accuracy(), load=[], predicted_load=[]) for s in second]
    metrics = metrics_of(stats, 12) | {
        "routing": "hash",
        "fidelity": {"same_label": 0.953, "ratio": {"accuracy": 0.981}, "mean_logprob_difference_per_token": 0.0123},
    }
    metrics["prediction"] = metrics_of(second, 12)["prediction"]
    page = report(metrics, stats, second, shape(), 12)
    assert "hash routing" in page and "expert 3: true" in page
    for figure in ("95.3 %", "98.1 %", "0.0123"):
        assert f"<b>{figure}</b>" in page
    assert "fidelity" not in page_of(second)


def test_lanes_show_forty_batches_from_the_middle():
    plot = picture(page_of(batches(200)), "what predicted, copied and computed when")
    titles = [title.text or "" for title in plot.iter("title")]
    drawn = [number for number in range(200) if sum(t.startswith(f"batch {number}, ") for t in titles) == 2]
    assert drawn == list(range(82, 120))  # with both, of 80 to 119: the first two had been predicted before
    assert sum(t.startswith("experts copied: ") for t in titles) == 80


def test_lanes_are_busy_for_a_share_of_the_time():
    page = page_of(batches(10))  # 418 ms
    shown = texts(picture(page, "busy time per lane"))
    assert [text for text in shown if text.endswith("%")] == ["12.0 %", "33.5 %", "95.7 %", "4.8 %"]
    assert [text for text in shown if text.endswith(" s")] == ["0.05 s", "0.14 s", "0.40 s", "0.02 s"]
    bars = [float(rect.attrib["width"]) for rect in picture(page, "busy time per lane").iter("rect")]
    assert [bar / track for track, bar in zip(bars[::2], bars[1::2], strict=True)] == pytest.approx(
        [0.12, 0.335, 0.957, 0.048], 0.01
    )


def test_bytes_are_told_apart_by_the_way_they_came():
    page = page_of(batches(10))
    assert "75.0 % of the bytes that moved came ahead of time" in page
    assert [t for t in texts(picture(page, "bytes by way")) if t.endswith("MB")] == ["22.5 MB", "0.0 MB", "7.5 MB"]
    assert "No expert moved" in page_of(DEGENERATE["nothing moved"])


def test_breaks_of_a_resumed_run_are_cut_out():
    resumed, straight = batches(30, pause_ns=3 * HOUR), batches(30)
    clock = Clock(resumed)
    assert clock.seconds == pytest.approx(Clock(straight).seconds, abs=0.01) and len(clock.sittings) == 2
    assert clock.breaks == [clock(resumed[9].end)] and clock(resumed[9].end + HOUR) == clock(resumed[10].start)
    page = page_of(resumed)
    assert "the run was resumed" in page and "the run was resumed" not in page_of(straight)
    ends = [float(text) for text in texts(picture(page, "hit rate over time")) if re.fullmatch(r"[\d.,]+", text)]
    assert max(ends) < 1.3
    for name in ("experts resident", "hit rate over time"):
        marks = [line for line in picture(page, name).iter("line") if line.get("class") == "hint"]
        assert len(marks) == 1 and marks[0].attrib["x1"] == marks[0].attrib["x2"]
    lane = picture(page, "what predicted, copied and computed when")
    titles = [title.text or "" for title in lane.iter("title")]
    assert not any(t.startswith("batch 9, ") for t in titles) and any(t.startswith("batch 20, ") for t in titles)


def test_a_slow_batch_is_not_a_break():
    stats = batches(30, pause_ns=300 * MS)
    assert Clock(stats).breaks == [] and Clock(stats).seconds == pytest.approx((30 * 42 - 2 + 300) / 1e3)


DEGENERATE = {
    "one batch": batches(1),
    "one layer": batches(5, layers=1),
    "one expert": batches(5, layers=1, experts=1),
    "no copies": [replace(s, copy_spans=[], prefetch_bytes=0) for s in batches()],
    "nothing moved": [replace(s, copy_spans=[], prefetch_bytes=0, read_in_place_bytes=0) for s in batches()],
    "no use": [replace(s, hits=[0] * 3, misses=[0] * 3) for s in batches()],
    "no use in a layer": [replace(s, hits=[0, 1, 2], misses=[0, 2, 1]) for s in batches()],
    "no prediction": [
        replace(s, predict_span=None, accuracy=Accuracy(), load=[], predicted_load=[], predicted_uses=0) for s in batches()
    ],
    "no time": [replace(s, end=s.start, predict_span=[s.start, s.start], copy_spans=[]) for s in batches(1)],
    "no tokens": [replace(s, load=[[0] * 8] * 3, predicted_load=[[0] * 8] * 3) for s in batches()],
    "nothing resident": [replace(s, resident=[0] * 3, resident_peak_bytes=0) for s in batches()],
}


@pytest.mark.parametrize("stats", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("slots", [0, 12])
def test_a_strange_run_still_has_a_page(stats: list[BatchStats], slots: int):
    page = page_of(stats, slots)
    assert parse(page) and not re.search(r"\b(nan|inf|None)\b", page)
    assert page.count("<section>") == 7
    assert (f"budget: {slots} slots") in texts(picture(page, "experts resident"))


def test_a_run_without_uses_says_so():
    assert "No expert was used" in page_of(DEGENERATE["no use"])


def test_a_run_without_predictions_says_so():
    page = page_of(DEGENERATE["no prediction"])
    assert "No prediction was judged" in page and "predicted against true" not in page and "none / none" in page


def test_batches_without_a_prediction_are_left_out_of_the_comparison():
    stats = batches(6)
    some = [replace(s, load=[], predicted_load=[], accuracy=Accuracy()) for s in stats[:3]] + stats[3:]
    expected = sum(s.load[0][1] for s in stats[3:]), sum(s.predicted_load[0][1] for s in stats[3:])
    assert "expert 1: true {}, predicted {}".format(*expected) in page_of(some)


def test_a_long_run_of_a_large_model_stays_small():
    stats = batches(4000, layers=48, experts=128)
    page = report(metrics_of(stats, 2000), stats, stats, shape(48, 128), 2000)
    assert len(page.encode()) < 1_500_000
    assert "12 of the 48 MoE layers are shown" in page and page.count("predicted against true") == 12
    assert "MoE layer 47, decoder: predicted" in page and "MoE layer 0, encoder: predicted" in page


def test_ticks_are_round_and_within_the_axis():
    assert ticks(57, 5) == [0, 20, 40]
    assert ticks(0.05, 5) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert ticks(1.1, 4, 1) == [0, 1]  # no half experts
    for high in (1e-6, 0.3, 1, 7, 99, 100, 12345.6, 3e9):
        values = ticks(high, 5)
        assert 2 <= len(values) <= 6 and values[-1] <= high * 1.001


def test_samples_are_even_and_hold_both_ends():
    assert sample(5, 10) == [0, 1, 2, 3, 4]
    assert sample(10, 5) == [0, 3, 5, 7, 9]
    assert sample(10, 4) == [0, 5, 8, 9]
    assert sample(10, 2, lambda i: -abs(i - 3)) == [3, 5]
    assert len(sample(100_000, 400)) <= 400


def test_a_curve_breaks_where_there_is_no_value_and_shows_lone_points():
    plot = Plot((WIDE, 200), (5, 100), ("x", "y"), "curve")
    plot.curve([(0, 1), (1, 2), (2, None), (3, 5), (4, None)], "red")
    svg = ET.fromstring(plot.svg())
    assert len(list(svg.iter("path"))) == 1 and len(list(svg.iter("circle"))) == 1


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_bars_are_as_long_as_their_share_and_absent_without_one(width: int):
    rows = [
        Bar("a", 0.5, "50 %", "red"),
        Bar("b", None, "not used", "red"),
        Bar("c", 0, "0 %", "red"),
        Bar("d", 1.2, "120 %", "red"),
    ]
    svg = ET.fromstring(bars(width, rows, "shares"))
    tracks = [float(r.attrib["width"]) for r in svg.iter("rect") if r.attrib["fill"] == "var(--track)"]
    lengths = [float(r.attrib["width"]) for r in svg.iter("rect") if r.attrib["fill"] == "red"]
    assert len(tracks) == 4 and lengths == pytest.approx([tracks[0] / 2, tracks[0]], abs=0.1)


def test_lanes_leave_out_what_is_outside_or_would_not_show():
    spans = [Span(-5, -1, "before"), Span(-1, 2, "cut"), Span(4, 6, "in"), Span(6, 6.0001, "tiny"), Span(10, 12, "after")]
    svg = ET.fromstring(lanes(WIDE, [("lane", "red", spans)], 10, "ms", "lanes"))
    assert [title.text for title in svg.iter("title")] == ["cut", "in"]
    grid = [float(line.attrib["x1"]) for line in svg.iter("line")]  # from 0 to 10
    for rect in svg.iter("rect"):
        x, width = float(rect.attrib["x"]), float(rect.attrib["width"])
        assert grid[0] <= x and x + width <= grid[-1]


def test_scatter_puts_equal_values_on_the_diagonal():
    svg = ET.fromstring(scatter([(3, 3, "even"), (9, 1, "off")], ("x", "y"), "red", "dots"))
    diagonal = next(line for line in svg.iter("line") if line.get("class") == "hint")
    x1, y1, x2, y2 = (float(diagonal.attrib[key]) for key in ("x1", "y1", "x2", "y2"))
    off = [(float(c.attrib["cy"]) - y1) * (x2 - x1) / (y2 - y1) - (float(c.attrib["cx"]) - x1) for c in svg.iter("circle")]
    assert off[0] == pytest.approx(0, abs=0.3) and abs(off[1]) > 20
