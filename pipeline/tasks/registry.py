"""Tasks: what is asked of a model. Each turns rows into token ids (in the driver) and a batch into results (in the Executor).

A task is small and travels to the Executor; it knows tokens and logits, nothing of experts. To add one: a class with the methods of
`Task` in a file of its own, and a branch in `make_task`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data import Batch, Encoded, Row
from pipeline.errors import ConfigError
from pipeline.inputs import Inputs, Result
from pipeline.models import ModelSpec
from pipeline.tasks.classify import HeadClassify, TextToTextClassify
from pipeline.tasks.generate import Generate
from pipeline.tasks.score import Score, ScoreText
from pipeline.tasks.writing import Steps


class Task(Protocol):
    """What is asked of the model."""

    @property
    def forwards(self) -> int:
        """The most that a batch takes. One can be recorded and replayed; of more, each is a step of the task's own loop."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        """Rows as token ids, and how many of them were cut to `max_tokens`."""

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        """One batch for the model, on the CPU. `padded` says to how many tokens a longest row is padded."""

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        """What the results are made of, (batch, ...).

        With one forward on the model's device, and no word between host and device in here.

        Args:
            steps: who runs the forwards of a task that takes several; None: the model itself.
        """

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        """A result per row from the forward's outputs, on the CPU."""

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        """Measures that the data allows; empty without labels."""


def make_task(config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Task:
    """
    Raises:
        ConfigError: the model cannot do the task, or the labels do not fit it.
    """
    text = spec.pretrained_config().get_text_config()
    pad = text.pad_token_id or 0
    start = getattr(text, "decoder_start_token_id", None)
    start = start if start is not None else pad
    if config.task in ("score", "generate") and not spec.generates:
        raise ConfigError(f"task: {config.task} needs a model that writes text; {spec.source} is a {spec.architecture}")
    if config.task == "generate":
        return Generate.of(config, spec, tokenizer, pad, start)
    if config.task == "score" and not spec.is_encoder_decoder:
        if config.data.target is not None:
            raise ConfigError(f"data.target: {spec.source} is a decoder, which scores its whole text; leave data.target out")
        return ScoreText(pad, spec.context)
    if config.task == "score":
        if config.data.target is None:
            raise ConfigError("data.target: task score needs the column that is scored")
        return Score(pad, start)
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
    return TextToTextClassify(labels, pad, start, tuple(firsts))
