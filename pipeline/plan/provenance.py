"""Whether a trace is of what the config is about: the same rows, as the same token ids, and the same routers.

Knows no simulation. A trace of something else is not refused: what it says is then said of other data or another model.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.data import Batch, read_rows
from pipeline.errors import DataError
from pipeline.inputs import encode_texts
from pipeline.models import ModelSpec
from pipeline.prepare import load_tokenizer
from pipeline.tasks.registry import Task
from predictor.traces import identity_of
from store.errors import CheckpointError
from store.load import routers_identity


@dataclass(frozen=True)
class Provenance:
    """
    Attributes:
        rows: of the trace.
        shared: so many of them are rows of the config's data; None: the data cannot be read.
        data: rows of the data, or why they cannot be read.
        same_routers: None: the model's weights are not here, or the trace does not say.
    """

    rows: int
    shared: int | None
    data: int | str
    same_routers: bool | None

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "rows_of_data": self.shared, "same_routers": self.same_routers}

    def warnings(self, config: Config) -> list[str]:
        """A line each; none: all that could be compared is the same."""
        lines = []
        if self.shared is None:
            lines.append(f"whether plan.trace is of the config's data is not known: {self.data}")
        elif self.shared == 0:
            lines.append(
                f"warning: plan.trace is of other data: none of its {self.rows} rows is among the {self.data} of "
                f"{config.data.path}, as the config reads them"
            )
        elif not self.shared == self.rows == self.data:
            lines.append(
                f"warning: plan.trace is of other rows: {self.shared} of its {self.rows} are among the {self.data} of "
                f"{config.data.path}, as the config reads them"
            )
        if self.same_routers is False:
            lines.append("warning: plan.trace was recorded from another model of this shape: its routers are not this model's")
        return lines


def provenance(config: Config, model: ModelSpec, task: Task, batches: Sequence[Batch]) -> Provenance:
    """
    Args:
        batches: of all rows of `plan.trace`.
    """
    prompts = task.forwards > 1  # traced as `score`, as `train` asks: of a row that is written only the prompt is known beforehand
    read = slice(1 if prompts else None)
    theirs = _counted(row[read] for batch in batches for row in zip(*batch.tokens.streams, strict=True))
    shared: int | None = None
    data: int | str
    same: bool | None = None
    try:
        rows = read_rows(config.data, config.labels)
        tokenizer, most = load_tokenizer(model.tokenizer), config.batch.max_tokens
        mine: list[Sequence[np.ndarray]]
        if prompts:
            mine = [(ids,) for ids in encode_texts(tokenizer, rows, most)[0]]
        else:
            mine = [row.streams for row in task.encode(tokenizer, rows, most)[0]]
    except DataError as error:
        data = str(error)
    else:
        shared, data = (theirs & _counted(mine)).total(), len(rows)
    with contextlib.suppress(CheckpointError):  # the weights are elsewhere
        recorded = identity_of(Path(config.plan.trace or ""))
        same = None if recorded is None else routers_identity(model.source.open(), model.placement) == recorded
    return Provenance(theirs.total(), shared, data, same)


def _counted(rows: Iterable[Sequence[np.ndarray]]) -> Counter[bytes]:
    """By their token ids."""
    return Counter(b"|".join(ids.astype(np.int64).tobytes() for ids in streams) for streams in rows)
