"""One training step after another until the time is over, on a GPU each as one CUDA graph.

Knows a loss and a clock; nothing of what is learnt. The learning rate follows the clock, not a count of steps, so that a phase ends
annealed on a fast machine and on a slow one. A step that cannot be captured runs as it is, and that is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

Batch = tuple[torch.Tensor, ...]
Loss = Callable[[Batch], torch.Tensor]
CHECKED = 10
"""Steps between two looks at the clock."""


@dataclass(frozen=True)
class Phase:
    """Attributes:
    seconds: how long, capturing included.
    most: no more steps than this, should there be time for them.
    lr: the highest, reached after a twentieth of the time; it then falls to nothing in a straight line.
    embedding_lr: the same for the embeddings, as a multiple: their entries are of size 1, all others' about 0.1.
    graphs: whether to capture steps; only on a GPU.
    """

    name: str
    seconds: float
    lr: float
    weight_decay: float
    embedding_lr: float = 3.0
    graphs: bool = True
    most: float = float("inf")


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


class Steps:
    """A model, its optimizer, and for every shape of a batch a captured step."""

    def __init__(self, model: nn.Module, loss: Loss, phase: Phase, device: torch.device):
        self.model, self.loss, self.phase, self.device = model, loss, phase, device
        self.graphs = phase.graphs and device.type == "cuda"
        self.lr = torch.zeros((), device=device)
        self.embedding_lr = torch.zeros((), device=device)
        self.total = torch.zeros((), device=device)
        self.captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch]] = {}
        shared = {id(parameter) for name, parameter in model.named_parameters() if name.split(".")[-1] == "shared"}
        every = list(model.parameters())
        matrices = [p for p in every if p.dim() > 1 and id(p) not in shared]
        vectors = [p for p in every if p.dim() < 2]
        self.parameters = every
        cuda = {"fused": True, "capturable": True} if device.type == "cuda" else {}
        groups = [
            {"params": matrices, "lr": self.lr, "weight_decay": phase.weight_decay},
            {"params": vectors, "lr": self.lr, "weight_decay": 0.0},
            {"params": [p for p in every if id(p) in shared], "lr": self.embedding_lr, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(0.9, 0.98),
            eps=1e-8,
            **cuda,
        )

    def set(self, progress: float) -> None:
        lr = self.phase.lr * min(progress / 0.05, (1 - progress) / 0.95)
        self.lr.fill_(max(lr, 0.0))
        self.embedding_lr.fill_(max(lr, 0.0) * self.phase.embedding_lr)

    def step(self, batch: Batch) -> None:
        """One step; the loss is added to `total`."""
        key = tuple(part.shape for part in batch)
        if self.graphs and key not in self.captured:
            self._capture(key, batch)
        if key not in self.captured:
            self._plain(batch)
            return
        graph, inputs = self.captured[key]
        for held, new in zip(inputs, batch, strict=True):
            held.copy_(new)
        graph.replay()

    def _plain(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.total.add_(loss.detach())

    def _capture(self, key: tuple[torch.Size, ...], batch: Batch) -> None:
        inputs = tuple(part.clone() for part in batch)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._plain(inputs)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._plain(inputs)
            self.captured[key] = graph, inputs
        except RuntimeError as error:
            say(f"{self.phase.name}: no CUDA graph, steps run as they are: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            self.graphs = False
            self.captured.clear()


def run(steps: Steps, batches: Iterator[Batch], every_s: float = 10.0, watch: Callable[[], str] | None = None) -> dict[str, float]:
    """Trains for the phase's time; says how it goes every `every_s` seconds, with what `watch` measured.

    Returns:
        steps, rows and tokens (padding included) seen, seconds, and the mean loss since the last word.
    """
    phase = steps.phase
    started = said = time.monotonic()
    count = since = seen = tokens = 0
    loss = float("nan")
    steps.model.train()
    while True:
        if count % CHECKED == 0:
            if steps.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            progress = max((now - started) / phase.seconds, count / phase.most)
            if progress >= 1:
                break
            steps.set(progress)
            if now - said >= every_s:
                loss = steps.total.item() / max(count - since, 1)
                word = f"{phase.name} {progress:4.0%}: step {count}, loss {loss:.4f}, {tokens / (now - started):,.0f} tokens/s"
                if watch is not None:
                    steps.model.eval()
                    word += f", {watch()}"
                    steps.model.train()
                say(word)
                steps.total.zero_()
                said, since = time.monotonic(), count
        batch = next(batches)
        steps.step(batch)
        count, seen, tokens = count + 1, seen + len(batch[0]), tokens + batch[0].numel()
    if count > since:
        loss = steps.total.item() / (count - since)
    steps.model.eval()
    took = time.monotonic() - started
    say(f"{phase.name} done: {count} steps, {seen} rows, {tokens} tokens in {took:.0f} s, loss {loss:.4f}")
    return {"steps": count, "rows": seen, "tokens": tokens, "seconds": round(took, 1), "loss": loss}
