"""Small charts as inline SVG: areas over time, lines, horizontal bars, scatter plots, lanes. No script, nothing from elsewhere.

Knows scales, ticks and text; nothing of experts or batches. A colour is any CSS colour, usually a variable of the page, so that a
picture turns dark with its page. One unit is one CSS pixel where a picture is shown at its own width. Letters would shrink with a
wide picture on a phone, so `responsive` draws it twice and STYLE shows the one that fits.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDE, NARROW, PANEL = 960, 380, 220
"""Widths: across a page, across a phone, one of several side by side."""

STYLE = """
svg{display:block;width:100%;max-width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg .strong{fill:var(--ink);font-weight:600}
svg .on{fill:#fff;font-size:10px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .rule{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 4}
svg .break{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3}
svg .area{stroke:var(--card);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dot{stroke:var(--card);stroke-width:1;fill-opacity:.85}
svg .track{fill:var(--track)}
.narrow{display:none}
@media (max-width:700px){.wide{display:none}.narrow{display:block}}
"""


def escape(value: object) -> str:
    """Text for HTML and SVG, within attributes too; characters that neither may hold become U+FFFD."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value)))


def responsive(draw: Callable[[int], str]) -> str:
    """A picture for wide pages and for phones.

    Args:
        draw: the picture of a given width.
    """
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def ticks(high: float, count: int, least: float = 0.0) -> list[float]:
    """About `count` round numbers from 0 to at most `high`, at least `least` apart."""
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999), least)
    return [i * step for i in range(math.floor(high / step * 1.0001) + 1)]


class Drawing:
    """One SVG: elements in the order in which they were added."""

    def __init__(self, width: int, height: float, label: str):
        """label: what a screen reader says of the picture."""
        self.width, self.height, self._label = width, height, label
        self._parts: list[str] = []

    def add(self, tag: str, kind: str = "", title: str = "", text: str = "", **attributes: float | str) -> None:
        """Adds an element of CSS class `kind`, with a tooltip; in attribute names `_` stands for `-`."""
        written = f' class="{kind}"' if kind else ""
        for name, value in attributes.items():
            value = escape(value) if isinstance(value, str) else _short(value)
            written += f' {name.replace("_", "-")}="{value}"'
        inner = (f"<title>{escape(title)}</title>" if title else "") + escape(text)
        self._parts.append(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """anchor: which end of the text is at x: start, middle or end."""
        self.add("text", kind, text=text, x=x, y=y, text_anchor=anchor)

    def svg(self) -> str:
        box = f'viewBox="0 0 {self.width} {_short(self.height)}"'
        return f'<svg {box} role="img" aria-label="{escape(self._label)}">{"".join(self._parts)}</svg>'


class Plot(Drawing):
    """A drawing with two axes from 0; `x` and `y` turn values into units."""

    def __init__(
        self, size: tuple[int, int], highs: tuple[float, float], titles: tuple[str, str], label: str, unit: str = "", whole_x: bool = False
    ):
        """
        Args:
            size: width and height.
            highs: the ends of the x and the y axis, > 0.
            titles: of the x and the y axis.
            unit: follows the numbers on the y axis.
            whole_x: only whole numbers on the x axis; on the y axis it is always so.
        """
        super().__init__(*size, label)
        width, height = size
        self._highs = highs
        y_ticks = ticks(highs[1], max(2, height // 60), 1)
        self.left, self.right = 12 + 7 * len(_number(y_ticks[-1]) + unit), width - 8
        self.top, self.bottom = 26, height - 36
        for value in y_ticks:
            self.add("line", "grid", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value))
            self.text(self.left - 7, self.y(value) + 4, _number(value) + unit, anchor="end")
        x_ticks = ticks(highs[0], max(2, width // 100), 1 if whole_x else 0)
        for value in x_ticks:
            self.text(self.x(value), self.bottom + 16, _number(value), anchor="middle")
        self.text(0, 11, titles[1])
        self.text(self.right, height - 4, titles[0], anchor="end")

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self._highs[0]

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self._highs[1]

    def steps(self, ends: Sequence[float], values: Sequence[float], colour: str) -> None:
        """An area over the x axis: values[i] holds up to ends[i], from where the last one ended."""
        path = f"M{_short(self.x(0))} {_short(self.y(0))}"
        for end, value in zip(ends, values, strict=True):
            path += f"V{_short(self.y(value))}H{_short(self.x(end))}"
        self.add("path", "area", d=f"{path}V{_short(self.y(0))}Z", fill=colour)

    def line(self, points: Sequence[tuple[float, float | None]], colour: str) -> None:
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
        self.add("line", "rule", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value))
        self.text(self.right, self.y(value) - 6, text, "strong", "end")

    def breaks(self, values: Sequence[float]) -> None:
        """Vertical lines where something was left out of the x axis."""
        for value in values:
            self.add("line", "break", x1=self.x(value), x2=self.x(value), y1=self.top, y2=self.bottom)


def scatter(points: Sequence[tuple[int, int, str]], titles: tuple[str, str], colour: str, label: str) -> str:
    """Dots (x, y, tooltip) on two equal axes, with the diagonal on which x = y."""
    high = 1.05 * max([1, *(max(x, y) for x, y, _ in points)])
    plot = Plot((PANEL, PANEL), (high, high), titles, label, whole_x=True)
    plot.add("line", "break", x1=plot.x(0), y1=plot.y(0), x2=plot.x(high), y2=plot.y(high))
    for x, y, title in points:
        plot.add("circle", "dot", title, cx=plot.x(x), cy=plot.y(y), r=4, fill=colour)
    return plot.svg()


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: `share` of the full width, 0..1; None draws no bar."""

    label: str
    share: float | None
    text: str
    colour: str
    note: str = ""


def bars(width: int, rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars: label, bar and figures side by side where `width` allows, else one above the other."""
    wide, notes = width >= WIDE, any(row.note for row in rows)
    start = 14 + 7 * max(len(row.label) for row in rows) if wide else 0
    end = width - (90 + notes * (20 + 6 * max(len(row.note) for row in rows))) if wide else width
    height, thick, down = (30, 16, 0) if wide else (54 if notes else 38, 10, 14)
    drawing = Drawing(width, height * len(rows), label)
    for number, row in enumerate(rows):
        top = number * height + 4
        shape: dict[str, float] = {"x": start, "y": top + down, "height": thick, "rx": 3}
        drawing.text(0, top + (12 if wide else 8), row.label, "strong")
        drawing.text(end + 12 if wide else end, top + (12 if wide else 8), row.text, "strong", "start" if wide else "end")
        drawing.add("rect", "track", width=end - start, **shape)
        if row.share:
            drawing.add("rect", width=max(2, (end - start) * min(row.share, 1)), fill=row.colour, **shape)
        if row.note:
            drawing.text(width if wide else 0, top + (12 if wide else 38), row.note, anchor="end" if wide else "start")
    return drawing.svg()


@dataclass(frozen=True)
class Span:
    """Work on a lane from `start` to `end`; `text` is written on it where it fits, `title` is its tooltip."""

    start: float
    end: float
    title: str
    text: str = ""


def lanes(width: int, rows: Sequence[tuple[str, str, Sequence[Span]]], high: float, x_title: str, label: str) -> str:
    """Lanes (name, colour, spans) one below the other over an axis from 0 to `high`; spans are cut off at its ends."""
    left, tall, gap = 64, 34, 12
    drawing = Drawing(width, len(rows) * (tall + gap) + 40, label)
    bottom = len(rows) * (tall + gap)

    def at(value: float) -> float:
        return left + (width - 8 - left) * min(max(value / high, 0), 1)

    for value in ticks(high, width // 100):
        drawing.add("line", "grid", x1=at(value), x2=at(value), y1=0, y2=bottom)
        drawing.text(at(value), bottom + 16, _number(value), anchor="middle")
    drawing.text(width - 8, bottom + 34, x_title, anchor="end")
    for number, (name, colour, spans) in enumerate(rows):
        top = number * (tall + gap)
        drawing.text(0, top + tall / 2 + 4, name, "strong")
        for span in spans:
            x, wide = at(span.start), at(span.end) - at(span.start)
            drawing.add("rect", "", span.title, x=x, y=top, width=max(wide - 1, 1), height=tall, rx=min(2, wide / 4), fill=colour)
            if wide > 6 * len(span.text) + 3:
                drawing.text(x + wide / 2, top + tall / 2 + 4, span.text, "on", "middle")
    return drawing.svg()


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:,.6g}"
