"""A recorded routing played again: the batches of a config, what they used, and what its predictor would have said.

No weight is read, but for the input embeddings and routers of a checkpoint that lies here: a trained predictor needs the ones, and
is known by the others. Where the weights are elsewhere the true tables stand in for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data import Batch, cut
from pipeline.models import ModelSpec
from pipeline.plan.expected import Routed
from pipeline.regroup import Regrouping, chunks, rebuilt, regroup, row_tables, windows
from predictor import traces
from predictor.actor import Prediction, timed
from predictor.baselines import Oracle
from predictor.registry import HashPredictor, PredictorSpec, make
from predictor.rehearsal import Rehearse
from predictor.stand_ins import StandIns
from predictor.tokens import RoutingShape
from predictor.traces import Trace
from store.errors import CheckpointError
from store.load import routers_identity
from store.weights import Weights


@dataclass(frozen=True)
class Recorded:
    """A trace in the batches of a config.

    Attributes:
        parts: the routing of each batch.
        tables: whose predictions `routed` has.
    """

    batches: list[Batch]
    parts: list[Trace]
    routed: Routed
    tables: str
    predict_s: float
    """How long their making takes."""

    def first(self, count: int) -> Recorded:
        """Only so many batches, from the beginning on, as they follow each other."""
        routed = self.routed
        batches, share = self.batches[:count], min(1.0, count / len(self.batches))
        rows = sum(len(batch.rows) for batch in batches)
        sample = replace(routed, samples=rows, uses=routed.uses[:count], predicted=routed.predicted[:count])
        return Recorded(batches, self.parts[:count], sample, self.tables, self.predict_s * share)


def replay(config: Config, model: ModelSpec) -> Recorded:
    """The rows of `plan.trace` in the batches that a run over them would have, and the tables that it would make.

    Raises:
        PredictorError: the trace, or the predictor's file, cannot be used.
    """
    shape = model.shape
    trace = traces.load(Path(config.plan.trace or ""), shape, None)
    maker, tables = _predictor(config, model, trace)
    batches = [
        _batch(trace, i, rows, shape) for i, rows in enumerate(cut([len(row) for row in trace.tokens.streams[0]], config.batch))
    ]
    made = _predicted(maker, batches, Regrouping(config.batch, shape, config.routing))
    parts = [traces.select(trace, batch.rows, shape) for batch, _ in made]
    uses = [[np.unique(layer.top[:, : shape.top_k]).tolist() for layer in part.layers] for part in parts]
    predicted = [prediction.table.uses_under(config.routing) for _, prediction in made]
    seconds = sum(prediction.end - prediction.start for _, prediction in made) / 1e9
    routed = Routed(trace.tokens.size, shape.experts, uses, predicted, config.predictor.lookahead)
    return Recorded([batch for batch, _ in made], parts, routed, tables, seconds)


def _batch(trace: Trace, index: int, rows: np.ndarray, shape: RoutingShape) -> Batch:
    tokens = traces.select(trace, rows, shape).tokens
    return Batch(index, rows, tokens, tokens.streams[1] if len(tokens.streams) > 1 else None)


def _predicted(maker: HashPredictor, batches: list[Batch], settings: Regrouping) -> list[tuple[Batch, Prediction]]:
    """As the Predictor makes them, in one thread; with `batch.order: overlap` other batches, as the driver makes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if settings.batch.order != "overlap":
            return [(batch, timed(maker, batch.tokens)) for batch in batches]
        made = []
        for window in windows(batches, settings.batch):
            parts = chunks(window)
            predictions = [timed(maker, tokens) for tokens in parts]
            tables = row_tables(parts, [prediction.table for prediction in predictions], settings.shape)
            share = sum(prediction.end - prediction.start for prediction in predictions) // len(window)
            grouped = rebuilt(window, regroup(window, tables, settings), tables)
            made += [(batch, Prediction(table, 0, share)) for batch, table in grouped]
        return made
    finally:
        torch.set_num_threads(threads)


def _predictor(config: Config, model: ModelSpec, trace: Trace) -> tuple[HashPredictor, str]:
    """What makes the run's tables; the truth where that has no file yet, or where the weights that it reads are elsewhere."""
    wanted = config.predictor
    named = wanted.named(model.shape.top_k)
    truth = Oracle(trace, model.shape, named)
    if wanted.kind == "oracle":
        return truth, "the true tables"
    if wanted.kind == "rehearsal":
        return truth, "the true tables, since a rehearsal needs the model in memory"
    if wanted.kind != "random" and wanted.path is None:
        return truth, "the true tables, since predictor.path is null"
    path = Path(wanted.path) if wanted.path is not None else None
    try:
        weights = model.source.open()
        identity = routers_identity(weights, model.placement)
    except CheckpointError:
        return truth, f"the true tables, since the weights that {wanted.kind} needs are not here"
    spec = PredictorSpec(wanted.kind, path, named, model.shape, identity, config.seed, wanted.mass)
    return make(spec, _Headers(weights, model)), f"the tables of {wanted.kind}"


@dataclass(frozen=True)
class _Headers:
    """What predictors may ask of a model whose weights lie on a disk (predictor.registry.Model)."""

    weights: Weights
    model: ModelSpec

    def embedding(self) -> torch.Tensor:
        return self.weights.read(self.model.placement.backbone[self.model.embedding]).float()

    def rehearser(self, stand_ins: StandIns, device: str) -> Rehearse:
        raise AssertionError("the truth stands in for it")
