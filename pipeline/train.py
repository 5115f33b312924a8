"""`train`: traces a model over a data set and trains the predictor that the config names.

One process, no Ray: the same Executor class that serves, with a budget, records what the routers decide.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.executor import Executor
from pipeline.models import load_embedding
from pipeline.prepare import Prepared, prepare
from pipeline.progress import bar
from predictor import traces
from predictor.accuracy import Accuracy
from predictor.registry import save_lstm, save_token_table
from predictor.token_table import TokenTable
from predictor.tokens import RoutingShape
from predictor.training import evaluate, split
from predictor.training import train as train_network
from store.actor import ExpertStore

TRAINED = ("lstm", "token_table", "oracle")


def train(config: Config) -> Accuracy:
    """Traces, trains and writes `predictor.path`; returns the accuracy on held-out rows.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    if config.predictor.kind not in TRAINED:
        raise ConfigError(f"predictor.kind: {config.predictor.kind} is not trained; trained are {', '.join(TRAINED)}")
    if config.task == "generate":
        raise ConfigError("task: train traces one forward per batch; write `task: score`, the predictor then serves both")
    if config.predictor.path is None:
        raise ConfigError("predictor.path: train needs to know where to write")
    _check_writable(Path(config.predictor.path))
    prepared = prepare(config)
    if len(prepared.rows) < 2 and config.predictor.kind != "oracle":
        raise DataError(f"{config.data.path}: holds one row; training needs two or more, some of them held out")
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
        arena = store.open(shown.update)
    try:
        trace = record(prepared)
        embedding = load_embedding(arena.path, prepared.model.embedding)
    finally:
        store.close(config.store.keep)
    if config.predictor.kind == "oracle":  # in the order of the input: whoever plays it again cuts batches of its own
        order = np.argsort(np.concatenate([batch.rows for batch in prepared.batches]))
        trace = traces.select(trace, order, prepared.model.shape)
    return _fit(config, prepared.model.shape, arena.identity, trace, embedding)


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir():
        raise ConfigError(f"predictor.path: {path} is a directory; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise ConfigError(f"predictor.path: {path.parent}: {error.strerror}") from None
    if not writable:
        raise ConfigError(f"predictor.path: {path.parent} cannot be written to")


def record(prepared: Prepared) -> traces.Trace:
    """The routing of every row, in the order of the file's batches."""
    executor = Executor(prepared.executor_spec())
    parts = []
    with bar("tracing", len(prepared.rows)) as shown:
        for batch in prepared.batches:
            parts.append(executor.trace(batch, traces.TOP_T))
            shown.update(len(batch.rows))
    executor.close()
    return traces.join(parts)


def _fit(config: Config, shape: RoutingShape, identity: str, trace: traces.Trace, embedding: torch.Tensor) -> Accuracy:
    path, kind = Path(config.predictor.path or ""), config.predictor.kind
    if kind == "oracle":
        traces.save(trace, path, shape, identity)
        print(f"recorded {trace.tokens.size} rows: {path} ({path.stat().st_size / 1e6:.2f} MB)")
        return Accuracy()
    rows, held = split(trace.tokens.size, config.train.holdout, config.seed)
    training, held_out = traces.select(trace, rows, shape), traces.select(trace, held, shape)
    start = time.perf_counter()
    if kind == "token_table":
        table = TokenTable.fit(training, shape, top_k=3)
        accuracy = evaluate(table, held_out, shape)
        save_token_table(table, path, identity, accuracy.rates())
    else:
        steps = config.train.epochs * -(-len(rows) // config.train.batch_size)
        with bar("training", steps, unit="step") as shown:

            def on_step(loss: float) -> None:
                shown.set_postfix(loss=f"{loss:.3f}")
                shown.update()

            network, accuracy = train_network(
                training,
                held_out,
                shape,
                embedding,
                config.train,
                config.seed,
                on_step=on_step,
                on_epoch=partial(_say_epoch, config.train.epochs),
            )
        save_lstm(network, path, shape, identity, accuracy.rates())
    _say_accuracy(kind, accuracy, len(rows), len(held), time.perf_counter() - start)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB); use it with predictor.path={path}")
    return accuracy


def _say_epoch(epochs: int, epoch: int, accuracy: Accuracy) -> None:
    top1, top3 = accuracy.mean_top1, accuracy.mean_top3
    tqdm.write(f"epoch {epoch + 1:>3}/{epochs}  held out: top-1 {top1:.1%}  top-3 {top3:.1%}")


def _say_accuracy(kind: str, accuracy: Accuracy, trained: int, held: int, seconds: float) -> None:
    print(f"{kind}: trained on {trained} rows in {seconds:.1f} s, judged on {held} held out")
    rates = accuracy.rates()
    for layer, (top1, top3) in enumerate(zip(rates["top1"], rates["top3"], strict=True)):
        print(f"  MoE layer {layer}: top-1 {top1:.1%}  top-3 {top3:.1%}")
