"""`train`: traces a model over a data set and trains the predictor that the config names.

One process, no Ray: the same Executor class that serves, with a budget, records what the routers decide. Whoever has
a trace already, that of a run say, starts from that (`trace.load`).
"""

from __future__ import annotations

import hashlib
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.executor import Executor
from pipeline.predicting import stand_ins
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.predicting.training_curve import training_curve
from pipeline.prepare import Prepared, prepare
from pipeline.progress import bar
from pipeline.reports.output import check_writable
from predictor import traces
from predictor.accuracy import Accuracy
from predictor.calibration import Calibration
from predictor.checkpoint import Checkpoint
from predictor.distil import Distillation
from predictor.hash_function import LSTMPredictor
from predictor.hash_table import Width
from predictor.registry import save_lstm, save_token_table
from predictor.rehearsal import Rehearsal
from predictor.stand_ins import StandIns
from predictor.stand_ins import save as save_stand_ins
from predictor.token_table import TokenTable
from predictor.training import Learner, LSTMLearner, calibrate, evaluate, fit, split
from store.actor import ExpertStore
from store.arena import Arena

TRAINED = ("lstm", "token_table", "rehearsal", "oracle")


def train(config: Config) -> Accuracy:
    """Traces, trains and writes `predictor.path`; returns the accuracy on rows that had no part in it.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    if config.predictor.kind not in TRAINED:
        raise ConfigError(f"predictor.kind: {config.predictor.kind} is not trained; trained are {', '.join(TRAINED)}")
    if config.task == "generate":
        raise ConfigError("task: train traces one forward per batch; write `task: score`, the predictor then serves both")
    if config.predictor.path is None:
        raise ConfigError("predictor.path: train needs to know where to write")
    path = Path(config.predictor.path)
    check_writable(path, "predictor.path")
    if config.trace.save is not None:
        check_writable(Path(config.trace.save), "trace.save")
    prepared = prepare(replace(config, predictor=replace(config.predictor, path=None)))  # it is to be made, not read
    if len(prepared.rows) < 2 and config.predictor.kind != "oracle" and config.trace.load is None:
        raise DataError(f"{config.data.path}: holds one row; training needs two or more, some of them held out")
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    try:
        with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
            store.open(shown.update)
        arena = Arena.attach(prepared.arena)
        assert arena is not None, "the store keeps it"
        with closing(arena):
            return _train(prepared, arena, _trace(prepared, arena), path)
    finally:
        store.close(config.store.keep)


def _trace(prepared: Prepared, arena: Arena) -> traces.Trace:
    """As `trace.load` says, or recorded now."""
    config, shape = prepared.config.trace, prepared.model.shape
    trace = record(prepared) if config.load is None else traces.load(Path(config.load), shape, arena.identity)
    if trace.tokens.size < 2 and prepared.config.predictor.kind != "oracle":
        raise DataError(f"{config.load}: holds one row; training needs two or more, some of them held out")
    if config.load is None and (config.save is not None or prepared.config.predictor.kind == "oracle"):
        # What is kept is in the order of the input: whoever plays it again cuts batches of its own.
        trace = traces.select(trace, np.argsort(np.concatenate([batch.rows for batch in prepared.batches])), shape)
    if config.save is not None:
        traces.save(trace, Path(config.save), shape, arena.identity)
        print(f"saved the trace: {config.save}")
    return trace


def record(prepared: Prepared) -> traces.Trace:
    """The routing of every row, in the order of the file's batches."""
    parts = []
    with closing(Executor(prepared.executor_spec())) as executor, bar("tracing", len(prepared.rows)) as shown:
        for batch in prepared.batches:
            parts.append(executor.trace(batch, traces.TOP_T))
            shown.update(len(batch.rows))
    return traces.join(parts)


def _train(prepared: Prepared, arena: Arena, trace: traces.Trace, path: Path) -> Accuracy:
    config, shape, kind = prepared.config, prepared.model.shape, prepared.config.predictor.kind
    if kind == "oracle":
        traces.save(trace, path, shape, arena.identity)
        print(f"recorded {trace.tokens.size} rows: {path} ({path.stat().st_size / 1e6:.2f} MB)")
        return Accuracy()
    rows, choose, judge = split(trace.tokens, config.train.holdout, config.seed)
    parts = [traces.select(trace, part, shape) for part in (rows, choose, judge)]
    start = time.perf_counter()
    if kind == "token_table":
        table = TokenTable.fit(parts[0], shape, Width(3))
        accuracy = evaluate(table, parts[2], shape)
        save_token_table(table, path, arena.identity, _calibration((1.0,) * shape.layers, accuracy))
    elif kind == "lstm":
        embedding = ArenaModel(prepared.model, prepared.arena).embedding()
        learner = LSTMLearner(shape, embedding, config.train, config.seed)
        _fit(prepared, learner, parts, path, arena)
        lstm = LSTMPredictor(learner.network, shape, embedding, Width(3))
        accuracy = evaluate(lstm, parts[2], shape)
        save_lstm(learner.network, path, shape, arena.identity, _calibration(calibrate(lstm, parts[1], shape), accuracy))
    else:
        made, accuracy = _stand_ins(prepared, arena, parts, path)
        save_stand_ins(made, path, arena.identity)
    _say_accuracy(kind, accuracy, [len(part) for part in (rows, choose, judge)], time.perf_counter() - start)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB); use it with predictor.path={path}")
    return accuracy


def _stand_ins(prepared: Prepared, arena: Arena, parts: list[traces.Trace], path: Path) -> tuple[StandIns, Accuracy]:
    """Made, distilled if they can be, calibrated, and judged."""
    assert prepared.stand_ins is not None
    shape, device = prepared.model.shape, torch.device(prepared.device)
    model = ArenaModel(prepared.model, prepared.arena, arena)
    made = stand_ins.make(prepared.stand_ins, arena, prepared.device)
    _say_stand_ins(prepared, made)

    def rehearsal(of: StandIns) -> Rehearsal:
        return Rehearsal(model.rehearser(of, prepared.device), None, shape, Width(3))

    if made.nbytes:
        before = evaluate(rehearsal(made), parts[1], shape)
        print(f"undistilled, held out: {_both(before)}")

        def under_way(of: StandIns) -> tuple:
            rehearser = model.rehearser(of, prepared.device)
            return rehearser.logits, Rehearsal(rehearser, None, shape, Width(3))

        learner = Distillation(made.to(device), under_way, shape, prepared.config.train)
        _fit(prepared, learner, parts, path, arena)
        distilled = learner.stand_ins()
        if evaluate(rehearsal(distilled), parts[1], shape).mean_top1 > before.mean_top1:
            made = distilled
        else:
            print("no epoch came up to that: the stand-ins are left undistilled")
    judged = rehearsal(made)
    accuracy = evaluate(judged, parts[2], shape)
    return replace(made, calibration=_calibration(calibrate(judged, parts[1], shape), accuracy)), accuracy


def _fit(prepared: Prepared, learner: Learner, parts: list[traces.Trace], path: Path, arena: Arena) -> None:
    """Trains, shows how it goes, and draws the curve; what was interrupted goes on where it stood."""
    config, training = prepared.config, parts[0]
    checkpoint = Checkpoint(path.with_name(f".{path.name}.training"), _identity(config, parts, arena))
    steps = -(-training.tokens.size // config.train.batch_size)
    with bar("training", config.train.epochs * steps, unit="step") as shown:

        def on_step(loss: float) -> None:
            shown.set_postfix(loss=f"{loss:.3f}")
            shown.update()

        def on_epoch(epoch: int, accuracy: Accuracy) -> None:
            shown.update((epoch + 1) * steps - shown.n)  # one that was taken up begins in the middle
            tqdm.write(f"epoch {epoch + 1:>3}/{config.train.epochs}  held out: {_both(accuracy)}")

        history = fit(learner, training, parts[1], prepared.model.shape, config.train, config.seed, checkpoint, on_step, on_epoch)
    if len(history) < config.train.epochs:
        print(f"ended after {len(history)} epochs: none of the last {config.train.patience} was better than the one before them")
    curve = path.with_suffix(".curve.svg")
    curve.write_text(training_curve(history))
    print(f"drew {curve}")
    checkpoint.remove()


def _identity(config: Config, parts: list[traces.Trace], arena: Arena) -> str:
    """Of a training: another model, trace or setting gives another."""
    digest = hashlib.sha256(arena.path.name.encode())
    digest.update(repr((asdict(config.train), asdict(config.predictor.stand_ins), config.predictor.kind, config.seed)).encode())
    for part in parts:
        digest.update(np.concatenate([part.tokens.flat(s) for s in range(len(part.tokens.streams))]).tobytes())
        digest.update(b"".join(layer.top.tobytes() for layer in part.layers))
    return digest.hexdigest()[:16]


def _calibration(temperatures: tuple[float, ...], accuracy: Accuracy) -> Calibration:
    rates = accuracy.rates()
    return Calibration(temperatures, tuple(rates["top1"]), tuple(rates["top3"]))


def _say_stand_ins(prepared: Prepared, made: StandIns) -> None:
    whole, rank = prepared.layout.expert_bytes, f" of rank {made.rank}" if made.rank else ""
    print(f"{made.method} stand-ins{rank}: {made.nbytes / 1e6:.2f} MB, {made.nbytes / whole:.1%} of all experts' bytes")


def _both(accuracy: Accuracy) -> str:
    return f"top-1 {accuracy.mean_top1:.1%}  top-3 {accuracy.mean_top3:.2%}"


def _say_accuracy(kind: str, accuracy: Accuracy, rows: list[int], seconds: float) -> None:
    trained, chose, judged = rows
    print(f"{kind}: trained on {trained} rows in {seconds:.1f} s, chosen and calibrated on {chose}, judged on {judged} others")
    rates = accuracy.rates()
    for layer, (top1, top3) in enumerate(zip(rates["top1"], rates["top3"], strict=True)):
        print(f"  MoE layer {layer}: top-1 {top1:.1%}  top-3 {top3:.2%}")
