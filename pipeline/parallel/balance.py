"""How evenly placements share out a model's experts: `python -m pipeline.parallel.balance CONFIG.yaml [key.path=value ...]`

Records what the routers decide on the config's data, once per batch size of `bench.batch_sizes`, or takes the trace that
`trace.load` names; plans every placement for every number of devices on the first half of the batches, and judges it on the
second, by the measures of "Towards MoE Deployment" (load.py). Beside that stand two other plans: by the tables that the config's
predictor makes of the second half, and by hindsight, the second half itself. An encoder's MoE layers and a decoder's are judged
apart, as there. Writes balance.json, balance.md and, with matplotlib, balance.png into `output_dir`.

Counts, not times: the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bench.workload import record_batches
from pipeline.config import Config, load_config
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.machine import hardware
from pipeline.models import describe
from pipeline.parallel.balance_report import draw, markdown
from pipeline.parallel.load import Balance, measured, predicted
from pipeline.parallel.placement import PLACEMENTS, place
from pipeline.parallel.sharing import measured_by
from pipeline.prepare import choose_device, own_predictor, prepare
from pipeline.progress import bar
from pipeline.reports.metrics import versions
from pipeline.reports.output import write_whole
from pipeline.stopping import stoppable
from predictor.tokens import RoutingShape
from store.actor import ExpertStore

FIRST_HALF, TABLES, HINDSIGHT = "first half", "tables of the second half", "hindsight"
"""What a placement may be planned on."""
ENCODER_PART, DECODER_PART, WHOLE = "encoder", "decoder", "model"
"""Whose MoE layers a row is about."""


@dataclass(frozen=True)
class Loads:
    """A data set in batches of one size, and some of a model's MoE layers.

    Attributes:
        measured: per MoE layer (batches, experts), what the routers chose.
        predicted: the same by the predictor's tables; None: there is no predictor.
    """

    measured: list[np.ndarray]
    predicted: list[np.ndarray] | None

    def of(self, layers: list[int]) -> Loads:
        """Only these MoE layers."""
        predicted = [self.predicted[i] for i in layers] if self.predicted is not None else None
        return Loads([self.measured[i] for i in layers], predicted)

    @property
    def batches(self) -> int:
        return len(self.measured[0])

    @property
    def half(self) -> int:
        return self.batches // 2

    def plans(self) -> dict[str, list[np.ndarray]]:
        """By what a placement may be planned on, the loads it then sees."""
        plans = {FIRST_HALF: [load[: self.half] for load in self.measured]}
        if self.predicted is not None:
            plans[TABLES] = [load[self.half :] for load in self.predicted]
        return plans | {HINDSIGHT: self.judged}

    @property
    def judged(self) -> list[np.ndarray]:
        return [load[self.half :] for load in self.measured]


def run(config: Config, devices: list[int], replicas: list[int]) -> dict[str, Any]:
    """Records, plans, judges and writes; returns the report.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {directory}: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for size in config.bench.batch_sizes or [config.batch.size]:
        sized = replace(config, batch=replace(config.batch, size=size))
        loads, shape = replay(sized) if config.trace.load is not None else record(sized)
        if loads.half == 0:
            raise ConfigError(f"{config.data.path}: {loads.batches} batch of {size} rows; planning and judging need two or more")
        for stream in sorted(set(shape.streams)):
            layers = [layer for layer, its in enumerate(shape.streams) if its == stream]
            part = (ENCODER_PART, DECODER_PART)[stream] if len(set(shape.streams)) > 1 else WHOLE
            rows += [{"batch": size, "part": part, **row} for row in judge(loads.of(layers), devices, replicas)]
    report = {
        "hardware": hardware("cpu"),
        "versions": versions(),
        "model": config.model.path or config.model.config,
        "workload": config.trace.load or config.data.path,
        "predictor": config.predictor.kind,
        "experts": list(shape.experts),
        "rows": rows,
    }
    text = json.dumps(report | {"rows": []})[:-3] + "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"
    written = [write_whole(directory / "balance.json", text), write_whole(directory / "balance.md", markdown(report))]
    for path in [*written, *draw(report, directory)]:
        print(f"wrote {path}")
    return report


def judge(loads: Loads, devices: list[int], replicas: list[int]) -> Iterator[dict[str, Any]]:
    """A row per number of devices, placement, number of replicas and plan, judged on the second half."""
    for count in devices:
        for copies in replicas:
            for planned_on, seen in loads.plans().items():
                for placement in PLACEMENTS:
                    found = Balance.of(loads.judged, place(seen, count, placement, copies))
                    row: dict[str, Any] = {"batches": loads.batches, "devices": count, "replicas": copies}
                    row |= {"planned_on": planned_on, "placement": placement}
                    yield row | {key: round(value, 4) for key, value in asdict(found).items()}


def record(config: Config) -> tuple[Loads, RoutingShape]:
    """Runs the model over its data in batches of `batch.size`, and the config's predictor, if it has one that is trained."""
    prepared = prepare(config)
    prepared = replace(prepared, batches=prepared.batches[: config.bench.batches])
    shape = prepared.model.shape
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
        arena = store.open(shown.update)
    try:
        recorded = record_batches(prepared)
        tables = None
        if config.predictor.path is not None or config.predictor.kind == "rehearsal":
            predictor = own_predictor(prepared, arena.identity)
            tables = [predictor.predict(batch.tokens) for batch in prepared.batches]
    finally:
        store.close(config.store.keep)
    return Loads(measured(recorded, shape), predicted(tables, shape) if tables is not None else None), shape


def replay(config: Config) -> tuple[Loads, RoutingShape]:
    """The rows of `trace.load` in batches of `batch.size`; no weight is read, and no predictor asked."""
    model, _ = describe(config.model, torch.device(choose_device(config.device)), only_headers=True)
    loads = measured_by(Path(config.trace.load or ""), config.batch, model.shape, None)
    return Loads([load[: config.bench.batches] for load in loads], None), model.shape


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, as runner.py's."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.parallel.balance", description="How evenly placements share out experts."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="model and data, or trace.load; bench.batch_sizes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the config")
    parser.add_argument("--devices", type=_counts(1), default=[2, 4, 8], metavar="N,N", help="default: 2,4,8")
    parser.add_argument(
        "--replicas", type=_counts(0), default=[0, 1, 2], metavar="N,N", help="experts on every device; default: 0,1,2"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        run(load_config(options.config, options.overrides), options.devices, options.replicas)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _counts(least: int) -> Any:
    def parse(text: str) -> list[int]:
        counts = [int(part) for part in text.split(",")]
        if min(counts) < least:
            raise argparse.ArgumentTypeError(f"{min(counts)} is less than {least}")
        return counts

    return parse


if __name__ == "__main__":
    sys.exit(stoppable(main))
