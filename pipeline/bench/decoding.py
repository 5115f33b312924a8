"""`bench` for task generate: what a token costs while a model writes, with each system, beside what it cannot cost less.

For every batch size and prompt length texts are cut and their routing recorded; then each system is set up once per budget and
writes them all. A row is written down as soon as it is there, and the limits, which other processes work out meanwhile, when they
are: what a bench that is cut short has measured is not lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.bench.decoding_limit import Needed, needed
from pipeline.bench.decoding_report import line, markdown
from pipeline.bench.decoding_row import decoding_row
from pipeline.bench.decoding_systems import DECODING, Stand, Writer, check_decoding
from pipeline.bench.decoding_workload import Forced, Texts, Whole, cut, uses_of
from pipeline.bench.limit import link_bytes_per_second
from pipeline.bench.output import BenchDir
from pipeline.bench.whole import Transformers, whole_model
from pipeline.bench.workload import mapped
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.executor import Executor
from pipeline.machine import cores, hardware
from pipeline.prepare import Prepared, check_predictor, choose_device, prepare
from pipeline.progress import bar
from pipeline.reports.metrics import versions
from pipeline.tasks.generate import Generate
from store.actor import ArenaInfo, ExpertStore

SPREAD = 64
"""Rows x tokens that follow a prompt, at most: a large batch's steps are long, and few are enough."""
LEAST = 4
"""Tokens that follow a prompt however many rows there are."""


def bench_decoding(config: Config) -> dict[str, Any]:
    """Writes `bench.batches` texts (fewer of many rows at once) of every size and prompt with every system and budget.

    Raises:
        One of USER_ERRORS: what the user gave cannot work.
    """
    device = choose_device(config.device)
    systems = check_decoding(config, device)
    prepared = prepare(config)
    if prepared.model.is_encoder_decoder:
        raise ConfigError(f"task: bench writes with decoders, whose texts go on; {prepared.model.source} is an encoder-decoder")
    if config.predictor.path is not None:
        check_predictor(prepared)
    texts = texts_of(config, prepared)
    with BenchDir(config) as output, _limits() as pool:
        store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
        try:
            with bar("placing experts", prepared.layout.nbytes, unit="B") as shown:
                arena = store.open(shown.update)
            _say(f"arena: {arena.seconds:.1f} s")
            report = _measure(config, prepared, arena, texts, systems, output, pool)
        finally:
            store.close(config.store.keep)
    for name in ("bench.json", "bench.md"):
        print(f"wrote {output.path / name}")
    return report


def texts_of(config: Config, prepared: Prepared) -> list[Texts]:
    by_row = sorted((int(row), ids) for b in prepared.batches for row, ids in zip(b.rows, b.tokens.streams[0], strict=True))
    stream = np.concatenate([ids for _, ids in by_row])
    made = []
    for size in config.bench.batch_sizes or [config.batch.size]:
        for prompt in config.bench.prompts:
            follow = max(LEAST, min(config.generate.max_new_tokens, SPREAD // size))
            batches = max(1, (config.bench.batches or 1) // size)
            made.append(cut(stream, size, prompt, follow, batches, str(config.data.path)))
    return made


@contextmanager
def _limits() -> Iterator[ProcessPoolExecutor]:
    """Who works limits out: they take seconds of one core each, and the GPU has not to wait for them."""
    pool = ProcessPoolExecutor(max(1, min(8, cores() // 2)), multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(
    config: Config,
    prepared: Prepared,
    arena: ArenaInfo,
    texts: list[Texts],
    systems: list[str],
    output: BenchDir,
    pool: ProcessPoolExecutor,
) -> dict[str, Any]:
    link = None
    if prepared.device != "cpu":
        with mapped(prepared) as there:
            link = link_bytes_per_second(there.memory, prepared.layout.slot_bytes, torch.device(prepared.device))
    assert isinstance(prepared.task, Generate)
    sampling = replace(prepared.task.sampling, max_new_tokens=room(texts))
    task = Forced(**vars(prepared.task) | {"sampling": sampling, "stop": ()})  # a text has its own end
    texts = recorded(prepared, texts)
    reference = _reference(prepared, task, texts)
    report: dict[str, Any] = {
        "hardware": hardware(prepared.device),
        "versions": versions(),
        "link_gb_per_s": round(link / 1e9, 2) if link else None,
        "arena": {"bytes": arena.nbytes, "warm_start": arena.warm_start, "seconds": round(arena.seconds, 3)},
        "expert_bytes": prepared.layout.expert_bytes,
        "slot_bytes": prepared.layout.slot_bytes,
        "backbone_bytes": prepared.layout.backbone_bytes,
        "rows": [],
    }
    budgets = config.bench.budgets or [config.store.budget]
    stands = {budget: Stand(prepared, arena, task, budget) for budget in budgets}
    limits = {
        (budget, at): pool.submit(needed, prepared.layout, stands[budget].slots, some.uses)
        for budget in budgets
        for at, some in enumerate(texts)
    }
    for number, budget in enumerate(budgets):
        for name in systems:
            if number and not DECODING[name].has_budget:
                continue
            _one_system(name, stands[budget], texts, reference, report["rows"])
            _write(report, texts, limits, link, output, wait=False)
    _write(report, texts, limits, link, output, wait=True)
    return report


def _one_system(
    name: str, stand: Stand, texts: list[Texts], reference: list[list[np.ndarray]] | None, rows: list[dict[str, Any]]
) -> None:
    """Sets one up, lets it write all texts, takes it down. What it cannot do is said, and no reason to end."""
    gc.collect()
    on_gpu = stand.prepared.device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    writer: Writer | None = None
    try:
        writer = DECODING[name].make(stand)
        for at, some in enumerate(texts):
            written = writer.write(some)
            row = decoding_row(name, stand, at, some, written, reference[at] if reference else None)
            row["device_memory_peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
            rows.append(row)
            _say(line(row))
    except (RuntimeError, MemoryError) as error:  # of the device: another system may have room
        _say(f"{name} at {stand.budget}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    finally:
        if writer is not None:
            writer.close()
    _say(f"{name} at {stand.budget}: {time.perf_counter() - start:.1f} s in all")


def room(texts: list[Texts]) -> int:
    return max(len(row) for some in texts for batch in some.batches for row in batch.targets or ())


def recorded(prepared: Prepared, texts: list[Texts]) -> list[Texts]:
    """With the routing of every text."""
    start = time.perf_counter()
    top_k = prepared.model.shape.top_k
    executor = Executor(replace(prepared.executor_spec(), task=Whole(0, None, 1), slots=0))
    try:
        made = []
        for some in texts:
            traces = [executor.trace(batch, top_k) for batch in some.batches]
            uses = tuple(uses_of(t, b, some.prompt, top_k) for t, b in zip(traces, some.batches, strict=True))
            made.append(replace(some, uses=uses))
    finally:
        executor.close()
    _say(f"routing of {sum(len(some.batches) for some in texts)} batches recorded in {time.perf_counter() - start:.1f} s")
    return made


def _reference(prepared: Prepared, task: Forced, texts: list[Texts]) -> list[list[np.ndarray]] | None:
    """What transformers says of every counted batch with the whole model on the device; None: it cannot."""
    start, device = time.perf_counter(), torch.device(prepared.device)
    said = []
    try:
        with mapped(prepared) as arena:
            memory = arena.memory.to(device)
            model = whole_model(prepared.model, arena.layout, memory, device)
            model.set_experts_implementation("eager")  # its others want experts to lie without gaps
            for some in texts:
                said.append(Transformers(model, Whole(task.pad, None, some.prompt), device).run(some.batches[1:]).outputs)
    except RuntimeError as error:  # memory's among them
        _say(f"no errors are measured: {str(error).splitlines()[0]}")
        return None
    finally:
        model = memory = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _say(f"transformers on the whole model: {time.perf_counter() - start:.1f} s")
    return said


def _write(
    report: dict[str, Any],
    texts: list[Texts],
    limits: dict[tuple[str, int], Future[Needed]],
    link: float | None,
    output: BenchDir,
    wait: bool,
) -> None:
    """bench.json and bench.md with all that is known by now."""
    slot = report["slot_bytes"]
    resident = {row["texts"]: row for row in report["rows"] if row["system"] == "resident"}
    for row in report["rows"]:
        future = limits.get((row["budget"], row["texts"]))
        if future is None or not (wait or future.done()):
            continue
        need, some = future.result(), texts[row["texts"]]
        batches = len(some.batches) - 1
        row |= {
            "limit_policy": need.policy,
            "limit_moves_per_token": round(need.steps / some.steps, 2),
            "min_moves_per_token": round(need.fewest / some.steps, 2),
            "limit_moves": need.prompt + need.steps,
        }
        if link:
            compute = resident.get(row["texts"])
            own = compute["ms_per_token"]["mean"] if compute else 0.0
            first = compute["ms_to_first_token"] if compute else 0.0
            limit = max(need.steps * slot / link * 1e3 / some.steps, own)
            first_limit = max(need.prompt * slot / link * 1e3 / batches, first)
            row |= {
                "limit_ms_per_token": round(limit, 3),
                "min_ms_per_token": round(max(need.fewest * slot / link * 1e3 / some.steps, own), 3),
                "ratio_to_limit": round(row["ms_per_token"]["mean"] / limit, 3),
                "limit_ms_to_first_token": round(first_limit, 3),
                "first_ratio_to_limit": round(row["ms_to_first_token"] / first_limit, 3),
            }
    output.write_report(report)
    output.write("bench.md", markdown(report))


def _say(text: str) -> None:
    print(text, flush=True)
