"""Small charts as inline SVG, and the look of the page around them: no script, no font, nothing from elsewhere.

Knows scales, ticks and text; nothing of experts or batches. A colour is any CSS colour, mostly a variable of STYLE, so that a
picture turns dark with its page. A unit is a CSS pixel where a picture is shown at its own width. Letters would shrink with a
wide picture on a phone, so `responsive` draws it twice and STYLE shows the one that fits.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDE, NARROW, PANEL = 960, 360, 220
"""Widths of pictures: across a page, across a phone, one of several side by side."""

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f8;--card:#fff;--ink:#18202c;--muted:#5f6b7c;--line:#e3e7ed;--track:#edf0f4;
--early:#35a892;--late:#41399c;--predict:#b07a10;--copy:#d1583a;--compute:#3573cf;--stall:#8a94a3;--demand:#9c4fa8}
@media (prefers-color-scheme:dark){:root{--page:#0f1319;--card:#181e27;--ink:#e8ecf2;--muted:#98a4b5;--line:#2b333f;
--track:#252d39;--early:#2b8f7d;--late:#a3a0f5;--predict:#c08a20;--copy:#dc6a4c;--compute:#4a86dd;--stall:#7d8797;--demand:#b46bc0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans",sans-serif}
main{max-width:1042px;margin:0 auto;padding:28px 20px 40px}
h1{font-size:26px;line-height:1.2;margin:0;overflow-wrap:anywhere}h2{font-size:18px;line-height:1.3;margin:0 0 4px}
h3{font-size:14px;margin:0 0 8px}p{margin:0 0 16px;color:var(--muted);max-width:100ch;overflow-wrap:anywhere}
section,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:10px}
.tile{padding:12px 14px;margin:0;font-variant-numeric:tabular-nums;font-size:13px;line-height:1.35;color:var(--muted)}
.tile b{display:block;font-size:23px;font-weight:650;color:var(--ink);overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--muted);margin:0 0 10px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:28px 24px}.panels svg+svg{margin-top:10px}
h1+p{margin-top:6px}footer{font-size:13px}footer p{max-width:none;margin:0 0 6px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}svg .strong{fill:var(--ink);font-weight:600}
svg .on{fill:#fff;font-size:10px}svg .grid{stroke:var(--line)}
svg .rule{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 4}svg .hint{stroke:var(--muted);stroke-dasharray:2 3}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .dot{stroke:var(--card);fill-opacity:.85}
.narrow{display:none}
@media (max-width:700px){.wide{display:none}.narrow{display:block}main{padding:18px 12px}section{padding:14px}h1{font-size:22px}
.tiles{grid-template-columns:1fr 1fr}.panels{grid-template-columns:1fr 1fr;gap:24px 16px}
.panels svg text{font-size:14px}.tile b{font-size:19px}}
"""


def escape(value: object) -> str:
    """Text for HTML and SVG, within attributes too; characters that these may not hold become U+FFFD."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value)))


def responsive(draw: Callable[[int], str]) -> str:
    """Both versions of a picture; `draw` makes it in the width that it is given."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def sample(count: int, most: int, weight: Callable[[int], float] | None = None) -> list[int]:
    """At most `most` of the numbers below `count`, evenly: of each stretch the heaviest, else the first and the last too."""
    size = max(1, math.ceil(count / most))
    return [max(range(i, min(i + size, count)), key=weight or (lambda i: i or count)) for i in range(0, count, size)]


def ticks(high: float, count: int, least: float = 0.0) -> list[float]:
    """About `count` round numbers from 0 to at most `high` > 0, at least `least` apart."""
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(next(m * power for m in (1, 2, 5, 10, 20) if m * power >= raw), least)
    return [i * step for i in range(math.floor(high / step * 1.0001) + 1)]


class Drawing:
    """One SVG: elements in the order in which they were added."""

    def __init__(self, width: float, height: float, label: str):
        """label: what a screen reader says of the picture."""
        self.width, self.height, self._label = width, height, label
        self._parts: list[str] = []

    def add(self, tag: str, kind: str = "", title: str = "", text: str = "", **attributes: float | str) -> None:
        """Adds an element of CSS class `kind` with a tooltip; `_` in the names of attributes stands for `-`."""
        written = f' class="{kind}"' if kind else ""
        for name, value in attributes.items():
            written += f' {name.replace("_", "-")}="{escape(value) if isinstance(value, str) else _short(value)}"'
        inner = (f"<title>{escape(title)}</title>" if title else "") + escape(text)
        self._parts.append(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """anchor: which part of the text is at x: start, middle or end."""
        self.add("text", kind, text=text, x=x, y=y, text_anchor=anchor)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(self, x: float, y: float, width: float, height: float, radius: float, fill: str, title: str = "") -> None:
        self.add("rect", title=title, x=x, y=y, width=width, height=height, rx=radius, fill=fill)

    def svg(self) -> str:
        box = f'viewBox="0 0 {_short(self.width)} {_short(self.height)}"'
        return f'<svg {box} role="img" aria-label="{escape(self._label)}">{"".join(self._parts)}</svg>'


class Plot(Drawing):
    """A drawing with two axes that begin at 0; `x` and `y` turn values into units."""

    def __init__(self, size: tuple[int, int], highs: tuple[float, float], titles: tuple[str, str], label: str, unit: str = ""):
        """
        Args:
            size: width and height.
            highs: where the x and the y axis end, > 0.
            titles: of the x and the y axis.
            unit: follows the numbers on the y axis, which are whole.
        """
        width, height = size
        super().__init__(width, height, label)
        self._highs = highs
        heights = {value: f"{_number(value)}{unit}" for value in ticks(highs[1], max(3, height // 60), 1)}
        self.left, self.right = 10 + 7 * max(map(len, heights.values())), width - 8
        self.top, self.bottom = 28, height - 36
        for value, text in heights.items():
            self.line("grid", self.left, self.y(value), self.right, self.y(value))
            self.text(self.left - 7, self.y(value) + 4, text, anchor="end")
        for value in ticks(highs[0], max(3, min(8, width // 70))):
            self.text(self.x(value), self.bottom + 16, _number(value), anchor="middle")
        self.text(0, 11, titles[1])
        self.text(self.right, height - 3, titles[0], anchor="end")

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self._highs[0]

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self._highs[1]

    def steps(self, ends: Sequence[float], values: Sequence[float], colour: str) -> None:
        """An area: values[i] holds up to ends[i], from where the one before ended."""
        path = f"M{_short(self.left)} {_short(self.bottom)}"
        for end, value in zip(ends, values, strict=True):
            path += f"V{_short(self.y(value))}H{_short(self.x(end))}"
        self.add("path", d=f"{path}V{_short(self.bottom)}Z", fill=colour)

    def curve(self, points: Sequence[tuple[float, float | None]], colour: str) -> None:
        """A line through (x, y), interrupted where y is None; a lone point is a dot."""
        run: list[tuple[float, float]] = []
        for x, y in (*points, (0, None)):
            if y is not None:
                run.append((self.x(x), self.y(y)))
                continue
            if len(run) == 1:
                self.add("circle", "dot", cx=run[0][0], cy=run[0][1], r=4, fill=colour)
            elif run:
                self.add("path", "line", d="M" + "L".join(f"{_short(a)} {_short(b)}" for a, b in run), stroke=colour)
            run = []

    def rule(self, value: float, text: str) -> None:
        """A dashed line across, labelled above its right end."""
        self.line("rule", self.left, self.y(value), self.right, self.y(value))
        self.text(self.right, self.y(value) - 7, text, "strong", "end")

    def cuts(self, values: Sequence[float]) -> None:
        """Dotted lines where something was left out of the x axis."""
        for value in values:
            self.line("hint", self.x(value), self.top - 8, self.x(value), self.bottom)


def scatter(points: Sequence[tuple[int, int, str]], titles: tuple[str, str], colour: str, label: str) -> str:
    """Dots (x, y, tooltip) over two equal axes, with the diagonal on which x = y."""
    high = 1.05 * max([1, *(max(x, y) for x, y, _ in points)])
    plot = Plot((PANEL, PANEL), (high, high), titles, label)
    plot.line("hint", plot.x(0), plot.y(0), plot.x(high), plot.y(high))
    for x, y, title in points:
        plot.add("circle", "dot", title, cx=plot.x(x), cy=plot.y(y), r=4, fill=colour)
    return plot.svg()


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: `share` of the full width, 0..1, or None for no bar; `text` is its figure, `note` what else to say."""

    label: str
    share: float | None
    text: str
    colour: str
    note: str = ""


def bars(width: int, rows: Sequence[Bar], label: str) -> str:
    """Label, bar, figure and note: side by side where the picture is wide, else the bar between the others."""
    wide, note = width >= WIDE, max(len(row.note) for row in rows)
    start = 14 + 7 * max(len(row.label) for row in rows) if wide else 0
    end = width - 90 - (20 + 6 * note if note else 0) if wide else width
    tall, thick, down = (30, 16, 0) if wide else (58 if note else 38, 10, 14)
    drawing = Drawing(width, tall * len(rows), label)
    for number, row in enumerate(rows):
        top = number * tall + 4
        line = top + (12 if wide else 8)
        drawing.text(0, line, row.label, "strong")
        drawing.text(end + 12 if wide else end, line, row.text, "strong", "start" if wide else "end")
        drawing.rect(start, top + down, end - start, thick, 3, "var(--track)")
        if row.share:
            drawing.rect(start, top + down, max(2, (end - start) * min(row.share, 1)), thick, 3, row.colour)
        if row.note:
            drawing.text(width if wide else 0, line if wide else top + 38, row.note, anchor="end" if wide else "start")
    return drawing.svg()


@dataclass(frozen=True)
class Span:
    """Work on a lane; `text` is written on it where there is room, `title` is its tooltip."""

    start: float
    end: float
    title: str
    text: str = ""


def lanes(width: int, rows: Sequence[tuple[str, str, Sequence[Span]]], high: float, x_title: str, label: str) -> str:
    """Lanes (name, colour, spans) over an axis from 0 to `high`. What lies outside or would not show is left out."""
    left, right, tall, pitch = 64, width - 8, 34, 46
    bottom = len(rows) * pitch
    drawing = Drawing(width, bottom + 38, label)

    def at(value: float) -> float:
        return left + (right - left) * min(max(value / high, 0), 1)

    for value in ticks(high, max(3, min(8, width // 70))):
        drawing.line("grid", at(value), 0, at(value), bottom)
        drawing.text(at(value), bottom + 16, _number(value), anchor="middle")
    drawing.text(right, bottom + 35, x_title, anchor="end")
    for number, (name, colour, spans) in enumerate(rows):
        top, drawn = number * pitch, 0.0
        drawing.text(0, top + 21, name, "strong")
        for span in sorted((s for s in spans if s.end > 0 and s.start < high), key=lambda s: s.start):
            x, wide = at(span.start), at(span.end) - at(span.start)
            if x + wide < drawn + 0.5:
                continue
            drawn = x + wide
            drawing.rect(x, top, max(wide - 1, 1), tall, min(2, wide / 4), colour, span.title)
            if wide > 6 * len(span.text):
                drawing.text(x + wide / 2, top + 21, span.text, "on", "middle")
    return drawing.svg()


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:,.6g}"
