"""Inputs to batches: rows of a file, tokenised, cut into batches. Padding never leaves this file's `Batch.pad`.

A row keeps its number in the file through everything, so that results can come back in any order.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import BatchConfig, DataConfig
from pipeline.errors import DataError
from predictor.tokens import TokenBatch

SUFFIXES = (".tsv", ".csv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Row:
    """One input."""

    text: str
    pair: str | None = None
    label: str | None = None
    """A key of the config's `labels`."""
    target: str | None = None
    line: int | None = field(default=None, compare=False)
    """Of a .txt file, where blank lines are no rows; the first is 1."""


@dataclass(frozen=True)
class Batch:
    """What is sent to the Predictor and to the Executor: everything that the work needs.

    Attributes:
        index: the batch's number in the run.
        rows: the rows' numbers in the input, int64 (batch,).
        tokens: their token ids; for an encoder-decoder also what the decoder reads.
        targets: task score: per row the ids that are scored, int64, one per token that the decoder reads.
    """

    index: int
    rows: np.ndarray
    tokens: TokenBatch
    targets: tuple[np.ndarray, ...] | None = None

    def pad(
        self, stream: int, value: int, padded: Callable[[int], int] = lambda longest: longest, left: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the function `pad`."""
        return pad(self.tokens, stream, value, padded, left)


def pad(
    tokens: TokenBatch, stream: int, value: int, padded: Callable[[int], int] = lambda longest: longest, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stream's ids padded with `value`, and its attention mask: int64 (batch, padded(longest)) both.

    On the right unless `left`, whatever the tokenizer prefers: a router with a capacity then serves real tokens first.
    """
    rows = tokens.streams[stream]
    ids = np.full((len(rows), padded(max(map(len, rows)))), value, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if left else slice(len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def read_rows(config: DataConfig, labels: dict[str, str]) -> list[Row]:
    """
    Raises:
        DataError: no file, an unknown format, a missing column, a broken encoding, an empty file or text, or a label outside
            `labels`; the message names the row, the first being 1.
    """
    if config.path is None:
        raise DataError(f"data.path is null: download {config.hub} from https://huggingface.co/datasets and pass data.path=FILE")
    path = Path(config.path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    rows = []
    texts = config.text if isinstance(config.text, list) else [config.text]
    for number, (line, record) in enumerate(_records(path, _decode(path, raw)), start=1):
        if config.limit is not None and number > config.limit:
            break

        def cell(column: str, number: int = number, record: dict[str, Any] = record) -> str:
            if record.get(column) is None:
                found = ", ".join(str(name) for name in record if record[name] is not None)
                raise DataError(f"{path}: row {number} has no column {column!r}; it has: {found}")
            if isinstance(record[column], list | dict):
                raise DataError(f"{path}: row {number}: {column!r} is {record[column]!r}, not text")
            value = str(record[column])
            if value.encode(errors="ignore").decode() != value:  # JSON can write half a surrogate pair
                raise DataError(f"{path}: row {number}: {column!r} is not Unicode text: {value!r}")
            return value

        fields = [cell(column) for column in texts] + ([cell(config.target)] if config.target else [])
        for column, value in zip([*texts, config.target], fields, strict=False):
            if not value.strip():
                raise DataError(f"{path}: row {number}: {column!r} is empty; remove the row")
        label = cell(config.label) if config.label else None
        if label is not None and labels and label not in labels:
            raise DataError(
                f"{path}: row {number} has label {label!r}; `labels` knows {', '.join(labels)}; name it there, or leave data.label "
                "out to answer without judging"
            )
        pair = " ".join(fields[1 : len(texts)]) or None
        rows.append(Row(config.prefix + fields[0], pair, label, fields[-1] if config.target else None, line))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def blank_lines(rows: list[Row]) -> int:
    """Of a .txt file, between its rows and before them."""
    last = rows[-1].line
    return 0 if last is None else last - len(rows)


def place(rows: list[Row], index: int) -> str:
    """Where to look for a row, for messages."""
    line = rows[index].line
    return f"row {index + 1}" + (f", line {line}" if line is not None and line != index + 1 else "")


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {raw[error.start]:#04x} at {error.start}); convert the file"
        ) from None


def _records(path: Path, text: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Each row by its columns, and its line where rows are lines that are not blank."""
    # not str.splitlines: U+2028 and the like are characters of a sentence
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if path.suffix == ".txt":
        # blank ones part paragraphs; elsewhere they are rows that lack something
        yield from ((number, {"text": line}) for number, line in enumerate(lines, start=1) if line.strip())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise DataError(f"{path}: row {number} is an empty line; remove it")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}: row {number} is not a JSON object")
            yield None, record
    else:
        csv.field_size_limit(2**30)  # the module's default refuses a passage of 128 KiB
        # a .tsv as GLUE's files: no quoting, a quotation mark is a character
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
        reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), **style)
        try:
            header = next(reader, [])
            for number, cells in enumerate(reader, start=1):
                if len(cells) != len(header):
                    raise DataError(f"{path}: row {number} has {len(cells)} columns, the first line has {len(header)}")
                yield None, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num} cannot be read: {error}") from None


def cut(lengths: list[int], config: BatchConfig) -> list[np.ndarray]:
    """Row numbers of each batch, int64 arrays: the same for the same input, so that a resumed run has the same batches."""
    order = np.arange(len(lengths))
    if config.order == "length":
        order = np.argsort(np.array(lengths), kind="stable")
    return [order[start : start + config.size] for start in range(0, len(order), config.size)]


@dataclass(frozen=True)
class Encoded:
    """A row as token ids, int64 arrays: one per stream, and for task score what is scored."""

    streams: tuple[np.ndarray, ...]
    target: np.ndarray | None = None


def make_batches(encoded: list[Encoded], config: BatchConfig) -> list[Batch]:
    """Cuts rows into batches, in the order in which they will run."""
    batches = []
    for index, numbers in enumerate(cut([len(row.streams[0]) for row in encoded], config)):
        rows = [encoded[i] for i in numbers]
        streams = tuple(zip(*(row.streams for row in rows), strict=True))
        targets = tuple(row.target for row in rows if row.target is not None)
        batches.append(Batch(index, numbers, TokenBatch(streams), targets or None))
    return batches
