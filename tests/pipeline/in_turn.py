"""Settings of the copy engine, or trees, in turn on one GPU: `python -m tests.pipeline.in_turn OUT CASES ROUNDS CONFIG [key=value ...] -- NAME[=TREE][,attribute=number ...] ...`

Every variant is a process with an Executor of its own: this tree's, or another's (a checkout of an older commit), with attributes of
its copy engine set. Rounds alternate, so that what the machine does meanwhile befalls all alike; three before those that count.

CASES: comma-separated BATCH:BUDGET:KEPT:BATCHES, e.g. 1:20%:0.9:48: true tables, of which so much is left right
(predictor.baselines.Worsened), and so many batches a round. OUT: a JSON file. `over_first` is the median over rounds of a round's
time over the first variant's in the same turn; `answers` are digests, one if all rounds answered alike. What names in doubt cost
(docs/results.md) was found by it: `... -- before,worth_an_eviction=0 rule`. A try, not a test; the limit here is the link's alone.
The arena stays where it is, as each process gives it to the next: `python runner.py clean` frees its memory.
"""  # noqa: E501 (a command is one line)

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

WARM_UP = 3
FIGURES = ("ms", "copied", "in_place", "stall_ms")


def variant(config: str, overrides: list[str], attributes: dict[str, float]) -> None:
    """A process: "open CASE", "run" and "close" come on stdin, one line of JSON answers each."""
    import numpy as np  # everything below may be another tree's
    import torch

    from pipeline.bench.in_process import InProcess
    from pipeline.bench.limit import fewest_moves, link_bytes_per_second
    from pipeline.bench.workload import Combination, Workload, experts_used, mapped, record_batches
    from pipeline.config import load_config
    from pipeline.prepare import prepare
    from predictor import traces
    from predictor.actor import timed
    from predictor.baselines import Oracle, Worsened
    from store.actor import ExpertStore

    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=said, flush=True)

    first = prepare(load_config(Path(config), overrides))
    store = ExpertStore(first.arena, first.model.source, first.model.placement)
    arena = store.open()
    with mapped(first) as there:
        link = link_bytes_per_second(there.memory, first.layout.slot_bytes, torch.device(first.device))
    say(link_gb_per_s=link / 1e9)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "open":
            size, budget, kept, count = rest[0].split(":")
            prepared = prepare(replace(first.config, batch=replace(first.config.batch, size=int(size))))
            prepared = replace(prepared, batches=prepared.batches[: int(count)])
            recorded, shape = record_batches(prepared), prepared.model.shape
            uses = [layer for trace in recorded for layer in experts_used(trace, shape.top_k)]
            maker = Worsened(Oracle(traces.join(recorded), shape, shape.top_k), shape, float(kept), first.config.seed)
            tables = {"oracle": [timed(maker, batch.tokens) for batch in prepared.batches]}
            workload = Workload(prepared, arena, Path(os.devnull), tables, {}, [], uses)
            given = Combination("sida", budget, "oracle")
            running = InProcess(workload, given, replace(workload.executor_spec(given), policy="lookahead"))
            engine: Any = running._executor._device.engine  # type: ignore[attr-defined]
            for name, value in attributes.items():
                assert hasattr(engine, name), name
                setattr(engine, name, value)
            fewest = fewest_moves(uses, given.slots(workload)) / len(prepared.batches)
            say(fewest_moves=fewest, limit_ms=fewest * prepared.layout.slot_bytes / link * 1e3)
        elif word == "run":
            done, batches = running.run(prepared.batches), len(prepared.batches)
            blocks = batches * prepared.layout.slot_bytes
            say(
                ms=done.seconds / batches * 1e3,
                copied=sum(each.prefetch_bytes + each.demand_bytes for each in done.stats) / blocks,
                in_place=sum(each.read_in_place_bytes for each in done.stats) / blocks,
                stall_ms=sum(each.stall_ms for each in done.stats) / batches,
                answers=hashlib.sha1(b"".join(np.ascontiguousarray(each).tobytes() for each in done.outputs)).hexdigest()[:12],
            )
        else:
            running.close()
            del running, engine
            torch.cuda.empty_cache()
            say()
    store.close(keep=True)


class Process:
    """A variant."""

    def __init__(self, words: str, config: str, overrides: list[str]):
        what, *attributes = words.split(",")
        self.name, _, tree = what.partition("=")
        numbers = {key: float(value) for key, value in (each.split("=") for each in attributes)}
        arguments = [json.dumps(each) for each in (str(Path(config).resolve()), overrides, numbers)]
        tree = str(Path(tree or ".").resolve())
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (tree, os.environ.get("PYTHONPATH"))))),
        )
        self.link = self._answer()

    def ask(self, words: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(processes: Sequence[Process], case: str, rounds: int) -> list[dict[str, Any]]:
    """One row a variant."""
    opened = [process.ask(f"open {case}") for process in processes]
    seen: list[list[dict[str, Any]]] = [[] for _ in processes]
    for number in range(-WARM_UP, rounds):
        for turn in range(len(processes)):
            which = (turn + number) % len(processes)
            answer = processes[which].ask("run")
            if number >= 0:
                seen[which].append(answer)
    rows = []
    for process, limits, each in zip(processes, opened, seen, strict=True):
        process.ask("close")
        row = {key: statistics.median(one[key] for one in each) for key in FIGURES}
        row["over_first"] = statistics.median(ours["ms"] / theirs["ms"] for ours, theirs in zip(each, seen[0], strict=True))
        row["over_limit"] = row["ms"] / limits["limit_ms"]
        row["over_fewest_moves"] = (row["copied"] + row["in_place"]) / limits["fewest_moves"]
        rows.append({"case": case, "variant": process.name, **process.link, **limits, **row})
        rows[-1]["answers"] = sorted({one["answers"] for one in each})
        rows[-1]["round_ms"] = [round(one["ms"], 3) for one in each]
    return rows


def main(arguments: list[str]) -> None:
    at = arguments.index("--")
    out, cases, rounds, config, *overrides = arguments[:at]
    processes = [Process(words, config, overrides) for words in arguments[at + 1 :]]
    report = []
    for case in cases.split(","):
        for row in compare(processes, case, int(rounds)):
            report.append(row)
            print(*(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()), flush=True)
        with tempfile.NamedTemporaryFile("w", dir=Path(out).parent, delete=False) as beside:
            json.dump(report, beside, indent=1)
        Path(beside.name).rename(out)


if __name__ == "__main__":
    if "--" in sys.argv:
        main(sys.argv[1:])
    else:
        variant(*map(json.loads, sys.argv[1:]))
