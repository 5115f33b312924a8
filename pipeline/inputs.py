"""From rows to token ids and to padded tensors: what every task does alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import Batch, Row, place
from pipeline.errors import ConfigError, DataError
from pipeline.progress import bar

ROWS_AT_ONCE = 1000
Result = dict[str, Any]
"""One line of predictions.jsonl."""
Inputs = dict[str, torch.Tensor]
"""Of one batch, int64 (batch, tokens) each: `input_ids`, `attention_mask`, with a decoder also `decoder_input_ids` and
`decoder_attention_mask`, and what else the task needs."""
Hear = Callable[[np.ndarray, np.ndarray], None]
"""Told of every step of a generating task: the new tokens, int64 (batch,), -1 in rows that were done; which rows go on, bool."""


def padded_inputs(batch: Batch, pad: int, padded: Callable[[int], int], left: bool = False) -> Inputs:
    """Token ids and masks of every stream. `left`: padding comes first, as a decoder wants it that goes on writing."""
    inputs: Inputs = {}
    for stream, prefix in zip(range(len(batch.tokens.streams)), ("", "decoder_"), strict=False):
        ids, mask = batch.pad(stream, pad, padded, left)
        inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    return inputs


def encoder_decoder_logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """(batch, decoder tokens, vocab_size). Without the decoder's mask: what pads it comes after all that counts."""
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"],
        use_cache=False,
    ).logits


def encode_texts(tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_tokens: int) -> tuple[list[np.ndarray], int]:
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
        raise DataError(f"{place(rows, nothing)}: the tokenizer makes no token of {texts[nothing]!r}; remove the row")
    return [np.array(ids, dtype=np.int64) for ids in full], len(too_long)


def check_context(encoded: list[np.ndarray], rows: list[Row], new_tokens: int, context: int | None) -> None:
    """
    Raises:
        DataError: a row is longer than the model's context, or would be with so many new tokens.
    """
    for i, ids in enumerate(encoded):
        if context is not None and len(ids) + new_tokens > context:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            raise DataError(
                f"{place(rows, i)}: {len(ids)} tokens{more} are more than the model's context of {context}; "
                "shorten the row, or cut all of them with batch.max_tokens"
            )
