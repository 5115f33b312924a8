"""What a wrong prediction costs while a model writes: `python -m pipeline.bench.step_cost CONFIG.yaml [key.path=value ...]`

The config is of task generate; bench.batch_sizes, prompts, budgets, batches and rounds are heeded. Real text is forced, so that
every token's experts are known beforehand. Before each step the copy engine is told them, with a seeded share replaced by others
that the token does not need; routers are asked as always, and answers stay what they are. The shares take turns, round by round.
The next layer's router, asked a layer early, is left out: it would correct most names before they matter.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pipeline.bench.decoding import recorded, room, texts_of
from pipeline.bench.decoding_limit import Uses
from pipeline.bench.decoding_systems import Ours, Stand
from pipeline.bench.decoding_workload import Forced, Texts
from pipeline.config import Config, load_config
from pipeline.device import ExecutorSpec
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.executor import Executor
from pipeline.machine import hardware
from pipeline.predicting.next_layer import NextLayer
from pipeline.prepare import prepare
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from pipeline.tasks.generate import Generate
from predictor.registry import STEPPING
from predictor.stepping import Foresight
from predictor.stepping import Uses as Named
from predictor.tokens import RoutingShape, TokenBatch
from store.actor import ExpertStore

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Told(Foresight):
    """Knows a batch's steps beforehand, and says some of it wrong."""

    def __init__(self, shape: RoutingShape, uses: Uses, wrong: float, rng: np.random.Generator):
        """
        Args:
            uses: the batch's forwards, the prompt's first.
            wrong: the share of names that are replaced.
        """
        super().__init__(shape, None)
        self._steps, self._wrong, self._rng = iter(uses[1:]), wrong, rng
        self.named = self.replaced = 0

    def begin(self, prompt: TokenBatch, chosen: Sequence[np.ndarray]) -> None:
        pass

    def learn(self, chosen: Sequence[np.ndarray], awake: np.ndarray) -> None:
        pass

    def uses(self, tokens: np.ndarray, awake: np.ndarray) -> Named:
        step: Sequence[Sequence[int]] = next(self._steps, [()] * len(self._shape.experts))
        return [self._say(experts, count) for experts, count in zip(step, self._shape.experts, strict=True)]

    def _say(self, experts: Sequence[int], count: int) -> list[tuple[int, float]]:
        others = np.setdiff1d(np.arange(count), experts)
        wrong = self._rng.random(len(experts)) < self._wrong
        wrong &= np.cumsum(wrong) <= len(others)
        self.named += len(experts)
        self.replaced += int(wrong.sum())
        taken = iter(self._rng.permutation(others).tolist())
        return [(next(taken) if is_wrong else expert, 1.0) for expert, is_wrong in zip(experts, wrong, strict=True)]


class ToldExecutor(Executor):
    """An Executor that is told what its batches' steps will need."""

    def __init__(self, spec: ExecutorSpec):
        super().__init__(spec)
        self.telling: list[Told] = []  # of the batches to come, in their order

    def _foresight(self) -> Foresight | None:
        return self.telling.pop(0)


class Foretold(Ours):
    """Writes texts with the names of each step's experts, a share of them wrong."""

    def __init__(self, stand: Stand, wrong: float, seed: int):
        super().__init__(stand, stand.prepared.config.store.policy, predicts=True, executor=ToldExecutor)
        assert isinstance(self._executor, ToldExecutor)
        self._shape, self._wrong, self._rng = stand.prepared.model.shape, wrong, np.random.default_rng(seed)

    def measured(self, texts: Texts) -> dict[str, float]:
        """Per token: milliseconds (the mean of all steps), experts that crossed the link, names and wrong ones among them."""
        assert isinstance(self._executor, ToldExecutor)
        telling = [Told(self._shape, uses, self._wrong, self._rng) for uses in texts.uses]
        self._executor.telling = telling.copy()
        written = self.write(texts)
        assert written.moved is not None
        moves = sum(experts for _, _, experts in written.moved.copy_spans) + sum(written.moved.misses)
        counted, steps = telling[1:], texts.steps
        return {
            "ms": statistics.fmean(written.token_ms),
            "moves": moves / steps,
            "named": sum(told.named for told in counted) / steps,
            "wrong": sum(told.replaced for told in counted) / steps,
        }


def compare(config: Config) -> dict[str, Any]:
    """Writes step_cost.json after every budget and text length: what is cut short has not been for nothing.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    prepared = prepare(config)
    if not isinstance(prepared.task, Generate) or prepared.model.is_encoder_decoder:
        raise ConfigError("task: only a decoder that writes (task: generate) has steps")
    if config.predictor.kind not in STEPPING:
        raise ConfigError(f"predictor.kind: {config.predictor.kind} asks no routers while a model writes; take recent")
    texts = texts_of(config, prepared)
    report: dict[str, Any] = {"config": config.to_dict(), "hardware": hardware(prepared.device), "versions": versions(), "rows": []}
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    try:
        arena = store.open()
        texts = recorded(prepared, texts)
        sampling = replace(prepared.task.sampling, max_new_tokens=room(texts))
        task = Forced(**vars(prepared.task) | {"sampling": sampling, "stop": ()})
        stands = [Stand(prepared, arena, task, budget) for budget in config.bench.budgets]
        with patch.object(NextLayer, "reaches", lambda self, layer: False):
            for stand in stands:
                for some in texts:
                    report["rows"] += _rows(stand, some, config)
                    write_whole(output / "step_cost.json", json.dumps(report, indent=1) + "\n")
    finally:
        store.close(config.store.keep)
    return report


def _rows(stand: Stand, texts: Texts, config: Config) -> list[dict[str, Any]]:
    found: dict[float, list[dict[str, float]]] = {share: [] for share in SHARES}
    for number in range(config.bench.rounds):
        for share in SHARES if number % 2 else SHARES[::-1]:
            with closing(Foretold(stand, share, config.seed + number)) as writer:
                found[share].append(writer.measured(texts))
    medians = [{key: statistics.median(r[key] for r in found[share]) for key in found[share][0]} for share in SHARES]
    right = medians[0]
    print(f"batch {texts.size}, prompt {texts.prompt}, {stand.budget}:", flush=True)
    rows: list[dict[str, Any]] = []
    for share, median in zip(SHARES, medians, strict=True):
        row = {"batch": texts.size, "prompt": texts.prompt, "budget": stand.budget, "share": share} | median
        said = f"  {share:4.0%}  {median['wrong']:6.2f} of {median['named']:6.2f} names wrong  "
        said += f"{median['ms']:8.3f} ms, {median['moves']:7.2f} moves per token"
        if median["wrong"]:
            row["us_per_wrong_name"] = 1e3 * (median["ms"] - right["ms"]) / median["wrong"]
            row["moves_per_wrong_name"] = (median["moves"] - right["moves"]) / median["wrong"]
            said += f"; each {row['us_per_wrong_name']:.1f} us, {row['moves_per_wrong_name']:.2f} moves"
        print(said, flush=True)
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    """Returns the exit code, as runner.py's."""
    if not arguments:
        print("usage: python -m pipeline.bench.step_cost CONFIG.yaml [key.path=value ...]", file=sys.stderr)
        return 2
    try:
        config = load_config(Path(arguments[0]), arguments[1:])
        compare(config)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {Path(config.output_dir) / 'step_cost.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(lambda: main(sys.argv[1:])))
