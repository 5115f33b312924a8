"""The output directory of a run: predictions in input order, a journal that a killed run resumes from, nothing half-written.

While a run is under way `journal.jsonl` is the truth: one line per finished batch. predictions.jsonl grows beside it as far as
rows are complete in input order. metrics.json is written last; its presence says that the run ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import ConfigError
from predictor import traces

STATE, JOURNAL, PREDICTIONS, METRICS = "run.json", "journal.jsonl", "predictions.jsonl", "metrics.json"
NOT_RESULTS = ("output_dir", "cluster", "executors", "train", "bench", "plan", "store.keep", "store.backing", "store.directory")
"""Keys that may differ between a run and its resumption: they change no result."""
PLANS = ("plan.json", "plan.png")
"""May lie in any output directory: what is planned is run next, or was run before."""


class OutputDir:
    """One run's directory, held by one run at a time."""

    def __init__(self, config: Config):
        """Opens a directory that is new, or that holds a run of the same config.

        Raises:
            ConfigError: it holds a run of another config, is in use, or is relative inside a submitted Ray job.
        """
        self.path = Path(config.output_dir)
        check_lasting(self.path)
        self._config = flat(config, NOT_RESULTS)
        try:
            self._check_config()
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = (self.path / JOURNAL).open("ab+")
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still = (self.path / JOURNAL).exists() and os.path.samestat(
                os.fstat(self._journal.fileno()), (self.path / JOURNAL).stat()
            )
        except BlockingIOError:
            still = False
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path}: {error.strerror}") from None
        if not still:  # locked by another run, or unlinked by one that has just ended
            raise ConfigError(f"output_dir: {self.path} is being written by another run; give another output_dir")

    def unfinished(self, inputs: str) -> list[dict[str, Any]]:
        """The journal of an unfinished run of the same inputs; empty if none has finished a batch. Changes nothing.

        Args:
            inputs: identifies data and model.

        Raises:
            ConfigError: the unfinished run was of other inputs.
        """
        finished = (self.path / METRICS).exists()
        entries = [] if finished else self._read_journal()
        if not any("batch" in entry for entry in entries):
            return []
        if json.loads((self.path / STATE).read_text())["inputs"] != inputs:
            raise ConfigError(
                f"output_dir: {self.path} holds an unfinished run over other data or another model (the files have "
                "changed since); give another output_dir or remove it"
            )
        return entries

    def start_anew(self, inputs: str) -> None:
        """Drops what an earlier run left. Called once nothing can be refused any more."""
        self._journal.truncate(0)
        (self.path / METRICS).unlink(missing_ok=True)
        self.write(STATE, json.dumps({"config": self._config, "inputs": inputs}, indent=1))

    def abandon(self) -> None:
        """Leaves nothing of a directory in which nothing was started."""
        if not (self.path / STATE).exists():
            (self.path / JOURNAL).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a finished batch to the journal; what is there survives this process."""
        self._journal.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._journal.flush()

    def write(self, name: str, text: str) -> Path:
        """See `write_whole`."""
        return write_whole(self.path / name, text)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Writes metrics.json, then drops the journal: the run has ended."""
        self.write(METRICS, json.dumps(metrics, indent=1) + "\n")
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self._journal.close()

    def _check_config(self) -> None:
        state_path = self.path / STATE
        if not state_path.exists():
            if self.path.is_dir() and holds_more_than_plans(self.path) and not (self.path / JOURNAL).exists():
                raise ConfigError(f"output_dir: {self.path} holds files that are not a run's; give another output_dir")
            return
        journal = self.path / JOURNAL
        if journal.exists() and not _has_batches(journal) and not (self.path / METRICS).exists():
            return  # that run ended before its first batch: there is nothing of it to protect, whatever it may have lost
        try:
            theirs = json.loads(state_path.read_text())["config"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"output_dir: {state_path} is not a run's; give another output_dir") from None
        check_same(self.path, "run", theirs, self._config)
        if _labels(theirs) != _labels(self._config):  # scores are in their order
            raise ConfigError(
                f"output_dir: {self.path} holds a run with the labels in the order {', '.join(_labels(theirs))}, this config has "
                f"{', '.join(_labels(self._config))}; give another output_dir or remove that one"
            )

    def _read_journal(self) -> list[dict[str, Any]]:
        """Whole lines only: a killed run may have left the last one unfinished, and that is cut off."""
        self._journal.seek(0)
        lines = [line for line in self._journal if line.endswith(b"\n")]
        self._journal.truncate(sum(map(len, lines)))
        self._journal.seek(0, os.SEEK_END)
        return list(_entries(lines))


class InOrder:
    """predictions.jsonl, written as far as the results reach without a gap."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = 0

    def add(self, results: list[dict[str, Any]]) -> None:
        self._waiting |= {result["index"]: result for result in results}
        for result in self._ready():
            self._file.write(json.dumps(result) + "\n")
        self._file.flush()

    def _ready(self) -> Iterator[dict[str, Any]]:
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1

    def close(self) -> None:
        self._file.close()


def check_writable(path: Path, key: str) -> None:
    """Before the work, not after it.

    Raises:
        ConfigError: the file that `key` names cannot be written, or is another's, such as a model's weights.
    """
    if path.is_dir():
        raise ConfigError(f"{key}: {path} is a directory; name the file to write")
    if path.is_file() and not traces.is_own(path):
        raise ConfigError(f"{key}: {path} is there, and neither a predictor's file nor a trace; name another, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise ConfigError(f"{key}: {path.parent}: {error.strerror}") from None
    if not writable:
        raise ConfigError(f"{key}: {path.parent} cannot be written to")


def holds_more_than_plans(path: Path) -> bool:
    """Whether a directory holds anything but what `plan` writes, and hidden files of one who writes just now."""
    return any(file.name not in PLANS and not file.name.startswith(".") for file in path.iterdir())


def check_lasting(path: Path) -> None:
    """
    Raises:
        ConfigError: results would not outlive the Ray job that writes them.
    """
    if not path.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise ConfigError(
            f"output_dir: {str(path)!r} is relative, and a submitted job runs in Ray's temporary copy of the project, "
            "where results would be lost; add output_dir=/absolute/path"
        )


def check_same(path: Path, what: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """
    Args:
        what: lies in `path`: a run, a bench.
        theirs, ours: what `flat` made.

    Raises:
        ConfigError: of another config.
    """
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"output_dir: {path} holds a {what} with {key} = {theirs.get(key)!r}, this config has {ours.get(key)!r}; "
                "give another output_dir or remove that one"
            )


def write_whole(path: Path, text: str) -> Path:
    """Writes a file beside its name and renames it."""
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def flat(config: Config, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The config as dotted keys, without some that change no result."""
    keys: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if prefix in left_out:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        else:
            keys[prefix] = value

    add("", config.to_dict())
    return keys


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What a journal's lines say; one that is not whole says nothing."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _has_batches(journal: Path) -> bool:
    with journal.open("rb") as lines:
        return any("batch" in entry for entry in _entries(lines))


def _labels(flat: dict[str, Any]) -> list[str]:
    return [key.removeprefix("labels.") for key in flat if key.startswith("labels.")]
