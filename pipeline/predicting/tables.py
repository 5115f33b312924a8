"""The paper's tables for one's own models: `python -m pipeline.predicting.tables TABLE SHEET.yaml [key.path=value ...]`.

TABLE is perplexity (the paper's table 3), fidelity (4), hits (5), memory (figure 8) or cost, of which the paper says nothing.
Prints Markdown, with what the paper has in the last column. A row whose model or data is not there is left out, and that is said.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.predicting.measured import Measured, Memory, measure
from pipeline.predicting.sheet import Sheet, load_sheet

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Where texts are parted by their tokens."""


def perplexity(sheet: Sheet, row: str, found: Measured) -> Iterator[list[str]]:
    for name, predicted in found.predicted.items():
        whole, hashed = found.whole["perplexity"], predicted.fidelity["quality_hash"]["perplexity"]
        yield [row, name, f"{whole:.3f}", f"{found.exact['perplexity']:.3f}", f"{hashed:.3f}", f"{hashed / whole:.3f} x"]


def fidelity(sheet: Sheet, row: str, found: Measured) -> Iterator[list[str]]:
    for name, predicted in found.predicted.items():
        qualities = (found.whole, found.exact, predicted.fidelity["quality_hash"])
        both = [f"{q['accuracy']:.1%}" + (f" / {q['f1']:.1%}" if "f1" in q else "") for q in qualities]
        ratio = predicted.fidelity["ratio"]["accuracy"]
        yield [row, name, *both, f"{predicted.fidelity['same_label']:.1%}", f"{ratio:.1%}", f"{found.difference:.0e}"]


def hits(sheet: Sheet, row: str, found: Measured) -> Iterator[list[str]]:
    for name, predicted in found.predicted.items():
        rates = predicted.accuracy.rates()
        layers = [f"{one:.1%} / {three:.2%}" for one, three in zip(rates["top1"], rates["top3"], strict=True)]
        mean = f"{predicted.accuracy.mean_top1:.1%} / {predicted.accuracy.mean_top3:.2%}"
        yield [row, name, f"{predicted.stand_in_bytes:.1%}" if predicted.stand_in_bytes else "-", mean, "; ".join(layers)]


def memory(sheet: Sheet, row: str, found: Measured) -> Iterator[list[str]]:
    groups: dict[int, dict[str, list[Memory]]] = {}
    for name, predicted in found.predicted.items():
        for one in predicted.memory:
            groups.setdefault(int(np.searchsorted(LENGTHS, one.tokens)), {}).setdefault(name, []).append(one)
    for group, by_name in sorted(groups.items()):
        first = next(iter(by_name.values()))
        span = f"{LENGTHS[group - 1] + 1 if group else 1} to {LENGTHS[group]}" if group < len(LENGTHS) else f"over {LENGTHS[-1]}"
        saved = ", ".join(f"{name} {1 - np.mean([one.named for one in ones]):.1%}" for name, ones in by_name.items())
        yield [row, span, str(len(first)), f"{1 - np.mean([one.used for one in first]):.1%}", saved]


def cost(sheet: Sheet, row: str, found: Measured) -> Iterator[list[str]]:
    for name, predicted in found.predicted.items():
        yield [row, name, str(sheet.config(row).batch.size), f"{predicted.ms:.2f}"]


Lines = Callable[[Sheet, str, Measured], Iterator[list[str]]]
TABLES: dict[str, tuple[Lines, list[str]]] = {
    "perplexity": (perplexity, ["model, text", "predictor", "whole", "exact routing", "hash routing", "hash / whole"]),
    "fidelity": (
        fidelity,
        [
            "model, data",
            "predictor",
            "whole, accuracy / F1",
            "exact",
            "hash",
            "same label as exact",
            "accuracy over exact's",
            "exact from whole, at most",
        ],
    ),
    "hits": (hits, ["model, data", "predictor", "stand-ins", "top-1 / top-3", "per MoE layer"]),
    "memory": (memory, ["model, data", "tokens", "texts", "expert bytes that a text leaves idle", "of which tables know"]),
    "cost": (cost, ["model, data", "predictor", "batch", "ms per batch"]),
}


def lines(table: str, sheet: Sheet, say: Callable[[str], None]) -> Iterator[str]:
    """A table's Markdown, line by line as it is measured.

    Raises:
        One of USER_ERRORS: what the sheet says cannot work.
    """
    make, header = TABLES[table]
    header = [*header, "the paper"]
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in sheet.rows:
        config = sheet.config(row)
        if (config.task == "score") != (table == "perplexity") and table in ("perplexity", "fidelity"):
            continue
        missing = [path for path in (config.model.path, config.data.path) if path is not None and not Path(path).exists()]
        if missing:
            say(f"{row} is left out: {missing[0]}: no such file or directory")
            continue
        with contextlib.redirect_stdout(sys.stderr):
            for predictor in sheet.predictors:
                sheet.train(row, predictor)
        predictors = {name: sheet.config(row, name) for name in sheet.predictors}
        found = measure(config, predictors, table in ("perplexity", "fidelity"))
        for cells in make(sheet, row, found):
            yield f"| {' | '.join([*cells, sheet.paper(row, table)])} |"


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2 or arguments[0] not in TABLES:
            found = f"found {arguments[0]!r}" if arguments else "found nothing"
            raise ConfigError(f"say TABLE SHEET.yaml, TABLE one of {', '.join(TABLES)}; {found}")
        sheet = load_sheet(Path(arguments[1]), arguments[2:])
        for line in lines(arguments[0], sheet, lambda text: print(text, file=sys.stderr, flush=True)):
            print(line, flush=True)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
