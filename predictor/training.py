"""Training of the hash function by truncated knowledge distillation (SiDA-MoE, section 3.3).

Loss per MoE layer: ce_weight x cross-entropy with the router's choice + the distance between student and router over the router's T
most probable experts, both renormalised over those T + the squared error of the scaling factor (ours: hash routing needs its size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.functional import embedding as look_up

from predictor.accuracy import Accuracy, compare
from predictor.hash_function import HashFunction, LSTMPredictor, pack
from predictor.hash_table import Width
from predictor.registry import HashPredictor
from predictor.tokens import RoutingShape
from predictor.traces import TOP_T, LayerTrace, Trace, select


@dataclass(frozen=True)
class TrainSettings:
    """The paper trains with lr 5e-5, batch 64, ce_weight 0.005 "to converge"; these defaults get there in a few epochs."""

    epochs: int = 12
    lr: float = 3e-3
    batch_size: int = 64
    hidden: int = 128
    ce_weight: float = 0.005
    top_t: int = TOP_T
    holdout: float = 0.1
    """Share of rows that is never trained on and that every figure is measured on."""


def split(rows: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out, int64; at least one of each."""
    order = np.random.default_rng(seed).permutation(rows)
    held = min(max(1, round(rows * holdout)), rows - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def train(
    trace: Trace,
    held_out: Trace,
    shape: RoutingShape,
    embedding: torch.Tensor,
    settings: TrainSettings,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
    on_epoch: Callable[[int, Accuracy], None] = lambda epoch, accuracy: None,
) -> tuple[HashFunction, Accuracy]:
    """Trains a HashFunction; returns it as it was after the epoch that was best on `held_out`, and how good that was."""
    torch.manual_seed(seed)
    network = HashFunction(shape, embedding.shape[1], settings.hidden)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr)
    steps = settings.epochs * -(-trace.tokens.size // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    rng = np.random.default_rng(seed)
    best, best_state = Accuracy(), network.state_dict()
    for epoch in range(settings.epochs):
        network.train()
        for batch in _batches(trace, shape, settings.batch_size, rng):
            loss = distillation_loss(network, batch, shape, embedding, settings)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            on_step(loss.item())
        accuracy = evaluate(LSTMPredictor(network, shape, embedding, Width(3)), held_out, shape)
        on_epoch(epoch, accuracy)
        if epoch == 0 or accuracy.mean_top1 > best.mean_top1:
            best, best_state = accuracy, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(best_state)
    return network, best


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
    top = torch.from_numpy(truth.top[:, : settings.top_t].astype(np.int64))  # (tokens, T)
    teacher = torch.from_numpy(truth.probabilities[:, : settings.top_t].astype(np.float32))
    teacher = teacher / teacher.sum(dim=1, keepdim=True).clamp(min=1e-9)
    student = logits.gather(1, top).log_softmax(dim=1)
    distance = -(teacher * student).sum(dim=1).mean()  # KL up to the teacher's entropy, a constant
    weight = torch.from_numpy(truth.weight.astype(np.float32))
    return distance + settings.ce_weight * cross_entropy(logits, top[:, 0]) + mse_loss(scale, weight)


def evaluate(predictor: HashPredictor, trace: Trace, shape: RoutingShape, rows_at_once: int = 64) -> Accuracy:
    """Top-1 and top-3 of a predictor on a trace."""
    total = Accuracy()
    for start in range(0, trace.tokens.size, rows_at_once):
        part = select(trace, np.arange(start, min(start + rows_at_once, trace.tokens.size)), shape)
        total.add(compare(predictor.predict(part.tokens), [layer.top[:, 0] for layer in part.layers]))
    return total


def _batches(trace: Trace, shape: RoutingShape, size: int, rng: np.random.Generator) -> Iterator[Trace]:
    """Shuffled batches of rows of similar length, so that little is padded."""
    lengths = np.sum(trace.tokens.lengths, axis=0)
    noisy = lengths * rng.uniform(0.9, 1.1, len(lengths))
    order = np.argsort(noisy)
    starts = np.arange(0, len(order), size)
    rng.shuffle(starts)
    for start in starts:
        yield select(trace, order[start : start + size], shape)
