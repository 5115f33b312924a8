"""What every eviction policy would move on a model's routing: `python -m pipeline.plan.simulate CONFIG.yaml [key.path=value ...]`

Records what the routers decide on the config's data, once per batch size of `bench.batch_sizes`, and plays it through the
simulator (store/simulator.py) for every budget of `bench.budgets`, every policy of `plan.policies` and several predictors;
beside each stands what perfect foresight moves (Belady's MIN). Writes simulate.json, simulate.md and, with matplotlib,
simulate.png into `output_dir`. With task generate the texts are written first, and every forward is a batch (written.py).

Counts, not times: the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench.limit import fewest_moves
from pipeline.bench.workload import experts_used, record_batches
from pipeline.config import Config, load_config
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.machine import hardware
from pipeline.plan.simulate_report import draw, markdown
from pipeline.plan.written import AHEAD, write
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.prepare import Prepared, own_predictor, prepare
from pipeline.progress import bar
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from pipeline.window import Window
from predictor import traces
from predictor.baselines import Oracle, Random
from predictor.hash_table import HashTable
from predictor.registry import HashPredictor, make
from store.actor import ArenaInfo, ExpertStore
from store.eviction import POLICIES
from store.layout import Key
from store.simulator import Moves, Tables, Uses, layout_of, simulate, simulate_on_demand, simulate_one_by_one
from store.slots import parse_budget

ON_DEMAND = "none, on demand"
"""In the place of a predictor: a layer's experts are copied when its router has named them."""
ONE_BY_ONE = ("fifo", "lifo", "lru", "lfu")
"""The policies that need no tables."""


@dataclass(frozen=True)
class History:
    """A data set in batches of one size, routed.

    Attributes:
        tables: by the name of the predictor, one per batch.
        ahead: by the same, if they come so many batches ahead, and not as many as in a run over data that are known.
    """

    prepared: Prepared
    uses: Uses
    tables: dict[str, list[HashTable]]
    ahead: dict[str, int] = field(default_factory=dict)

    @property
    def sequence(self) -> list[list[Key]]:
        """The experts of every layer of every batch, in the order of execution."""
        return [[(layer, expert) for expert in experts] for batch in self.uses for layer, experts in enumerate(batch)]


def run(config: Config, predictors: dict[str, Path]) -> dict[str, Any]:
    """Records, simulates and writes; returns the report.

    Args:
        predictors: kind -> file, beside the true tables, random ones and the config's own predictor.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {directory}: {error.strerror}") from None
    rows, serial, first = [], [], None
    for size in config.bench.batch_sizes or [config.batch.size]:
        history = record(replace(config, batch=replace(config.batch, size=size)), predictors)
        first = first or history.prepared
        rows += list(moves_of_policies(history))
        serial += list(moves_one_by_one(history))
    assert first is not None
    report = {
        "hardware": hardware(first.device),
        "versions": versions(),
        "model": config.model.path or config.model.config,
        "workload": config.data.path,
        "experts": list(first.model.shape.experts),
        "slot_bytes": first.layout.slot_bytes,
        "rows": rows,
        "one_by_one": serial,
    }
    written = [write_whole(directory / "simulate.json", _readable(report))]
    written += [write_whole(directory / "simulate.md", markdown(report)), *draw(report, directory)]
    for path in written:
        print(f"wrote {path}")
    return report


def record(config: Config, predictors: dict[str, Path]) -> History:
    """Runs the model over its data in batches of `batch.size`, and every predictor over the same batches."""
    prepared = prepare(config)
    prepared = replace(prepared, batches=prepared.batches[: config.bench.batches])
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
        arena = store.open(shown.update)
    try:
        if config.task == "generate":
            return _written(prepared, arena, predictors)
        recorded = record_batches(prepared)
        makers = _makers(prepared, arena, recorded, predictors)
    finally:
        store.close(config.store.keep)
    top_k = prepared.model.shape.top_k
    uses = [[[expert for _, expert in layer] for layer in experts_used(trace, top_k)] for trace in recorded]
    tables = {name: [maker.predict(batch.tokens) for batch in prepared.batches] for name, maker in makers.items()}
    return History(prepared, uses, tables)


def _written(prepared: Prepared, arena: ArenaInfo, predictors: dict[str, Path]) -> History:
    """Each predictor's tables twice: as of texts that are known, and as they come while the texts are being written."""
    texts, top_k = write(prepared), prepared.model.shape.top_k
    makers = _makers(prepared, arena, [text.trace for text in texts], predictors)
    tables, ahead = {}, {}
    for name, maker in makers.items():
        tables[name] = [table for text in texts for table in text.tables(maker.predict(text.whole))]
        for forwards in AHEAD if name == "oracle" else AHEAD[:1]:
            tables[f"{name}, {forwards} ahead"] = tables[name]
            ahead[f"{name}, {forwards} ahead"] = forwards
    return History(prepared, [uses for text in texts for uses in text.uses(top_k)], tables, ahead)


def _makers(
    prepared: Prepared, arena: ArenaInfo, recorded: list[traces.Trace], predictors: dict[str, Path]
) -> dict[str, HashPredictor]:
    shape, config = prepared.model.shape, prepared.config
    makers: dict[str, HashPredictor] = {"oracle": Oracle(traces.join(recorded), shape, shape.top_k)}
    if config.predictor.path is not None or config.predictor.kind == "rehearsal":
        makers[config.predictor.kind] = own_predictor(prepared, arena.identity)
    for kind, path in predictors.items():
        spec = replace(prepared.predictor_spec(arena.identity), kind=kind, path=path)
        makers[kind] = make(spec, ArenaModel(prepared.model, prepared.arena))
    makers["random"] = Random(shape, config.predictor.named(shape.top_k), config.seed)
    return makers


def moves_of_policies(history: History) -> Iterator[dict[str, Any]]:
    """A row per budget, predictor and policy: one round over the data, slots empty at first."""
    prepared = history.prepared
    layout, config = prepared.layout, prepared.config
    tables: dict[str, Tables | None] = {name: [t.uses for t in made] for name, made in history.tables.items()}
    tables[ON_DEMAND] = None
    budgets = config.bench.budgets or [config.store.budget]
    policies = config.plan.policies or list(POLICIES)
    with bar(f"batches of {config.batch.size}", len(budgets) * len(tables) * len(policies), unit="run") as shown:
        for budget in budgets:
            slots = parse_budget(budget, layout.expert_bytes, layout.slot_bytes, layout.nbytes, "bench.budgets")
            fewest = fewest_moves(history.sequence, slots, rounds=1)
            for predictor, made in tables.items():
                lookahead = 0 if made is None else _lookahead(history, slots, predictor)
                for policy in policies:
                    if made is None:
                        moved = simulate_on_demand(layout, slots, policy, history.uses)
                    else:
                        moved = simulate(layout, slots, policy, history.uses, made, lookahead)
                    yield _row(history, budget, slots, predictor, policy, fewest, Moves.of(moved)) | {"lookahead": lookahead}
                    shown.update()


def moves_one_by_one(history: History) -> Iterator[dict[str, Any]]:
    """A row per budget and policy: every MoE layer has slots of its own, and its experts run one after the other."""
    shape, config = history.prepared.model.shape, history.prepared.config
    for budget in config.bench.budgets or [config.store.budget]:
        slots = [parse_budget(budget, count, 1, count, "bench.budgets") for count in shape.experts]
        runs = [[batch[layer] for batch in history.uses] for layer in range(shape.layers)]
        fewest = sum(
            fewest_moves([[(0, expert)] for run in runs[layer] for expert in run], slots[layer], rounds=1)
            for layer in range(shape.layers)
        )
        for policy in ONE_BY_ONE:
            moved = [
                movement
                for layer, count in enumerate(shape.experts)
                for movement in simulate_one_by_one(layout_of([count]), slots[layer], policy, runs[layer])
            ]
            yield _row(history, budget, sum(slots), "", policy, fewest, Moves.of(moved))


def _row(history: History, budget: str, slots: int, predictor: str, policy: str, fewest: int, moves: Moves) -> dict[str, Any]:
    return {
        "batch": history.prepared.config.batch.size,
        "batches": len(history.uses),
        "experts_used_per_layer": round(float(np.mean([len(layer) for batch in history.uses for layer in batch])), 2),
        "budget": budget,
        "slots": slots,
        "predictor": predictor,
        "policy": policy,
        "uses": moves.uses,
        "hits": moves.hits,
        "misses": moves.misses,
        "copies": moves.copies,
        "moves": moves.moves,
        "moved_bytes": moves.nbytes,
        "fewest_moves": fewest,
        "ratio_to_fewest": round(moves.moves / max(fewest, 1), 4),
    }


def _readable(report: dict[str, Any]) -> str:
    """JSON, a line per row."""
    parts = []
    for key, value in report.items():
        text = json.dumps(value)
        if key in ("rows", "one_by_one"):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lookahead(history: History, slots: int, predictor: str) -> int:
    """As many batches as a run would look ahead by the end."""
    config = history.prepared.config
    window = Window(slots, config.predictor.lookahead)
    if predictor in history.ahead:
        return history.ahead[predictor]
    for table in history.tables[predictor]:
        window.saw(table.expected_uses(config.routing))
    return window.lookahead


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, as runner.py's."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.plan.simulate", description="What every eviction policy would move.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="model and data; bench.batch_sizes and bench.budgets")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the config")
    parser.add_argument(
        "--predictor",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="one more predictor, e.g. token_table=FILE; repeatable",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        predictors = {}
        for given in options.predictor:
            kind, equals, path = given.partition("=")
            if not equals:
                raise ConfigError(f"--predictor {given}: it is written KIND=FILE, for example token_table=table.safetensors")
            predictors[kind] = Path(path)
        run(load_config(options.config, options.overrides), predictors)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(main))
