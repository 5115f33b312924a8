"""Generation: a model goes on writing, or an encoder-decoder answers, row by row of a batch at once, until it stops.

One call per batch. transformers' own `generate` prepares it, the loop is writing.py's; only what an expert computes comes from
slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data import Batch, Encoded, Row
from pipeline.errors import ConfigError
from pipeline.inputs import Inputs, Result, check_context, encode_texts, padded_inputs
from pipeline.tasks.sampling import Sampling
from pipeline.tasks.writing import DONE, OwnSteps, Steps, Writing

if TYPE_CHECKING:
    from pipeline.models import ModelSpec


@dataclass(frozen=True)
class Generate:
    """What a model writes after each row.

    Attributes:
        stop: ids that end a row.
        start: what an encoder-decoder's decoder begins with; None: it is a decoder, and begins with the row.
        first: the id that every row's new tokens begin with, if there is one.
        context: the most tokens that the model can read; None: no limit.
        tokenizer: its directory.
    """

    sampling: Sampling
    pad: int
    stop: tuple[int, ...]
    start: int | None
    first: int | None
    context: int | None
    tokenizer: Path
    seed: int

    @property
    def forwards(self) -> int:
        """The prompt's, and one for each further token."""
        return self.sampling.max_new_tokens

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, pad: int, start: int) -> Generate:
        """
        Raises:
            ConfigError: more new tokens than the model can read, or a token that the tokenizer does not have.
        """
        sampling = config.generate
        if sampling.is_greedy_by_mistake:
            raise ConfigError("generate.temperature, top_k and top_p choose among samples; they need generate.sample=true")
        if spec.context is not None and sampling.max_new_tokens >= spec.context:
            raise ConfigError(
                f"generate.max_new_tokens: {sampling.max_new_tokens} leaves no room for a prompt in the context of {spec.source}, "
                f"{spec.context} tokens"
            )
        stop = {_token(tokenizer, word, "generate.stop") for word in sampling.stop} | set(spec.stop)
        first = _token(tokenizer, sampling.first, "generate.first") if sampling.first is not None else None
        task = cls(
            sampling,
            pad,
            tuple(sorted(stop)),
            start if spec.is_encoder_decoder else None,
            first,
            spec.context,
            spec.tokenizer.absolute(),
            config.seed,
        )
        if config.cluster.nodes != 1:
            task._tokenizer  # noqa: B018 (read now, it travels along: other machines may not have its directory)
        return task

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[Encoded], int]:
        """With the special tokens that the tokenizer adds by itself, but no stop token behind what a decoder is to continue."""
        ids, truncated = encode_texts(tokenizer, rows, max_tokens)
        if self.start is None:
            ids = [row[:-1] if row[-1] in self.stop and len(row) > 1 else row for row in ids]
        check_context(ids, rows, 0 if self.start is not None else self.sampling.max_new_tokens, self.context)
        if self.start is None:
            return [Encoded((row,)) for row in ids], truncated
        start = np.array([self.start])
        return [Encoded((row, start)) for row in ids], truncated

    def inputs(self, batch: Batch, padded: Callable[[int], int]) -> Inputs:
        # One token, as the decoder's first, is not padded: all rows have one, and what follows would not stand behind it.
        inputs = padded_inputs(batch, self.pad, lambda n: n if n == 1 else padded(n), left=self.start is None)
        chance = hashlib.sha256(repr((self.seed, batch.rows.tolist())).encode()).digest()  # of the rows: a resumed run has the same
        return inputs | {"seed": torch.tensor(int.from_bytes(chance[:7], "little"))}

    def forward(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None = None) -> torch.Tensor:
        """int64 (batch, max_new_tokens), the stop token included, then `DONE`. On the host."""
        return torch.from_numpy(self.write(model, inputs, steps).tokens)

    def write(self, model: PreTrainedModel, inputs: Inputs, steps: Steps | None, forced: torch.Tensor | None = None) -> Writing:
        """The same, and what else is known of it."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in inputs}
        rows, device = len(inputs["input_ids"]), inputs["input_ids"].device
        chance = torch.Generator(device)  # of its own: a graph whose recording failed leaves a GPU's default one unusable
        if self.sampling.sample:
            chance.manual_seed(int(inputs["seed"]))
        writing = Writing(rows, self.sampling.max_new_tokens, self.stop, steps or OwnSteps(), chance, forced)
        write: Any = model.generate
        write(**given, generation_config=self.settings(), custom_generate=writing)
        return writing

    def settings(self) -> GenerationConfig:
        """The same for transformers; whatever the model's own says besides is left out."""
        sampling = self.sampling
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.sample:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(self.stop) or None,
            pad_token_id=self.pad,
            decoder_start_token_id=self.start,
            forced_bos_token_id=self.first,
            num_beams=1,
            **chosen,
        )

    def results(self, batch: Batch, outputs: torch.Tensor) -> list[Result]:
        results = []
        for row, tokens in zip(batch.rows, outputs.tolist(), strict=True):
            ids = [token for token in tokens if token != DONE]
            results.append({"index": int(row), "text": self.text(ids), "token_ids": ids})
        return results

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def quality(self, rows: list[Row], results: list[Result]) -> dict[str, float]:
        return {}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.tokenizer)


def _token(tokenizer: PreTrainedTokenizerBase, word: str, key: str) -> int:
    """The id of one token.

    Raises:
        ConfigError: the tokenizer makes several of it, or none.
    """
    known = tokenizer.get_vocab().get(word)
    ids = [known] if known is not None else tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(f"{key}: {word!r} is not one token that the tokenizer knows; it makes {pieces} of it")
    return ids[0]
