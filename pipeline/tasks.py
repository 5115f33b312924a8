"""Tasks: what is asked of a model. Each turns rows into token ids (in the driver) and a batch into results (in the Executor).

A task is small and travels to the Executor; it knows tokens and logits, nothing of experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data import Batch, Encoded, Row
from pipeline.errors import ConfigError, DataError
from pipeline.models import ModelSpec
from pipeline.progress import bar

ROWS_AT_ONCE = 1000
Result = dict[str, Any]
"""One line of predictions.jsonl."""
Inputs = dict[str, torch.Tensor]
"""Of one batch, int64 (batch, tokens) each: `input_ids`, `attention_mask`, with a decoder also `decoder_input_ids` and
`decoder_attention_mask`, and what else the task needs."""


class Task(Protocol):
    """What is asked of the model."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        """Rows as token ids, and how many of them were cut to `max_tokens`."""

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        """One batch for the model, on the CPU. `padded` says to how many tokens a longest row is padded."""

    def forward(self, model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
        """What the results are made of, (batch, ...), on the model's device: no word between host and device in here."""

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        """A result per row from the forward's outputs, on the CPU."""

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        """Measures that the data allows; empty without labels."""


def make_task(config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Task:
    """
    Raises:
        ConfigError: the model cannot do the task, or the labels do not fit it.
    """
    pad = spec.config["pad_token_id"] or 0
    start = spec.config.get("decoder_start_token_id")
    if config.task == "score":
        if not spec.is_encoder_decoder:
            raise ConfigError(f"task: score needs an encoder-decoder; {spec.source} is a {spec.architecture}")
        if config.data.target is None:
            raise ConfigError("data.target: task score needs the column that is scored")
        return Score(pad, start if start is not None else pad)
    labels = tuple(config.labels)
    if not spec.is_encoder_decoder:
        if not spec.architecture.endswith("ForSequenceClassification"):
            raise ConfigError(
                "task: classify needs a classification head or an encoder-decoder with a language head; "
                f"{spec.source} is a {spec.architecture}"
            )
        count = spec.pretrained_config().num_labels
        if count != len(labels):
            raise ConfigError(f"labels: names {len(labels)} labels, the classification head of {spec.source} has {count}")
        return HeadClassify(labels, pad)
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in config.labels.values()]
    firsts: dict[int, str] = {}
    for word, ids in zip(config.labels.values(), words, strict=True):
        if not ids:
            raise ConfigError(f"labels: the tokenizer makes no token of {word!r}")
        if ids[0] in firsts:
            raise ConfigError(
                f"labels: {firsts[ids[0]]!r} and {word!r} begin with the same token, so the model cannot tell them apart"
            )
        firsts[ids[0]] = word
    return TextToTextClassify(labels, pad, start if start is not None else pad, tuple(firsts))


def _inputs(batch: Batch, pad: int, padded: Callable[[int], int]) -> Inputs:
    """Token ids and masks of every stream."""
    inputs: Inputs = {}
    for stream, prefix in zip(range(len(batch.tokens.streams)), ("", "decoder_"), strict=False):
        ids, mask = batch.pad(stream, pad, padded)
        inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    return inputs


def _encoder_decoder_logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """(batch, decoder tokens, vocab_size). Without the decoder's mask: what pads it comes after all that counts."""
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"],
        use_cache=False,
    ).logits


def _encode_texts(tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[np.ndarray], int]:
    """Token ids of text and pair, int64 arrays; and how many rows were longer than `max_tokens`."""
    texts = [row.text for row in rows]
    pairs = [row.pair for row in rows] if rows[0].pair is not None else None
    full: list[list[int]] = []
    with bar("tokenising", len(texts)) as shown:
        for start in range(0, len(texts), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            full += tokenizer(texts[part], pairs[part] if pairs else None, add_special_tokens=True)["input_ids"]
            shown.update(len(texts[part]))
    too_long = [i for i, ids in enumerate(full) if len(ids) > max_tokens]
    if too_long:
        cut_pairs = [pairs[i] for i in too_long] if pairs else None
        cut = tokenizer([texts[i] for i in too_long], cut_pairs, truncation=True, max_length=max_tokens)["input_ids"]
        for i, ids in zip(too_long, cut, strict=True):
            full[i] = ids
            if len(ids) > max_tokens:
                raise ConfigError(f"batch.max_tokens: {max_tokens} is too few for a text and the tokenizer's own tokens")
    nothing = next((i for i, ids in enumerate(full) if not ids), None)
    if nothing is not None:
        raise DataError(f"row {nothing + 1}: the tokenizer makes no token of {texts[nothing]!r}; remove the row")
    return [np.array(ids, dtype=np.int64) for ids in full], len(too_long)


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

    labels: tuple[str, ...]
    pad: int
    start: int
    first_tokens: tuple[int, ...]

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = _encode_texts(tokenizer, rows, max_tokens)
        start = np.array([self.start])
        return [Encoded((row, start)) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        return _inputs(batch, self.pad, padded)

    def forward(self, model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
        logits = _encoder_decoder_logits(model, inputs)
        return torch.stack([logits[:, 0, token] for token in self.first_tokens], dim=1)

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, self.labels, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _quality(self.labels, rows, results)


@dataclass(frozen=True)
class HeadClassify:
    """The highest output of a classification head on the encoder, as the paper classifies."""

    labels: tuple[str, ...]
    pad: int

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = _encode_texts(tokenizer, rows, max_tokens)
        return [Encoded((row,)) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        return _inputs(batch, self.pad, padded)

    def forward(self, model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        return _results(batch, self.labels, outputs)

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return _quality(self.labels, rows, results)


@dataclass(frozen=True)
class Score:
    """The logarithm of the probability that an encoder-decoder gives a target, by teacher forcing."""

    pad: int
    start: int

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        ids, truncated = _encode_texts(tokenizer, rows, max_tokens)
        targets, cut = _encode_texts(tokenizer, [Row(row.target or "") for row in rows], max_tokens)
        encoded = [
            Encoded((source, np.concatenate([[self.start], target[:-1]])), target)
            for source, target in zip(ids, targets, strict=True)
        ]
        return encoded, truncated + cut

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        assert batch.targets is not None
        inputs = _inputs(batch, self.pad, padded)
        targets = torch.zeros_like(inputs["decoder_input_ids"])
        for row, target in zip(targets, batch.targets, strict=True):
            row[: len(target)] = torch.from_numpy(target)
        return inputs | {"targets": targets}

    def forward(self, model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
        logits = _encoder_decoder_logits(model, inputs)
        scores = []
        for row, targets, mask in zip(logits, inputs["targets"], inputs["decoder_attention_mask"], strict=True):
            scored = row.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
            scores.append((scored.double() * mask).sum())  # row by row: one vocabulary of float32 at a time
        return torch.stack(scores)

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        assert batch.targets is not None
        return [
            {"index": int(row), "tokens": len(target), "logprob": value}
            for row, target, value in zip(batch.rows, batch.targets, outputs.tolist(), strict=True)
        ]

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        tokens = sum(result["tokens"] for result in results)
        return {"perplexity": math.exp(-sum(result["logprob"] for result in results) / tokens)}
