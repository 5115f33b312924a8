"""The loop of a task that writes: a forward, a token for every row, until all rows have ended or have enough.

transformers' `generate` prepares everything (caches, encoders, what changes probabilities) and hands over to `Writing` for the loop
itself, so that between two forwards there is a place for the experts: whoever runs the forwards (`Steps`) is given the new tokens
and the rows that go on. Tokens are chosen where the logits are. Knows nothing of experts.

The token ids are heard on the host, at once or one forward late: a device that is late never waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.tasks.fixed_step import FixedStep

DONE = -1
"""In outputs: after a row's last token."""


class Steps(Protocol):
    """Who runs the forwards of one batch that is being written. The first, the prompt's, is number 0."""

    def fixed(self, model: PreTrainedModel, rows: int, most: int) -> FixedStep | None:
        """A step whose tensors stay where they are, for so many tokens at most; None: the model's own cache and forward."""

    def next(self, tokens: torch.Tensor, awake: torch.Tensor, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The next forward: float (rows, vocab_size), the logits of what comes after `tokens`.

        Args:
            tokens: int64 (rows,), chosen after the forward before.
            awake: bool (rows,): those that go on; the others' logits are not looked at.
            forward: runs it, unless there is a `fixed` step, which is then to be run.
        """

    def read(self, tokens: torch.Tensor) -> np.ndarray | None:
        """Tokens that have just been chosen, or those before them, on the host: int64 (rows,); None: none are there yet."""

    def left(self) -> list[np.ndarray]:
        """Those that `read` has not given, when there are no more to come."""

    def hear(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        """Told of every step, see `pipeline.inputs.Hear`."""


class OwnSteps:
    """The model's own forwards, with its own cache (Steps)."""

    def fixed(self, model: PreTrainedModel, rows: int, most: int) -> FixedStep | None:
        return None

    def next(self, tokens: torch.Tensor, awake: torch.Tensor, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        return forward()

    def read(self, tokens: torch.Tensor) -> np.ndarray | None:
        return tokens.cpu().numpy()

    def left(self) -> list[np.ndarray]:
        return []

    def hear(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        pass


class Writing:
    """One batch being written: what transformers calls a custom `generate` loop.

    Attributes:
        tokens: int64 (rows, most), on the host; `DONE` behind each row's last.
        logprobs: of each forced token, float32 (rows,) each, where the model is.
    """

    def __init__(
        self, rows: int, most: int, stop: tuple[int, ...], steps: Steps, chance: torch.Generator, forced: torch.Tensor | None = None
    ):
        """
        Args:
            most: tokens that there is room for.
            chance: samples are drawn by it, where the model is.
            forced: int64 (rows, at most `most`), to be written whatever the model says, and no more.
        """
        self._room = most
        self.tokens = np.full((rows, most if forced is None else forced.shape[1]), DONE, dtype=np.int64)
        self.logprobs: list[torch.Tensor] = []
        self._awake = np.ones(rows, dtype=bool)
        self._heard = 0
        self._stop, self._steps, self._forced, self._chance = stop, steps, forced, chance

    def __call__(
        self, model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **model_kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        rows, most = self.tokens.shape
        steps, written = self._steps, input_ids
        fixed = steps.fixed(model, rows, input_ids.shape[1] + self._room)
        if fixed is not None:
            model_kwargs["past_key_values"] = fixed.cache

        def forward(first: bool = False) -> torch.Tensor:
            nonlocal model_kwargs
            cut = {} if first or not model_kwargs["use_cache"] else {"next_sequence_length": 1}
            given = model.prepare_inputs_for_generation(written, is_first_iteration=first, **cut, **model_kwargs)
            outputs = model(**given, return_dict=True)
            decoder = not model.config.is_encoder_decoder
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=not decoder)
            return outputs.logits[:, -1]

        logits = forward(first=True)
        if fixed is not None:
            fixed.begin(model_kwargs.get("attention_mask"), model_kwargs["position_ids"])
        awake = torch.ones(rows, dtype=torch.bool, device=logits.device)
        stop = torch.tensor(self._stop, dtype=torch.int64, device="cpu").to(logits.device, non_blocking=True)
        for step in range(most):
            chosen = self._choose(logits, written, logits_processor, generation_config.do_sample, step)
            chosen = torch.where(awake, chosen, generation_config.pad_token_id or 0)
            if self._stop:
                awake = awake & (chosen[:, None] != stop).all(dim=1)  # not torch.isin, which may ask the device
            written = torch.cat([written, chosen[:, None]], dim=1)
            heard = steps.read(chosen)
            if heard is not None:
                self._hear(heard)
            if step + 1 == most or not self._awake.any():
                break
            logits = steps.next(chosen, awake, forward)
        for heard in steps.left():
            self._hear(heard)
        return written

    def _choose(self, logits: torch.Tensor, written: torch.Tensor, processor: Any, sample: bool, step: int) -> torch.Tensor:
        """int64 (rows,), as transformers chooses."""
        if self._forced is not None:
            likely = logits.float().log_softmax(dim=-1)
            self.logprobs.append(likely.gather(1, self._forced[:, step, None])[:, 0])
            return self._forced[:, step]
        scores = processor(written, logits.to(copy=True, dtype=torch.float32))
        if not sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._chance).squeeze(1)

    def _hear(self, tokens: np.ndarray) -> None:
        """One step's tokens; those of rows that were done before count for nothing."""
        if not self._awake.any():  # a device that is late went one too far
            return
        new = np.where(self._awake, tokens, DONE)
        self.tokens[:, self._heard] = new
        self._heard += 1
        self._awake &= ~np.isin(new, self._stop)
        self._steps.hear(new, self._awake.copy())
