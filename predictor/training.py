"""Training by truncated knowledge distillation (SiDA-MoE, section 3.3).

Loss per MoE layer: ce_weight x cross-entropy with the router's choice + the distance between student and router over the router's T
most probable experts, both renormalised over those T + the squared error of the scaling factor (ours: hash routing needs its size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.functional import embedding as look_up

from predictor.accuracy import Accuracy, compare
from predictor.calibration import fit_temperature
from predictor.checkpoint import Checkpoint, Epoch, State
from predictor.hash_function import HashFunction, LSTMPredictor, pack
from predictor.hash_table import Width
from predictor.registry import HashPredictor
from predictor.settings import TrainSettings
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import LayerTrace, Trace, select


def split(tokens: TokenBatch, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers to train on, to choose and calibrate by, and to judge by, int64; at least one of each.

    Rows of equal tokens go the same way: what is judged by has not been seen. With too few of them the last two are the same.
    """
    same: dict[bytes, list[int]] = {}
    for row in range(tokens.size):
        same.setdefault(b"|".join(rows[row].tobytes() for rows in tokens.streams), []).append(row)
    groups = list(same.values())
    if len(groups) < 2:  # one text again and again
        groups = [[row] for row in range(tokens.size)]
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    held = min(max(1, round(len(groups) * holdout)), len(groups) - 1)

    def rows(part: list[list[int]]) -> np.ndarray:
        return np.array(sorted(row for group in part for row in group), dtype=np.int64)

    half = held - held // 2
    return rows(order[held:]), rows(order[:half]), rows(order[half:held] or order[:half])


class Learner(Protocol):
    """What is trained, and how it is judged meanwhile."""

    def parameters(self) -> dict[str, torch.nn.Parameter]: ...

    def loss(self, batch: Trace) -> torch.Tensor:
        """Of a batch of rows, with gradients."""

    def predictor(self) -> HashPredictor:
        """As it is now."""


def fit(
    learner: Learner,
    training: Trace,
    choosing: Trace,
    shape: RoutingShape,
    settings: TrainSettings,
    seed: int,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[float], None] = lambda loss: None,
    on_epoch: Callable[[int, Accuracy], None] = lambda epoch, accuracy: None,
) -> list[Epoch]:
    """Trains with AdamW, and leaves the learner as it was after the epoch that was best on `choosing`; returns all epochs.

    Args:
        checkpoint: where the state is kept after every epoch, and where an interrupted training of the same is taken up.
    """
    parameters = learner.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr)
    steps = -(-training.tokens.size // settings.batch_size)
    state = checkpoint.load(parameters, optimizer) if checkpoint is not None else None
    history = state.history if state is not None else []
    best = state.best if state is not None else {name: p.detach().clone() for name, p in parameters.items()}
    for epoch in range(len(history), settings.epochs):
        if _is_enough(history, settings.patience):
            break
        total = 0.0
        rng = np.random.default_rng([seed, epoch])
        for number, batch in enumerate(_batches(training, shape, settings.batch_size, rng)):
            share = (epoch * steps + number) / (settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (_one_cycle(share) if settings.schedule == "one_cycle" else 1)
            loss = learner.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            total += loss.item()
            on_step(loss.item())
        accuracy = evaluate(learner.predictor(), choosing, shape)
        on_epoch(epoch, accuracy)
        if not history or accuracy.mean_top1 > max(e.top1 for e in history):
            best = {name: p.detach().clone() for name, p in parameters.items()}
        history = [*history, Epoch(total / steps, accuracy.mean_top1, accuracy.mean_top3)]
        if checkpoint is not None:
            checkpoint.save(State(history, best), parameters, optimizer)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best[name])
    return history


def _one_cycle(share: float) -> float:
    """The learning rate after this share of all steps, as a part of the highest."""
    rise = 0.3
    if share < rise:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * share / rise)) / 2
    return (1 + math.cos(math.pi * (share - rise) / (1 - rise))) / 2


def _is_enough(history: list[Epoch], patience: int | None) -> bool:
    if patience is None or not history:
        return False
    best = max(range(len(history)), key=lambda i: history[i].top1)
    return len(history) - 1 - best >= patience


class LSTMLearner:
    """A hash function in training."""

    def __init__(self, shape: RoutingShape, embedding: torch.Tensor, settings: TrainSettings, seed: int):
        torch.manual_seed(seed)
        self.network = HashFunction(shape, embedding.shape[1], settings.hidden)
        self._shape, self._embedding, self._settings = shape, embedding, settings

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.network.named_parameters())

    def loss(self, batch: Trace) -> torch.Tensor:
        self.network.train()
        return distillation_loss(self.network, batch, self._shape, self._embedding, self._settings)

    def predictor(self) -> LSTMPredictor:
        return LSTMPredictor(self.network, self._shape, self._embedding, Width(3))


def distillation_loss(
    network: HashFunction, batch: Trace, shape: RoutingShape, embedding: torch.Tensor, settings: TrainSettings
) -> torch.Tensor:
    """The mean over MoE layers; every real token weighs the same, padding nothing."""
    ids, streams, visible = pack(batch.tokens)
    logits, scale = network(look_up(ids, embedding).float(), visible)
    losses = []
    for layer, stream in enumerate(shape.streams):
        mine = streams == stream
        losses.append(layer_loss(logits[layer][mine], scale[mine][:, layer], batch.layers[layer], settings))
    return torch.stack(losses).mean()


def layer_loss(logits: torch.Tensor, scale: torch.Tensor, truth: LayerTrace, settings: TrainSettings) -> torch.Tensor:
    """
    Args:
        logits: (tokens, experts).
        scale: (tokens,).
    """
    weight = torch.from_numpy(truth.weight.astype(np.float32))
    return order_loss(logits, truth, settings) + mse_loss(scale, weight)


def order_loss(logits: torch.Tensor, truth: LayerTrace, settings: TrainSettings) -> torch.Tensor:
    """What makes a student's logits, (tokens, experts), rank experts as the router does."""
    top = torch.from_numpy(truth.top[:, : settings.top_t].astype(np.int64)).to(logits.device)  # (tokens, T)
    teacher = torch.from_numpy(truth.probabilities[:, : settings.top_t].astype(np.float32)).to(logits.device)
    teacher = teacher / teacher.sum(dim=1, keepdim=True).clamp(min=1e-9)
    student = logits.gather(1, top).log_softmax(dim=1)
    distance = -(teacher * student).sum(dim=1).mean()  # KL up to the teacher's entropy, a constant
    return distance + settings.ce_weight * cross_entropy(logits, top[:, 0])


def evaluate(predictor: HashPredictor, trace: Trace, shape: RoutingShape, rows_at_once: int = 64) -> Accuracy:
    """Top-1 and top-3 of a predictor on a trace."""
    total = Accuracy()
    for part in _parts(trace, shape, rows_at_once):
        total.add(compare(predictor.predict(part.tokens), [layer.top[:, 0] for layer in part.layers]))
    return total


class HasLogits(Protocol):
    """A predictor that can be calibrated."""

    def logits(self, tokens: TokenBatch) -> list[np.ndarray]:
        """Per MoE layer, (tokens, experts)."""


def calibrate(predictor: HasLogits, trace: Trace, shape: RoutingShape, rows_at_once: int = 64) -> tuple[float, ...]:
    """A temperature for every MoE layer (`predictor.calibration`), from rows that the predictor was not trained on."""
    logits: list[list[np.ndarray]] = [[] for _ in range(shape.layers)]
    for part in _parts(trace, shape, rows_at_once):
        for found, layer in zip(logits, predictor.logits(part.tokens), strict=True):
            found.append(layer)
    chosen = [layer.top[:, : shape.top_k] for layer in trace.layers]
    return tuple(fit_temperature(np.concatenate(found), true) for found, true in zip(logits, chosen, strict=True))


def _parts(trace: Trace, shape: RoutingShape, rows_at_once: int) -> Iterator[Trace]:
    for start in range(0, trace.tokens.size, rows_at_once):
        yield select(trace, np.arange(start, min(start + rows_at_once, trace.tokens.size)), shape)


def _batches(trace: Trace, shape: RoutingShape, size: int, rng: np.random.Generator) -> Iterator[Trace]:
    """Shuffled batches of rows of similar length, so that little is padded."""
    lengths = np.sum(trace.tokens.lengths, axis=0)
    noisy = lengths * rng.uniform(0.9, 1.1, len(lengths))
    order = np.argsort(noisy)
    starts = np.arange(0, len(order), size)
    rng.shuffle(starts)
    for start in starts:
        yield select(trace, order[start : start + size], shape)
