"""What a config's types cannot say: which values go together, and which make no sense. config.py says what there is to set."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.parallel.placement import PLACEMENTS
from pipeline.weights.recipes import RECIPES
from predictor.registry import KINDS, SILENT
from store.eviction import POLICIES

if TYPE_CHECKING:
    from pipeline.config import Config


def check_config(config: Config, source: str) -> None:
    """
    Args:
        source: the file, for messages.

    Raises:
        ConfigError: an impossible value, or one that does not go with another.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{source}: {message}")

    model = config.model
    if model.path is not None:
        require(model.config is None, "'model' has a path and a config; it must have one of them")
        require(model.random.recipe is None, "'model.random' goes with 'model.config'; 'model.path' has weights of its own")
    else:
        require(model.config is not None, "'model.path' is missing; or, for random weights, 'model.config'")
        require(model.random.recipe is not None, f"'model.random.recipe' is missing; known: {', '.join(RECIPES)}")
        require(
            model.tokenizer is not None,
            "'model.tokenizer' is missing: random weights come with none; name a directory, or a hub id such as google-t5/t5-base",
        )
    require(config.data.path is not None or config.data.hub is not None, "'data.path' is missing")
    choices: list[tuple[str, str | None, Iterable[str]]] = [
        ("model.random.recipe", model.random.recipe, RECIPES),
        ("predictor.kind", config.predictor.kind, KINDS),
        ("store.policy", config.store.policy, POLICIES),
        ("parallel.placement", config.parallel.placement, PLACEMENTS),
        *(("bench.placements", placement, PLACEMENTS) for placement in config.bench.placements),
        *(("plan.policies", policy, POLICIES) for policy in config.plan.policies),
    ]
    for key, kind, known in choices:
        if kind is None:
            continue
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        require(kind in known, f"{key}: there is no {kind!r}; {hint}")
    positive = {
        "batch.size": config.batch.size,
        "batch.max_tokens": config.batch.max_tokens,
        "batch.window": config.batch.window,
        "executors": config.executors,
        "cluster.nodes": 1 if config.cluster.nodes == "all" else config.cluster.nodes,
        "predictor.top_k": 1 if config.predictor.top_k is None else config.predictor.top_k,
        "predictor.lookahead": 1 if config.predictor.lookahead == "auto" else config.predictor.lookahead,
        "data.limit": 1 if config.data.limit is None else config.data.limit,
        "train.epochs": config.train.epochs,
        "train.patience": 1 if config.train.patience is None else config.train.patience,
        "train.batch_size": config.train.batch_size,
        "train.hidden": config.train.hidden,
        "train.top_t": config.train.top_t,
        "train.lr": config.train.lr,
        "parallel.timeout_s": config.parallel.timeout_s,
        "bench.rounds": config.bench.rounds,
        "bench.batches": 1 if config.bench.batches is None else config.bench.batches,
        "bench.batch_sizes": min(config.bench.batch_sizes, default=1),
        "bench.prompts": min(config.bench.prompts, default=0),
    }
    for key, value in positive.items():
        require(value > 0, f"{key!r} is {value}; it must be more than 0")
    mass = config.predictor.mass
    require(mass is None or 0 < mass <= 1, f"'predictor.mass' is {mass}; it must be more than 0 and at most 1")
    recall = config.bench.recall
    require(recall is None or 0 <= recall <= 1, f"'bench.recall' is {recall}; it must be between 0 and 1")
    capacity = config.bench.capacity
    require(0 < capacity <= 1, f"'bench.capacity' is {capacity}; it must be more than 0 and at most 1")
    require(math.isfinite(config.train.lr), f"'train.lr' is {config.train.lr}; it must be finite")
    for key, seed in (("seed", config.seed), ("model.random.seed", model.random.seed)):
        require(0 <= seed < 2**63, f"{key!r} is {seed}; it must be 0 or more, and below 2**63")
    require(0 < config.train.holdout < 1, f"'train.holdout' is {config.train.holdout}; it must be between 0 and 1")
    require(config.train.ce_weight >= 0, f"'train.ce_weight' is {config.train.ce_weight}; it must not be negative")
    if isinstance(config.data.text, list):
        require(len(config.data.text) in (1, 2, 3), f"'data.text' names {len(config.data.text)} columns; it must be one to three")
    require(config.generate.problem() is None, config.generate.problem() or "")
    shared = config.parallel.placement is not None
    require(config.parallel.replicas >= 0, f"'parallel.replicas' is {config.parallel.replicas}; it must be 0 or more")
    require(math.isfinite(config.parallel.timeout_s), f"'parallel.timeout_s' is {config.parallel.timeout_s}; it must be finite")
    require(not shared or config.executors > 1, "'parallel.placement' shares experts out, and 'executors' is 1; give it 2 or more")
    one_machine = config.cluster.nodes == 1
    require(not shared or one_machine, "'parallel.placement' shares experts out on one machine; write cluster.nodes=1")
    for key, given in (("replicas", config.parallel.replicas > 0), ("trace", config.parallel.trace is not None)):
        require(shared or not given, f"'parallel.{key}' is about experts that are shared out; it goes with 'parallel.placement'")
    kind = config.predictor.kind
    makes_tables = kind not in SILENT
    require(makes_tables or config.routing == "exact", f"'routing: hash' needs tables, and 'predictor.kind: {kind}' makes none")
    if config.task == "classify":
        require(len(config.labels) >= 2, "'labels' must name at least two labels for task classify")
