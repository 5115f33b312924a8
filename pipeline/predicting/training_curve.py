"""The picture of a training: loss, and how often held-out tokens were predicted right, epoch by epoch."""

from __future__ import annotations

from pipeline.reports.svg import Plot
from predictor.checkpoint import Epoch

SIZE = (460, 260)
STYLE = (
    "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#5f6b7c}.grid{stroke:#e3e7ed}"
    ".line{fill:none;stroke-width:2}.strong{fill:#18202c}"
)


def training_curve(history: list[Epoch]) -> str:
    """A whole SVG file: two plots, one above the other."""
    epochs = range(1, len(history) + 1)
    high = max(1, len(history))
    right = Plot(SIZE, (high, 100), ("epoch", "right on held-out rows: top-1 (blue), top-3 (green)"), "accuracy by epoch", "%")
    right.curve([(n, 100 * e.top1) for n, e in zip(epochs, history, strict=True)], "#3573cf")
    right.curve([(n, 100 * e.top3) for n, e in zip(epochs, history, strict=True)], "#35a892")
    first = max([e.loss for e in history], default=1.0)
    loss = Plot(SIZE, (high, 100), ("epoch", f"loss, in % of the highest, {first:.3g}"), "loss by epoch", "%")
    loss.curve([(n, 100 * e.loss / first) for n, e in zip(epochs, history, strict=True)], "#d1583a")
    width, height = SIZE
    body = right.svg().replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    below = loss.svg().replace("<svg ", f'<svg y="{height}" width="{width}" height="{height}" ', 1)
    space = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * height}"'
    return f"<svg {space}><style>{STYLE}</style>{body}{below}</svg>\n"
