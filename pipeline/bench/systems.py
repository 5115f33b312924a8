"""The systems that `bench` sets side by side, by name; each answers a list of batches and says how long it took.

Baselines get their best setting: transformers' weights lie on the device whole; accelerate keeps the
backbone and a budget of experts there, as `sida` does, and brings the rest from registered memory.
"""

from __future__ import annotations

import difflib
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol

import torch

from pipeline.bench.in_process import InProcess
from pipeline.bench.static_gating import static_model
from pipeline.bench.whole import Pass, Transformers, whole_model
from pipeline.bench.workload import Combination, Workload, mapped
from pipeline.config import Config
from pipeline.data import Batch
from pipeline.errors import ConfigError
from pipeline.predicting.place import choose_predictor_device
from pipeline.prepare import made_stand_ins
from store import cuda


class Running(Protocol):
    """A system that is set up."""

    def run(self, batches: list[Batch]) -> Pass: ...

    def close(self) -> None: ...


def _transformers(workload: Workload, given: Combination) -> Running:
    prepared, device = workload.prepared, torch.device(workload.prepared.device)
    with mapped(prepared) as arena:
        memory = arena.memory.to(device)
        return Transformers(whole_model(prepared.model, arena.layout, memory, device), prepared.task, device)


def _cpu(workload: Workload, given: Combination) -> Running:
    prepared, device = workload.prepared, torch.device("cpu")
    with mapped(prepared) as arena:
        return Transformers(whole_model(prepared.model, arena.layout, arena.memory, device), prepared.task, device)


class Accelerate(Transformers):
    """accelerate's offload: as much of the model on the device as `sida` has there, the rest brought by hooks when it runs."""

    def __init__(self, workload: Workload, given: Combination):
        from accelerate import dispatch_model, infer_auto_device_map  # an extra, for this baseline alone

        prepared, device = workload.prepared, torch.device(workload.prepared.device)
        layout, index = prepared.layout, device.index or 0
        with mapped(prepared) as arena:
            cuda.register(arena.memory.data_ptr(), arena.memory.numel(), index)  # as fast as pinned, and no second copy
        self._registered = arena.memory
        try:
            model = whole_model(prepared.model, layout, arena.memory, torch.device("cpu"))
            limits = {index: given.slots(workload) * layout.slot_bytes + layout.backbone_bytes, "cpu": 2 * layout.nbytes}
            where = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=["SwitchTransformersDenseActDense"])
            super().__init__(dispatch_model(model, device_map=where, main_device=index), prepared.task, device)
        except BaseException:
            cuda.unregister(arena.memory.data_ptr())
            raise

    def close(self) -> None:
        super().close()
        cuda.unregister(self._registered.data_ptr())


def _static_gating(workload: Workload, given: Combination) -> Running:
    prepared, device = workload.prepared, torch.device(workload.prepared.device)
    with mapped(prepared) as arena:
        model = static_model(prepared.model, arena, prepared.config.bench.capacity, device)
        return Transformers(model, prepared.task, device)


def _ray(workload: Workload, given: Combination) -> Running:
    from pipeline.bench.ray_system import ThroughRay  # Ray is started for it

    return ThroughRay(workload, given)


def _parallel(workload: Workload, given: Combination) -> Running:
    from pipeline.bench.parallel_system import Parallel  # processes are started for it

    return Parallel(workload, given)


@dataclass(frozen=True)
class Kind:
    """How a system is set up, and what there is to choose.

    Attributes:
        has_budget: takes a budget; otherwise it is measured once per batch size.
        predictors: which of the workload's tables it is run with; None: it has none.
        needs_gpu: there is nothing to compare on a CPU.
        needs_package: what it stands on, of the extra `bench`.
        group: runs on as many devices as `executors` says.
    """

    make: Callable[[Workload, Combination], Running]
    has_budget: bool = True
    predictors: Callable[[Workload], list[str]] | None = None
    needs_gpu: bool = False
    needs_package: str | None = None
    group: bool = False

    def combinations(self, workload: Workload, name: str, budget: str) -> list[Combination]:
        chosen = budget if self.has_budget else None
        if self.predictors is None:
            return [Combination(name, chosen)]
        if not self.group:
            return [Combination(name, chosen, predictor) for predictor in self.predictors(workload)]
        config = workload.prepared.config
        placements = config.bench.placements or [config.parallel.placement or "greedy"]
        given = [(predictor, placement) for predictor in self.predictors(workload) for placement in placements]
        return [Combination(name, chosen, predictor, config.executors, placement) for predictor, placement in given]


def _all(workload: Workload) -> list[str]:
    return list(workload.tables)


def _predicting(workload: Workload, given: Combination) -> Running:
    """As `sida`, its tables made beside the serving by the predictor in the Executor's process."""
    prepared = workload.prepared
    spec = replace(workload.executor_spec(given), policy="lookahead")
    predictor = prepared.predictor_spec(workload.arena.identity, made_stand_ins(prepared))
    return InProcess(workload, given, replace(spec, predictor=predictor))


def _own(workload: Workload) -> list[str]:
    return [workload.prepared.config.predictor.kind]


def _oracle(workload: Workload) -> list[str]:
    return ["oracle"]


def _lstm(workload: Workload) -> list[str]:
    return [name for name in workload.tables if name == "lstm"]


SYSTEMS: dict[str, Kind] = {
    "transformers": Kind(_transformers, has_budget=False),
    "cpu": Kind(_cpu, has_budget=False),
    "static-gating": Kind(_static_gating, has_budget=False),
    "accelerate": Kind(Accelerate, needs_gpu=True, needs_package="accelerate"),
    "resident": Kind(lambda w, g: InProcess(w, g, w.executor_spec(g)), has_budget=False, predictors=_oracle),
    "sida": Kind(lambda w, g: InProcess(w, g, replace(w.executor_spec(g), policy="lookahead")), predictors=_all),
    "predicting": Kind(_predicting, predictors=_own),
    "parallel": Kind(_parallel, predictors=_oracle, group=True),
    "on-demand": Kind(lambda w, g: InProcess(w, g, replace(w.executor_spec(g), policy="lru", demand=True)), needs_gpu=True),
    "paper": Kind(lambda w, g: InProcess(w, g, replace(w.executor_spec(g), policy="fifo"), "hash"), predictors=_lstm),
    "in_process": Kind(lambda w, g: InProcess(w, g, replace(w.executor_spec(g), threads=1), goes_on=False), predictors=_oracle),
    "ray": Kind(_ray, predictors=_oracle),
}
"""By their names in `bench.systems`."""


def check_systems(config: Config, device: str) -> None:
    """
    Raises:
        ConfigError: a system that is not known, or cannot run here.
    """
    if not config.bench.systems:
        raise ConfigError(f"bench.systems names none; known: {', '.join(SYSTEMS)}")
    if config.batch.order == "overlap":
        raise ConfigError("batch.order: 'overlap' needs tables before there are batches; a bench has input or length")
    if config.bench.placements and "parallel" not in config.bench.systems:
        raise ConfigError("bench.placements is about the system 'parallel', which bench.systems does not name")
    for name in config.bench.systems:
        if name not in SYSTEMS:
            near = difflib.get_close_matches(name, SYSTEMS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SYSTEMS)}"
            raise ConfigError(f"bench.systems: there is no {name!r}; {hint}")
        kind = SYSTEMS[name]
        if kind.needs_gpu and device == "cpu":
            raise ConfigError(f"bench.systems: {name!r} needs a GPU, and device is cpu; leave it out of bench.systems")
        if kind.needs_package is not None and find_spec(kind.needs_package) is None:
            package = kind.needs_package
            raise ConfigError(
                f"bench.systems: {name!r} needs {package}, which is not installed; pip install -e '.[bench]', or leave it out"
            )
        if kind.group and config.executors < 2:
            raise ConfigError(f"bench.systems: {name!r} shares experts out, and executors is 1; give it 2 or more")
        if kind.group and device != "cpu" and config.executors > torch.cuda.device_count():
            raise ConfigError(f"executors: {config.executors}, and this machine has {torch.cuda.device_count()} GPUs")
        if name == "predicting":
            if not _has_tables(config):
                raise ConfigError("bench.systems: 'predicting' needs a predictor that makes tables, and in predictor.path its file")
            if choose_predictor_device(config, device) != "executor":
                raise ConfigError("bench.systems: 'predicting' needs predictor.device=executor")
        if name == "paper" and (config.predictor.kind != "lstm" or config.predictor.path is None):
            raise ConfigError("bench.systems: 'paper' needs predictor.kind=lstm and, in predictor.path, its trained file")


def _has_tables(config: Config) -> bool:
    return config.predictor.path is not None or config.predictor.kind == "rehearsal"


class Bench:
    """A system on the bench: set up, run, and its memory on the device watched, apart from that of its neighbours."""

    def __init__(self, given: Combination, workload: Workload):
        self._cuda = workload.prepared.device != "cpu"
        gc.collect()  # what others left behind must not go while this one is measured
        before = self._allocated()
        torch.set_num_threads(workload.prepared.executor_spec().threads)  # the same for all, but for those that set another
        self._system = SYSTEMS[given.system].make(workload, given)
        self._threads = torch.get_num_threads()  # of the process: whoever runs next would have it too
        self._own = self._allocated() - before
        self.device_memory_peak_bytes: int | None = self._own if self._cuda else None

    def run(self, batches: list[Batch]) -> Pass:
        torch.set_num_threads(self._threads)
        before = self._allocated()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        done = self._system.run(batches)
        if self._cuda:
            risen = torch.cuda.max_memory_allocated() - before
            own = self._own + risen
            self._own += max(0, self._allocated() - before)  # what it keeps, e.g. what its graphs write
            apart = [s.device_memory_peak_bytes or 0 for s in done.stats if s.pid != os.getpid()]  # an actor tells of its own
            self.device_memory_peak_bytes = max([self.device_memory_peak_bytes or 0, own, *apart])
        return done

    def close(self) -> None:
        self._system.close()
        del self._system
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._cuda else 0
