"""The config of a run: frozen dataclasses, read from YAML, overridden by `key.path=value`, validated once, here.

A field's type and its comment are its documentation; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import ConfigError
from pipeline.read_config import apply, build
from pipeline.tasks.sampling import Sampling
from predictor.settings import TrainSettings


def _budget(value: Any) -> Any:
    """`budget: 0` is a number to YAML."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _labels(value: Any) -> Any:
    """So are labels."""
    if not isinstance(value, dict):
        return value
    if any(isinstance(item, bool) for item in [*value, *value.values()]):
        raise ValueError("YAML reads yes, no, on and off as true or false; quote them")
    return {str(key): str(word) for key, word in value.items()}


@dataclass(frozen=True)
class RandomConfig:
    recipe: str | None = None
    """How wide the numbers are spread; see pipeline/weights/recipes.py."""
    seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None
    """A local directory or a hub id. Either this or `config` is needed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on a GPU, float32 on a CPU."""
    config: str | None = None
    """A config.json: the model then has random weights."""
    random: RandomConfig = field(default_factory=RandomConfig)
    """Of which kind, with `config`."""
    tokenizer: str | None = None
    """A local directory or a hub id; null: that of `path`."""


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """A .tsv, .csv, .jsonl or .txt file. A config that does not ship its data has null and says in `hub` what to get."""
    text: str | list[str] = "text"
    """A column; two for a pair; three for a pair of the first and of the other two, a blank between. A .txt file has one, text."""
    label: str | None = None
    """A column; without it no quality is reported."""
    target: str | None = None
    """A column: what an encoder-decoder scores, given the text."""
    prefix: str = ""
    """Put before the text."""
    limit: int | None = None
    """Read only so many rows."""
    hub: str | None = None
    """What to download if `path` is null."""


@dataclass(frozen=True)
class BatchConfig:
    size: int = 4
    max_tokens: int = 512
    """Longer texts are truncated, and counted."""
    order: Literal["input", "length", "overlap"] = "length"
    """length: rows of similar length together, so that little is padded. overlap: rows whose tables share experts."""
    window: int = 256
    """overlap: so many rows in a row of the input are grouped with one another, and no row waits for more."""


@dataclass(frozen=True)
class StandInConfig:
    kind: Literal["auto", "none", "svd", "2bit", "4bit"] = "auto"
    """auto: 4bit if it fits the budget, else svd of the largest rank that does, else none."""
    budget: str = field(default="auto", metadata={"read": _budget})
    """Bytes for all of them: a size, or a share of all expert bytes; auto: a quarter of these, and where they share the Executor's
    device no more than a fifth of store.budget."""


@dataclass(frozen=True)
class PredictorConfig:
    kind: str = "lstm"
    path: str | None = None
    """The file that `train` wrote; a rehearsal does without."""
    top_k: int | None = None
    """Experts per token and MoE layer in the hash tables; with `mass` at most so many. None: see `named`."""
    mass: float | None = None
    """Instead of `top_k` experts as many as come to this share of a token's probability, 0..1."""
    stand_ins: StandInConfig = field(default_factory=StandInConfig)
    """Of a rehearsal without `path`."""
    device: Literal["auto", "cpu", "cuda", "executor"] = "auto"
    """cpu, or cuda for a GPU of its own: in the Predictor actor; executor: in the Executor's process, on its device."""
    lookahead: int | Literal["auto"] = "auto"
    """Batches predicted ahead; auto: until they name 10 x slots expert uses, at most 64."""

    def named(self, chosen: int) -> int:
        """How many experts a table names for a token: `top_k`, or 3, and no fewer than the router chooses."""
        return max(3, chosen) if self.top_k is None else self.top_k


@dataclass(frozen=True)
class TraceConfig:
    save: str | None = None
    """Where `run` and `train` leave what the routers decided, for `train` and the oracle."""
    load: str | None = None
    """What `train` learns from instead of tracing the data."""


@dataclass(frozen=True)
class StoreConfig:
    budget: str = field(default="20%", metadata={"read": _budget})
    """Bytes on the device for experts: a size such as 2GiB, a share of all expert bytes, or auto."""
    policy: str = "lru"
    backing: Literal["shm", "file"] = "shm"
    """shm: the arena takes RAM. file: it lies on a disk, and RAM holds of it what there is room for."""
    directory: str | None = None
    """Where the arena lies; null: /dev/shm, or for a file the user's cache."""
    keep: bool = False
    """Leave the arena there for a warm start."""

    @property
    def arena_directory(self) -> Path:
        """`directory`, or the default of `backing`, which need not exist."""
        default = {"shm": Path("/dev/shm"), "file": cache_directory()}
        return Path(self.directory) if self.directory is not None else default[self.backing]


def cache_directory() -> Path:
    """Where arenas on a disk lie unless `store.directory` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sida-moe" / "arenas"


@dataclass(frozen=True)
class ParallelConfig:
    """Of several Executors, whether each expert belongs to one of them."""

    placement: str | None = None
    """null: every Executor may hold every expert. A policy (pipeline/parallel/placement.py): each expert belongs to one Executor,
    and tokens travel."""
    replicas: int = 0
    """So many experts of each MoE layer, those with the highest load, are on every Executor, and their tokens do not travel."""
    trace: str | None = None
    """What `trace.save` left: experts are placed by its loads. null: by those that the tables of the first batches expect."""
    timeout_s: float = 120.0
    """An Executor that keeps the others waiting longer is taken for lost."""


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None
    """null: a Ray of its own, or the one that RAY_ADDRESS names."""
    nodes: int | Literal["all"] = 1
    """Machines to use, each with a store and `executors`: those that are there, and those that join later, up to so many."""


@dataclass(frozen=True)
class BenchConfig:
    systems: list[str] = field(default_factory=lambda: ["ray", "in_process"])
    """Which are set side by side; docs/benchmarks.md describes them, pipeline/bench/systems.py makes them."""
    batch_sizes: list[int] = field(default_factory=list)
    """Empty: batch.size."""
    budgets: list[str] = field(default_factory=list)
    """Empty: store.budget."""
    batches: int | None = None
    """The first so many of each size; null: all."""
    rounds: int = 9
    """Each system answers all of them so often; rounds before these warm everything up."""
    capacity: float = 1.0
    """static-gating: places per expert, as a share of the batch's tokens; with all of them none is ever dropped."""
    placements: list[str] = field(default_factory=list)
    """parallel: one of it for each. Empty: parallel.placement, or greedy."""
    prompts: list[int] = field(default_factory=lambda: [32])
    """task generate: prompts of so many tokens, cut from the data one behind the other."""
    recall: float | None = None
    """Measure sida also with the true tables worsened: so many of their predictions are left right, 0..1."""


@dataclass(frozen=True)
class PlanConfig:
    trace: str | None = None
    """A recorded routing of this model: what `train` writes with predictor.kind=oracle. Without it bytes alone are planned."""
    budgets: list[str] = field(default_factory=lambda: ["0", "5%", "10%", "20%", "30%", "40%", "60%", "80%", "100%"])
    """Written as store.budget."""
    policies: list[str] = field(default_factory=list)
    """Empty: all."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    task: Literal["classify", "score", "generate"] = "classify"
    labels: dict[str, str] = field(default_factory=dict, metadata={"read": _labels})
    """classify: label in the data -> the word that a text-to-text model writes for it."""
    generate: Sampling = field(default_factory=Sampling)
    """generate: how much is written, and how tokens are chosen."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    """What `train` does; `run` ignores it."""
    trace: TraceConfig = field(default_factory=TraceConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    """What `bench` does; `run` ignores it."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What `plan` weighs; `run` ignores it."""
    routing: Literal["exact", "hash"] = "exact"
    """exact: the model's routers decide, tables are hints. hash: the tables decide, as in the paper."""
    store: StoreConfig = field(default_factory=StoreConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    executors: int = 1
    """On each machine. Each has a GPU of its own, if on one, and slots of its own under the same budget; all map one arena."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """What `executors: 2` and more share."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output_dir: str = "runs/default"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_config(path: Path, overrides: list[str]) -> Config:
    """Reads a YAML file and applies `key.path=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or an impossible value.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold keys such as `model:`, found {type(data).__name__}")
    for override in overrides:
        apply(data, override)
    config = parse(data, str(path))
    from pipeline.check_config import check_config  # here: it knows all policies and predictors, and with them torch, for seconds

    check_config(config, str(path))
    return config


def parse(data: dict[str, Any], source: str) -> Config:
    """A Config from plain data, types checked."""
    config = build(Config, data, source)
    assert isinstance(config, Config)
    return config
