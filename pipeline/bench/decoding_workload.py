"""What `bench` writes on: real text cut into prompts and what follows them, how it is routed, and what each token must move.

What follows a prompt is forced: left to itself a model of random weights repeats one token, and its experts with it. So the routing
of a text is that of one forward over all of it, and the same for every system. A text's last forwards are its steps: the prompt is
one forward, and every forced token but the last is read by one more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.bench.decoding_limit import Uses
from pipeline.data import Batch
from pipeline.errors import DataError
from pipeline.inputs import Inputs, Result, padded_inputs
from pipeline.tasks.generate import Generate
from pipeline.tasks.score import ScoreText
from pipeline.tasks.writing import Steps
from predictor.tokens import TokenBatch
from predictor.traces import Trace


class Forced(Generate):
    """Writes a batch's targets, and answers how likely the model found each of them (pipeline.tasks.registry.Task)."""

    def inputs(self, batch: Batch, padded: object) -> Inputs:
        """Not padded further: how many tokens a text has is part of what is measured."""
        assert batch.targets is not None
        inputs = padded_inputs(batch, self.pad, lambda longest: longest, left=True)
        return inputs | {"forced": torch.from_numpy(np.stack(batch.targets))}

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        """float32 (batch, forced tokens): logarithms of their probabilities."""
        return torch.stack(self.write(model, inputs, steps, inputs["forced"]).logprobs, dim=1).cpu()

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return [{"index": int(row), "scores": said} for row, said in zip(batch.rows, outputs.tolist(), strict=True)]


@dataclass(frozen=True)
class Whole(ScoreText):
    """The same texts in one forward each: how likely every forced token is, given what stands before it (Task)."""

    prompt: int

    def inputs(self, batch: Batch, padded: object) -> Inputs:
        return padded_inputs(whole(batch), self.pad, lambda longest: longest)

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        ids = inputs["input_ids"]
        logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, use_cache=False).logits
        rows = [  # one after the other: a vocabulary of float32 for every token is much
            row[self.prompt - 1 : -1].float().log_softmax(dim=-1).gather(1, written[self.prompt :, None])[:, 0]
            for row, written in zip(logits, ids, strict=True)
        ]
        return torch.stack(rows)

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return [{"index": int(row), "scores": said} for row, said in zip(batch.rows, outputs.tolist(), strict=True)]


def whole(batch: Batch) -> Batch:
    """A batch of prompts with what follows them."""
    assert batch.targets is not None
    rows = tuple(np.concatenate(pair) for pair in zip(batch.tokens.streams[0], batch.targets, strict=True))
    return Batch(batch.index, batch.rows, TokenBatch((rows,)))


@dataclass(frozen=True)
class Texts:
    """What is written at one batch size and prompt length.

    Attributes:
        batches: the first is to warm up with; all of the same lengths, but that fewer tokens may follow in the first.
        uses: per batch its forwards, if they have been recorded.
    """

    size: int
    prompt: int
    batches: list[Batch]
    uses: tuple[Uses, ...] = ()

    @property
    def steps(self) -> int:
        """Timed forwards of one token per row, of all counted batches."""
        return sum(self.steps_of(batch) for batch in self.batches[1:])

    @staticmethod
    def steps_of(batch: Batch) -> int:
        assert batch.targets is not None
        return len(batch.targets[0]) - 1

    @property
    def experts_per_token(self) -> float:
        """That a step reads in all MoE layers together, over its rows: experts x layers."""
        read = [sum(map(len, forward)) for uses in self.uses[1:] for forward in uses[1:]]
        return sum(read) / max(len(read), 1)


WARM_UP = 5
"""Tokens that follow the first prompt: a step that compiles, one that is recorded, and some that are replayed."""


def cut(stream: np.ndarray, size: int, prompt: int, follow: int, batches: int, source: str) -> Texts:
    """
    Args:
        stream: int64, all of the data's tokens.
        follow: tokens forced behind each prompt.

    Raises:
        DataError: the data has too few tokens.
    """
    span = prompt + follow
    wanted = span * size * (batches + 1)
    if len(stream) < wanted:
        raise DataError(
            f"{source}: {len(stream)} tokens in all; {batches + 1} batches of {size} texts of {span} tokens need {wanted}: give "
            "more data, or lower bench.batches, bench.batch_sizes or bench.prompts"
        )
    texts = stream[:wanted].reshape(batches + 1, size, span)
    made = []
    for number, rows in enumerate(texts):
        end = span if number else prompt + min(WARM_UP, follow)
        targets = tuple(row[prompt:end] for row in rows)
        made.append(Batch(number, np.arange(size), TokenBatch((tuple(row[:prompt] for row in rows),)), targets))
    return Texts(size, prompt, made)


def uses_of(trace: Trace, batch: Batch, prompt: int, top_k: int) -> Uses:
    """What each forward of a batch reads.

    Args:
        trace: of the batch's texts, each in one forward.
    """
    rows, length = len(batch.rows), prompt + Texts.steps_of(batch) + 1
    layers = [layer.top[:, :top_k].reshape(rows, length, -1) for layer in trace.layers]
    spans = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, length - 1))]
    return [[np.unique(layer[:, span]).tolist() for layer in layers] for span in spans]
