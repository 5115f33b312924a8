"""A sheet: which models on which data, and which predictors, the paper's tables are made of. One YAML file, validated here.

A row of the tables is a config without a predictor; each of the sheet's predictors is put into each row. One that has to be trained
is, on the row's `training` data, unless its file is there already: `directory/ROW-PREDICTOR.safetensors`. What a row says under
`train`, rows a batch say, is for all that is trained on it, below what the predictor says itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipeline.check_config import check_config
from pipeline.config import Config, TraceConfig, parse
from pipeline.errors import ConfigError
from pipeline.predicting.train import TRAINED, train
from pipeline.read_config import apply, build


@dataclass(frozen=True)
class Sheet:
    """Attributes:
    common: keys of a config that all rows have.
    rows: name -> the rest of its config, and under `training` what its `data` is for training, under `paper` what the paper says.
    predictors: name -> keys of `predictor`, and under `train` those of `train`; without that it is not trained.
    directory: where trained predictors are, and figures.
    """

    rows: dict[str, dict]
    predictors: dict[str, dict]
    directory: str
    common: dict = field(default_factory=dict)

    def config(self, row: str, predictor: str | None = None) -> Config:
        """A row's config, with one of the predictors or with none.

        Raises:
            ConfigError: what they come to together is no config.
        """
        data = {key: value for key, value in self.rows[row].items() if key not in ("training", "paper")}
        data = _over(self.common, data)
        keys = self.predictors[predictor] if predictor is not None else {"kind": "none"}
        data["predictor"] = {key: value for key, value in keys.items() if key != "train"}
        if predictor is not None and "train" in keys:
            data["predictor"]["path"] = str(self._path(row, predictor))
            data = _over(data, {"train": keys["train"]})
        config = parse(data, row)
        check_config(config, row)
        return config

    def training(self, row: str, predictor: str | None = None) -> Config:
        """As `config`, but of the data that is trained on.

        Raises:
            ConfigError: the row has none.
        """
        if "training" not in self.rows[row]:
            raise ConfigError(f"rows.{row}: {predictor or 'what is asked for'} has to be trained; name its data under `training`")
        data = {"limit": None} | self.rows[row]["training"]
        return parse(_over(self.config(row, predictor).to_dict(), {"data": data}), row)

    def train(self, row: str) -> None:
        """Trains the predictors that have to be and are not there, all on one trace of the row's `training` data.

        Raises:
            One of USER_ERRORS: what the sheet says cannot work.
        """
        missing = [name for name, keys in self.predictors.items() if "train" in keys and not self._path(row, name).exists()]
        if not missing:
            return
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.directory) as beside:
            file = str(Path(beside) / "trace.safetensors")
            for number, name in enumerate(missing):
                train(replace(self.training(row, name), trace=TraceConfig(load=file) if number else TraceConfig(save=file)))

    def paper(self, row: str, table: str) -> str:
        """What the paper has in this place, if anything."""
        return str(self.rows[row].get("paper", {}).get(table, "-"))

    def figures(self, row: str) -> Path:
        """Where what was measured of a row is kept."""
        return Path(self.directory) / f"{_plain(row)}.json"

    def _path(self, row: str, predictor: str) -> Path:
        return Path(self.directory) / f"{_plain(row)}-{_plain(predictor)}.safetensors"


def load_sheet(path: Path, overrides: list[str]) -> Sheet:
    """
    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a predictor that cannot be trained.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        for override in overrides:
            apply(data, override)
    sheet: Sheet = build(Sheet, data, str(path))
    for name, keys in sheet.predictors.items():
        if "train" in keys and keys.get("kind") not in TRAINED:
            raise ConfigError(f"{path}: predictors.{name}: {keys.get('kind')} is not trained; trained are {', '.join(TRAINED)}")
    for row in sheet.rows:
        for predictor in sheet.predictors:
            sheet.config(row, predictor)
    return sheet


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys of `above`, and of `below` where it has none."""
    merged = copy.deepcopy(below)
    for key, value in above.items():
        merged[key] = _over(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
