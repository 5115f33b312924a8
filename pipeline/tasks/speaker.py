"""What a model writes, on the terminal while it writes: the first row of the batch under way, and every row that is done."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

from pipeline.data import Batch
from pipeline.inputs import Result
from pipeline.tasks.generate import Generate
from pipeline.tasks.writing import DONE


class Speaker:
    """Prints as tokens come where somebody watches, whole rows only where nobody does (a file, a pipe)."""

    def __init__(self, task: Generate, out: TextIO | None = None):
        self._task, self._out = task, out or sys.stdout
        self._said = ""
        self._live = self._out.isatty()

    def listen(self, batch: Batch, steps: list[list[int]]) -> None:
        """
        Args:
            steps: per step the new token of each row (Executor.spoken).
        """
        text = self._task.text([step[0] for step in steps if step[0] != DONE])
        if not self._live or text.endswith("\ufffd") or len(text) <= len(self._said):  # half a character, or nothing new
            return
        self._print(("" if self._said else f"row {int(batch.rows[0]) + 1}: ") + text[len(self._said) :])
        self._said = text

    def finish(self, results: list[Result]) -> None:
        """All rows of a batch: what is left of the first, and the others."""
        for result in results:
            text, said = result["text"], self._said
            self._said = ""
            self._print((text[len(said) :] if said and text.startswith(said) else f"row {result['index'] + 1}: {text}") + "\n")

    def _print(self, text: str) -> None:
        with tqdm.external_write_mode(self._out):
            self._out.write(text)
            self._out.flush()
