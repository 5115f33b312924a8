"""Classification: a label for every row, by a head on the encoder or by the word that a text-to-text model would write."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import Batch, Encoded, Row
from pipeline.inputs import Inputs, Result, encode_texts, encoder_decoder_logits, padded_inputs
from pipeline.tasks.writing import Steps


def _quality(labels: tuple[str, ...], rows: list[Row], results: list[Result]) -> dict[str, float]:
    """Accuracy, and with two labels the F1 of the second, as GLUE counts it."""
    if rows[0].label is None:
        return {}
    pairs = [(row.label, str(result["label"])) for row, result in zip(rows, results, strict=True)]
    quality = {"accuracy": sum(true == said for true, said in pairs) / len(pairs)}
    if len(labels) == 2:
        positive = labels[1]
        right = sum(true == said == positive for true, said in pairs)
        wrong = sum((true == positive) != (said == positive) for true, said in pairs)
        quality["f1"] = 2 * right / max(2 * right + wrong, 1)
    return quality


def _results(batch: Batch, labels: tuple[str, ...], scores: torch.Tensor) -> list[Result]:
    """scores: (batch, labels)."""
    best = scores.argmax(dim=1).tolist()
    names = [int(label) if re.fullmatch(r"0|-?[1-9][0-9]*", label) else label for label in labels]  # "01" stays text
    return [
        {"index": int(row), "label": names[b], "scores": values}
        for row, b, values in zip(batch.rows, best, scores.float().tolist(), strict=True)
    ]


@dataclass(frozen=True)
class TextToTextClassify:
    """The label whose word's first token has the highest logit at the first decoder step (T5's way to classify)."""

    forwards = 1
    labels: tuple[str, ...]
    pad: int
    start: int
    first_tokens: tuple[int, ...]

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = encode_texts(tokenizer, rows, max_tokens)
        start = np.array([self.start])
        return [Encoded((row, start)) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        return padded_inputs(batch, self.pad, padded)

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        logits = encoder_decoder_logits(model, inputs)
        return torch.stack([logits[:, 0, token] for token in self.first_tokens], dim=1)

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, self.labels, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _quality(self.labels, rows, results)


@dataclass(frozen=True)
class HeadClassify:
    """The highest output of a classification head on the encoder, as the paper classifies."""

    forwards = 1
    labels: tuple[str, ...]
    pad: int

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = encode_texts(tokenizer, rows, max_tokens)
        return [Encoded((row,)) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        return padded_inputs(batch, self.pad, padded)

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, self.labels, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _quality(self.labels, rows, results)
