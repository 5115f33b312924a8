"""The output directory of a bench: bench.json of one config, held by one bench at a time; nothing of one that was refused.

Knows no resumption: times of two sittings do not belong together.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.reports.output import check_lasting, check_same, flat, holds_more_than_plans, write_whole

REPORT = "bench.json"
NOT_MEASURED = ("output_dir", "cluster", "train", "plan", "store.keep", "store.directory")
"""Keys that may differ between a bench and its repetition."""


class BenchDir:
    """Made when it is entered."""

    def __init__(self, config: Config):
        """
        Raises:
            ConfigError: it holds a bench of another config, or what is no bench's; or it is relative inside a submitted Ray job.
        """
        self.path = Path(config.output_dir)
        self.config = flat(config, NOT_MEASURED)
        check_lasting(self.path)
        try:
            self._check()
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        """
        Raises:
            ConfigError: it cannot be made, or another bench is at it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            raise ConfigError(f"output_dir: {self.path} is being written by another bench; give another output_dir") from None
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path}: {error.strerror}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Removes a directory into which nothing was written."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._held)

    def write(self, name: str, text: str) -> Path:
        return write_whole(self.path / name, text)

    def write_report(self, report: dict[str, Any]) -> Path:
        return self.write(REPORT, json.dumps(report | {"config": self.config}, indent=1) + "\n")

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not (self.path / REPORT).exists():
            if holds_more_than_plans(self.path):
                raise ConfigError(f"output_dir: {self.path} holds files that are not a bench's; give another output_dir")
            return
        try:
            theirs = json.loads((self.path / REPORT).read_text())["config"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"output_dir: {self.path / REPORT} has no config; give another output_dir") from None
        check_same(self.path, "bench", theirs, self.config)
