"""The paper's tables for one's own models: `python -m pipeline.predicting.tables TABLE SHEET.yaml [key.path=value ...]`.

TABLE is perplexity (the paper's table 3), fidelity (4), hits (5), memory (figure 8) or cost, of which the paper says nothing;
or all, from one measurement of each row, whose figures are then kept in the sheet's directory, `ROW.json`.
Prints Markdown, with what the paper has in the last column. A row whose model or data is not there is left out, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.predicting.measured import Measured, measure
from pipeline.predicting.record import by_length, record
from pipeline.predicting.sheet import Sheet, load_sheet


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
    by_name = {name: by_length(predicted.memory) for name, predicted in found.predicted.items()}
    for span, first in next(iter(by_name.values())).items():
        known = ", ".join(f"{name} {spans[span].known:.1%}" for name, spans in by_name.items())
        yield [row, span, str(first.texts), f"{first.idle:.1%}", known]


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
    "memory": (memory, ["model, data", "tokens", "texts", "expert bytes that a text leaves idle", "that its table does not name"]),
    "cost": (cost, ["model, data", "predictor", "batch", "ms per batch"]),
}


ALL = "all"
Say = Callable[[str], None]


def lines(table: str, sheet: Sheet, say: Say) -> Iterator[str]:
    """A table's Markdown, line by line as it is measured.

    Raises:
        One of USER_ERRORS: what the sheet says cannot work.
    """
    yield from _header(table)
    for row in sheet.rows:
        if _is_of(table, sheet, row) and (found := _measured(sheet, row, table in ("perplexity", "fidelity"), say)):
            yield from _cells(table, sheet, row, found)


def every_table(sheet: Sheet, say: Say) -> Iterator[str]:
    """All tables from one measurement of each row, printed once all rows are through; figures are on disk after each.

    Raises:
        One of USER_ERRORS: what the sheet says cannot work.
    """
    made: dict[str, list[str]] = {table: [] for table in TABLES}
    for row in sheet.rows:
        if found := _measured(sheet, row, True, say):
            path = sheet.figures(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record(sheet.config(row), found)) + "\n", encoding="utf-8")
            say(f"{row}: {path}")
            for table in TABLES:
                if _is_of(table, sheet, row):
                    made[table] += _cells(table, sheet, row, found)
    for table, cells in made.items():
        yield from (f"\n{table}\n", *_header(table), *cells)


def _is_of(table: str, sheet: Sheet, row: str) -> bool:
    """Scored texts have a perplexity, the others' answers a fidelity."""
    return table not in ("perplexity", "fidelity") or (sheet.config(row).task == "score") == (table == "perplexity")


def _measured(sheet: Sheet, row: str, answers: bool, say: Say) -> Measured | None:
    """None: its model or data is not there."""
    config = sheet.config(row)
    missing = [path for path in (config.model.path, config.data.path) if path is not None and not Path(path).exists()]
    if missing:
        say(f"{row} is left out: {missing[0]}: no such file or directory")
        return None
    with contextlib.redirect_stdout(sys.stderr):
        sheet.train(row)
    return measure(config, {name: sheet.config(row, name) for name in sheet.predictors}, answers)


def _header(table: str) -> Iterator[str]:
    header = [*TABLES[table][1], "the paper"]
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)


def _cells(table: str, sheet: Sheet, row: str, found: Measured) -> Iterator[str]:
    for cells in TABLES[table][0](sheet, row, found):
        yield f"| {' | '.join([*cells, sheet.paper(row, table)])} |"


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2 or arguments[0] not in (*TABLES, ALL):
            found = f"found {arguments[0]!r}" if arguments else "found nothing"
            raise ConfigError(f"say TABLE SHEET.yaml, TABLE one of {', '.join(TABLES)} or {ALL}; {found}")
        sheet = load_sheet(Path(arguments[1]), arguments[2:])
        say = partial(print, file=sys.stderr, flush=True)
        for line in every_table(sheet, say) if arguments[0] == ALL else lines(arguments[0], sheet, say):
            print(line, flush=True)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
