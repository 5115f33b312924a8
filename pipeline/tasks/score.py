"""Scoring: how probable the model finds a text, by teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import Batch, Encoded, Row, place
from pipeline.errors import DataError
from pipeline.inputs import Inputs, Result, check_context, encode_texts, encoder_decoder_logits, padded_inputs
from pipeline.tasks.writing import Steps


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per row the sum over its targets, float64 (batch,); row by row: one vocabulary of float32 at a time.

    Args:
        logits: (batch, tokens, vocab_size).
        targets, mask: int64 (batch, tokens); the mask is 1 where a target is scored.
    """
    scores = []
    for row, target, counts in zip(logits, targets, mask, strict=True):
        scored = row.float().log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        scores.append((scored.double() * counts).sum())
    return torch.stack(scores)


def _results(batch: Batch, outputs: torch.Tensor) -> list[Result]:
    assert batch.targets is not None
    return [
        {"index": int(row), "tokens": len(target), "logprob": value}
        for row, target, value in zip(batch.rows, batch.targets, outputs.tolist(), strict=True)
    ]


def _perplexity(results: list[Result]) -> dict[str, float]:
    tokens = sum(result["tokens"] for result in results)
    return {"perplexity": math.exp(-sum(result["logprob"] for result in results) / tokens)}


@dataclass(frozen=True)
class Score:
    """The logarithm of the probability that an encoder-decoder gives a target, by teacher forcing."""

    forwards = 1
    pad: int
    start: int

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = encode_texts(tokenizer, rows, max_tokens)
        targets, cut = encode_texts(tokenizer, [Row(row.target or "") for row in rows], max_tokens)
        encoded = [
            Encoded((source, np.concatenate([[self.start], target[:-1]])), target)
            for source, target in zip(ids, targets, strict=True)
        ]
        return encoded, truncated + cut

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        assert batch.targets is not None
        inputs = padded_inputs(batch, self.pad, padded)
        targets = torch.zeros_like(inputs["decoder_input_ids"])
        for row, target in zip(targets, batch.targets, strict=True):
            row[: len(target)] = torch.from_numpy(target)
        return inputs | {"targets": targets}

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        return _logprobs(encoder_decoder_logits(model, inputs), inputs["targets"], inputs["decoder_attention_mask"])

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _perplexity(results)


@dataclass(frozen=True)
class ScoreText:
    """The logarithm of the probability that a decoder gives a text: of every token but the first, given those before it.

    Attributes:
        context: the most tokens that the model can read; None: no limit.
    """

    forwards = 1
    pad: int
    context: int | None

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        """With the special tokens that the tokenizer adds by itself, and no other."""
        ids, truncated = encode_texts(tokenizer, rows, max_tokens)
        single = next((i for i, row in enumerate(ids) if len(row) < 2), None)
        if single is not None:
            raise DataError(f"{place(rows, single)}: one token, and a decoder scores all but the first; remove the row")
        check_context(ids, rows, 0, self.context)
        return [Encoded((row,), row[1:]) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        return padded_inputs(batch, self.pad, padded)

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return _logprobs(logits[:, :-1], ids[:, 1:], mask[:, 1:])

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _perplexity(results)
