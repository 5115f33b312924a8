"""What doubt (store/doubt.py) is worth: `python -m tests.store.doubted_moves CONFIG.yaml [key.path=value ...]`

Moves of a GPU's own copy engine, whose copies end as soon as they are decided (at_once.py), over those of `lru` on demand: tables
always heeded, with doubt, and the share of batches that ask. For the batch sizes and budgets of the config's bench, on what its
model's routers decide; docs/buffering.md has the table. Counts, not times.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config import load_config
from pipeline.plan.simulate import record
from predictor.baselines import Worsened
from store.simulator import Tables, Uses
from store.slots import parse_budget
from tests.store.at_once import play

KEPT = (0.9, 0.6)
"""Shares of true tables that are left as they are."""


def row(experts: tuple[int, ...], slots: int, uses: Uses, tables: Tables) -> str:
    """One cell of the table."""
    none, _ = play(experts, slots, "lru", uses, None)
    heeded, _ = play(experts, slots, "lookahead", uses, tables, may_doubt=False)
    ours, asked = play(experts, slots, "lookahead", uses, tables)
    return f"{sum(heeded) / sum(none):.2f} / **{sum(ours) / sum(none):.2f}**, {sum(asked) / len(asked):.0%}"


def main(arguments: list[str]) -> None:
    config = load_config(Path(arguments[0]), arguments[1:])
    budgets = config.bench.budgets or [config.store.budget]
    print("| batch | tables |", " | ".join(budgets), "|")
    for size in config.bench.batch_sizes or [config.batch.size]:
        history = record(replace(config, batch=replace(config.batch, size=size)), {})
        prepared, shape = history.prepared, history.prepared.model.shape
        tables = {name: [table.uses for table in made] for name, made in history.tables.items()}
        true = {id(batch.tokens): table for batch, table in zip(prepared.batches, history.tables["oracle"], strict=True)}
        truth: Any = SimpleNamespace(predict=lambda tokens, true=true: true[id(tokens)])
        for kept in KEPT:
            maker = Worsened(truth, shape, kept, seed=0)
            tables[f"{kept:.0%} of the truth"] = [maker.predict(batch.tokens).uses for batch in prepared.batches]
        for name, made in tables.items():
            cells = []
            for budget in budgets:
                layout = prepared.layout
                slots = parse_budget(budget, layout.expert_bytes, layout.slot_bytes, layout.nbytes, "bench.budgets")
                cells.append(row(shape.experts, slots, history.uses, made))
            print(f"| {size} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
