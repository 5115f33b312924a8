"""How tokens are chosen while a model writes: the config's `generate` section."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """Greedy unless `sample`; then by the probabilities, seeded by the config's `seed` and the batch's rows."""

    max_new_tokens: int = 64
    """The most per row; a stop token ends it sooner."""
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    """Only among so many of the likeliest; null: all."""
    top_p: float = 1.0
    """Only among the likeliest that together have this probability."""
    stop: list[str] = field(default_factory=list)
    """Tokens that end a row, as the tokenizer writes them, beside the model's own."""
    first: str | None = None
    """A token that every row begins with: the target language of a translation model."""

    def problem(self) -> str | None:
        """What is wrong with these settings; None: nothing."""
        if self.max_new_tokens < 1:
            return f"'generate.max_new_tokens' is {self.max_new_tokens}; it must be more than 0"
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            return f"'generate.temperature' is {self.temperature}; it must be more than 0 (greedy is generate.sample=false)"
        if not 0 < self.top_p <= 1:
            return f"'generate.top_p' is {self.top_p}; it must be more than 0 and at most 1"
        if self.top_k is not None and self.top_k < 1:
            return f"'generate.top_k' is {self.top_k}; it must be more than 0, or null for all"
        return None

    @property
    def is_greedy_by_mistake(self) -> bool:
        """Whether settings that choose among samples would do nothing."""
        return not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, None, 1.0)
