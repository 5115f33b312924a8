"""What the paper measures of a model and its predictors, on one data set: answers whole, exact and by tables; hits; memory; cost.

In one process, without Ray: the Executor and the predictors that serve, and transformers' whole model on the same weights. Knows
nothing of how figures are printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipeline.bench.whole import Transformers, whole_model
from pipeline.config import Config
from pipeline.data import Batch
from pipeline.executor import Executor
from pipeline.inputs import Result
from pipeline.prepare import Prepared, own_predictor, prepare
from pipeline.progress import bar
from pipeline.reports.metrics import fidelity
from predictor import traces
from predictor.accuracy import Accuracy, compare
from predictor.actor import Prediction, timed
from predictor.hash_table import split
from predictor.registry import HashPredictor
from predictor.traces import Trace
from store.actor import ExpertStore
from store.arena import Arena


@dataclass(frozen=True)
class Memory:
    """One text: its tokens, and the shares of all experts' bytes that it really uses and that its table names."""

    tokens: int
    used: float
    named: float


@dataclass
class Predicted:
    """What one predictor comes to.

    Attributes:
        accuracy: of its tables against the model's own routers.
        ms: median per batch, wall time.
        stand_in_bytes: as a share of all experts' bytes.
        fidelity: hash routing beside exact; empty if it was not asked for.
    """

    accuracy: Accuracy
    ms: float
    stand_in_bytes: float
    memory: list[Memory]
    fidelity: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """Of one row of a sheet.

    Attributes:
        whole, exact: the task's own measures, of transformers' whole model (empty if not asked for) and of exact routing.
        difference: the largest between an output of the two, as a share of the largest output.
        predicted: by the predictor's name.
    """

    whole: dict[str, float]
    exact: dict[str, float]
    difference: float
    predicted: dict[str, Predicted]


@contextmanager
def opened(prepared: Prepared) -> Iterator[Arena]:
    """The model's arena, placed if nobody has."""
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    try:
        arena = Arena.attach(prepared.arena)
        assert arena is not None, "the store keeps it"
        with closing(arena):
            yield arena
    finally:
        store.close(prepared.config.store.keep)


def measure(config: Config, predictors: dict[str, Config], answers: bool) -> Measured:
    """
    Args:
        config: without a predictor.
        predictors: the same config with each.
        answers: whether whole, exact and hash routing are run for what they answer; otherwise routers are traced alone.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    prepared = prepare(config)
    with opened(prepared) as arena:
        spec = replace(prepared.executor_spec(), top_t=traces.TOP_T)
        whole, difference = {}, 0.0
        with closing(Executor(spec)) as executor:
            exact, truth = _exactly(executor, prepared.batches)
            if answers:
                results = _whole(prepared, arena)
                whole, difference = prepared.task.quality(prepared.rows, results), _difference(results, exact)
            predicted = {}
            for name, own in predictors.items():
                mine = prepare(own)
                predictor = own_predictor(mine, arena.identity)
                found, predictions = _predicted(predictor, mine, truth)
                if answers:
                    hashed = _by_tables(executor, prepared.batches, predictions)
                    qualities = (prepared.task.quality(prepared.rows, rows) for rows in (exact, hashed))
                    found.fidelity = fidelity(exact, hashed, *qualities)
                predicted[name] = found
    return Measured(whole, prepared.task.quality(prepared.rows, exact), difference, predicted)


def _exactly(executor: Executor, batches: list[Batch]) -> tuple[list[Result], list[Trace]]:
    done = [executor.execute(batch, None) for batch in _shown("exact routing", batches)]
    return _in_order([result.results for result in done]), [result.trace for result in done if result.trace is not None]


def _by_tables(executor: Executor, batches: list[Batch], predictions: list[Prediction]) -> list[Result]:
    pairs = zip(_shown("hash routing", batches), predictions, strict=True)
    return _in_order([executor.execute(batch, prediction, "hash").results for batch, prediction in pairs])


def _whole(prepared: Prepared, arena: Arena) -> list[Result]:
    device = torch.device(prepared.device)
    model = whole_model(prepared.model, arena.layout, arena.memory.to(device), device)
    outputs = Transformers(model, prepared.task, device).run(prepared.batches).outputs
    pairs = zip(prepared.batches, outputs, strict=True)
    return _in_order([prepared.task.results(batch, torch.from_numpy(output)) for batch, output in pairs])


def _predicted(predictor: HashPredictor, prepared: Prepared, truth: list[Trace]) -> tuple[Predicted, list[Prediction]]:
    shape, whole = prepared.model.shape, prepared.layout.expert_bytes
    accuracy, predictions, memory = Accuracy(), [], []
    for batch, trace in zip(_shown(prepared.config.predictor.kind, prepared.batches), truth, strict=True):
        predictions.append(timed(predictor, batch.tokens))
        table = predictions[-1].table
        accuracy.add(compare(table, [layer.top[:, 0] for layer in trace.layers]))
        for row, one in enumerate(split(table, batch.tokens, shape.streams)):
            true = [layer.top[:, : shape.top_k] for layer in traces.select(trace, np.array([row]), shape).layers]
            sizes = [layer.block.nbytes for layer in prepared.layout.layers]
            used, named = (_bytes(layers, sizes) / whole for layers in (true, one.experts))
            memory.append(Memory(len(batch.tokens.streams[0][row]), used, named))
    ms = statistics.median((prediction.end - prediction.start) / 1e6 for prediction in predictions)
    return Predicted(accuracy, ms, prepared.stand_in_bytes / whole, memory), predictions


def _bytes(layers: list[np.ndarray] | tuple[np.ndarray, ...], sizes: list[int]) -> int:
    """Of the different experts in each layer."""
    return sum(len(np.unique(experts[experts >= 0])) * size for experts, size in zip(layers, sizes, strict=True))


def _difference(a: list[Result], b: list[Result]) -> float:
    outputs: Callable[[list[Result]], np.ndarray] = lambda rows: np.array([r.get("scores", r.get("logprob")) for r in rows])  # noqa: E731
    return float(np.abs(outputs(a) - outputs(b)).max() / max(1.0, np.abs(outputs(a)).max()))


def _in_order(results: list[list[Result]]) -> list[Result]:
    return sorted((row for rows in results for row in rows), key=lambda row: row["index"])


def _shown(what: str, batches: list[Batch]) -> Iterator[Batch]:
    with bar(what, sum(len(batch.rows) for batch in batches)) as shown:
        for batch in batches:
            yield batch
            shown.update(len(batch.rows))
