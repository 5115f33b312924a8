"""Texts that a model writes, as a history for the simulator: every forward, the prompt's and each token's, is a batch of it.

The texts are written once, as `run` would write them; what their tokens are routed to, and what a predictor says of them, is that
of one forward over each whole text. Which of it is known when, is the simulator's business: tables of the replay of a text may come
many forwards ahead, those of a text that is being written only with the token itself.

Knows nothing of slots. For decoders: what they read and write is one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data import Batch
from pipeline.errors import ConfigError
from pipeline.executor import Executor
from pipeline.prepare import Prepared
from pipeline.progress import bar
from pipeline.tasks.generate import Generate
from pipeline.tasks.score import ScoreText
from predictor.hash_table import HashTable
from predictor.tokens import ENCODER, TokenBatch
from predictor.traces import Trace

AHEAD = (0, 1, 2, 4, 8)
"""Forwards that true tables are also simulated to come ahead: what it would be worth to know so many tokens before they are."""


@dataclass(frozen=True)
class Written:
    """One batch of texts.

    Attributes:
        whole: all tokens that were read, so each text but its last token.
        prompts: how many of them are the prompt, per row.
        trace: their routing.
    """

    whole: TokenBatch
    prompts: tuple[int, ...]
    trace: Trace

    @property
    def forwards(self) -> list[np.ndarray]:
        """Per forward the tokens that it reads: int64, positions among all, row after row."""
        lengths = self.whole.lengths[ENCODER]
        starts = np.cumsum(lengths) - lengths
        first = np.concatenate([start + np.arange(prompt) for start, prompt in zip(starts, self.prompts, strict=True)])
        steps = lengths - self.prompts
        rest = [(starts + self.prompts + step)[steps > step] for step in range(int(steps.max()))]
        return [first, *rest]

    def uses(self, top_k: int) -> Iterator[list[list[int]]]:
        """Per forward and MoE layer the experts that it reads, ascending."""
        for read in self.forwards:
            yield [np.unique(layer.top[read, :top_k]).tolist() for layer in self.trace.layers]

    def tables(self, table: HashTable) -> Iterator[HashTable]:
        """Per forward its part of what is said of the whole texts."""
        for read in self.forwards:
            yield HashTable(*(tuple(layer[read] for layer in part) for part in (table.experts, table.probability, table.scaling)))


def write(prepared: Prepared) -> list[Written]:
    """Lets the model answer all batches; the arena must stand.

    Raises:
        ConfigError: it is no decoder.
    """
    task = prepared.task
    assert isinstance(task, Generate)
    if prepared.model.is_encoder_decoder:
        raise ConfigError(f"task: of generate, decoders' texts are simulated; {prepared.model.source} is an encoder-decoder")
    spec, prompts = replace(prepared.executor_spec(), slots=0), [batch.tokens.streams[ENCODER] for batch in prepared.batches]
    executor, whole = Executor(spec), []
    try:
        with bar("writing", len(prepared.batches)) as shown:
            for batch, rows in zip(prepared.batches, prompts, strict=True):
                results = executor.execute(batch, None).results
                texts = (np.concatenate([row, result["token_ids"][:-1]]) for row, result in zip(rows, results, strict=True))
                whole.append(TokenBatch((tuple(text.astype(np.int64) for text in texts),)))
                shown.update()
    finally:
        executor.close()
    executor = Executor(replace(spec, task=ScoreText(task.pad, None)))
    try:
        traces = [
            executor.trace(Batch(batch.index, batch.rows, tokens), prepared.model.shape.top_k)
            for batch, tokens in zip(prepared.batches, whole, strict=True)
        ]
    finally:
        executor.close()
    return [
        Written(tokens, tuple(len(row) for row in rows), trace) for tokens, rows, trace in zip(whole, prompts, traces, strict=True)
    ]
