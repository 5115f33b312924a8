"""How wide should a table be? `python -m pipeline.predicting.widths CONFIG.yaml [key.path=value ...]` counts, for several widths,
the experts that tables name, which would all be fetched, and the uses that they cover.

A fixed number of experts per token (`predictor.top_k`) stands beside a share of the probability (`predictor.mass`), which spends
experts where the predictor is unsure. Every batch of the config's data is traced first, or `trace.load` is read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config import Config, load_config
from pipeline.errors import USER_ERRORS
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.predicting.train import record
from pipeline.prepare import made_stand_ins, prepare
from pipeline.stopping import stoppable
from predictor import traces
from predictor.hash_table import HashTable
from predictor.registry import make
from predictor.tokens import RoutingShape
from predictor.traces import Trace
from store.actor import ExpertStore

TOP_KS = (1, 2, 3, 5, 8)
MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
WIDEST = 16
"""Experts per token, with a mass."""


@dataclass(frozen=True)
class Counted:
    """Of all batches and MoE layers.

    Attributes:
        used: different experts that a batch's layer really used, summed.
        named: those that its table names.
        covered: those that were both.
    """

    used: int
    named: int
    covered: int

    @property
    def hit_rate(self) -> float:
        return self.covered / max(self.used, 1)

    @property
    def fetched_per_use(self) -> float:
        return self.named / max(self.used, 1)


def count(tables: list[HashTable], truth: list[Trace], top_k: int) -> Counted:
    """
    Args:
        truth: of the same batches.
        top_k: what the router gives a token.
    """
    used = named = covered = 0
    for table, trace in zip(tables, truth, strict=True):
        for experts, layer in zip(table.experts, trace.layers, strict=True):
            needed, told = set(np.unique(layer.top[:, :top_k])), set(np.unique(experts[experts >= 0]))
            used, named, covered = used + len(needed), named + len(told), covered + len(needed & told)
    return Counted(used, named, covered)


def widths(config: Config) -> Iterator[tuple[str, Counted]]:
    """The name of a width, and what it comes to.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    prepared = prepare(config)
    shape = prepared.model.shape
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    try:
        identity = store.open().identity
        load = config.trace.load
        whole = record(prepared) if load is None else traces.load(Path(load), shape, identity)
        parts = list(_batches(whole, shape, config.batch.size))
        spec = prepared.predictor_spec(identity, made_stand_ins(prepared))
        model = ArenaModel(prepared.model, prepared.arena)
        for top_k, mass in [*((k, None) for k in TOP_KS), *((WIDEST, m) for m in MASSES)]:
            predictor = make(replace(spec, top_k=top_k, mass=mass, most=None), model)
            tables = [predictor.predict(part.tokens) for part in parts]
            yield f"top_k {top_k}" if mass is None else f"mass {mass:g}", count(tables, parts, shape.top_k)
    finally:
        store.close(config.store.keep)


def _batches(trace: Trace, shape: RoutingShape, size: int) -> Iterator[Trace]:
    for start in range(0, trace.tokens.size, size):
        yield traces.select(trace, np.arange(start, min(start + size, trace.tokens.size)), shape)


def main(arguments: list[str]) -> int:
    try:
        print("| width | uses covered | experts fetched per use |\n|---|---|---|")
        for name, counted in widths(load_config(Path(arguments[0]), arguments[1:])):
            print(f"| {name} | {counted.hit_rate:.1%} | {counted.fetched_per_use:.2f} |", flush=True)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(lambda: main(sys.argv[1:])))
