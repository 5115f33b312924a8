"""What a token cannot move less of: the best causal policy in the simulator, and perfect foresight.

Apart from the rest of the bench, since other processes work it out, and need not know models for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bench.limit import fewest_moves_each
from store.eviction import POLICIES
from store.layout import ArenaLayout, Key
from store.simulator import simulate, simulate_on_demand

Uses = list[list[list[int]]]
"""Forward -> MoE layer -> experts that it uses, each once."""


@dataclass(frozen=True)
class Needed:
    """Moves that a budget cannot avoid, of the counted batches: of their prompts, and of their steps.

    Attributes:
        policy: the causal one that moves least in steps; it knows a forward's experts when the forward begins.
        fewest: with perfect foresight (Belady's MIN).
    """

    policy: str
    prompt: int
    steps: int
    fewest: int


def needed(layout: ArenaLayout, slots: int, texts: Sequence[Uses]) -> Needed:
    """
    Args:
        texts: per batch its forwards; the first batch warms up.
    """
    forwards = [forward for uses in texts for forward in uses]
    is_prompt = [at == 0 for uses in texts for at in range(len(uses))]
    counted = [number > 0 for number, uses in enumerate(texts) for _ in uses]
    best: tuple[int, int, str] | None = None
    for policy in POLICIES:
        tables = [[[(expert, 1.0) for expert in layer] for layer in forward] for forward in forwards]
        for name, moved in (
            (policy, simulate(layout, slots, policy, forwards, tables, 0)),
            (f"{policy} on demand", simulate_on_demand(layout, slots, policy, forwards)),
        ):
            moves = [sum(experts for _, _, experts in m.copy_spans) + sum(m.misses) for m in moved]
            steps = sum(m for m, first, counts in zip(moves, is_prompt, counted, strict=True) if counts and not first)
            prompts = sum(m for m, first, counts in zip(moves, is_prompt, counted, strict=True) if counts and first)
            if best is None or (steps, prompts) < best[:2]:
                best = (steps, prompts, name)
    assert best is not None
    keys: list[list[Key]] = [[(i, expert) for expert in layer] for forward in forwards for i, layer in enumerate(forward)]
    each = fewest_moves_each(keys, slots) if slots else [len(layer) for layer in keys]
    layers = len(layout.layers)
    fewest = [sum(each[at * layers : (at + 1) * layers]) for at in range(len(forwards))]
    least = sum(m for m, first, counts in zip(fewest, is_prompt, counted, strict=True) if counts and not first)
    return Needed(best[2], best[1], best[0], least)
