"""The systems that `bench` sets side by side when a model writes: this project's Executor, transformers and accelerate.

Each is set up once for a budget and writes all texts, of whatever size: to give an Executor tens of gigabytes takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.batch_result import BatchResult
from pipeline.bench.decoding_workload import Forced, Texts
from pipeline.bench.whole import numbers, whole_model
from pipeline.bench.workload import mapped
from pipeline.config import Config
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.errors import ConfigError
from pipeline.executor import Executor
from pipeline.families.door import stacked
from pipeline.prepare import Prepared
from pipeline.tasks.writing import OwnSteps
from predictor.actor import timed
from predictor.nobody import Nobody
from predictor.registry import STEPPING
from store.actor import ArenaInfo
from store.movement import Movement
from store.slots import parse_budget

FEW = 2
"""Tokens of one batch, for a system for which each takes seconds."""


@dataclass
class Written:
    """What one system made of one set of texts.

    Attributes:
        first_ms: per batch, until its rows' first tokens.
        token_ms: of every further step.
        outputs: per batch, float (batch, tokens); None: they mean nothing.
        moved: of all batches together; None: it does not count.
        ways: how its forwards ran.
    """

    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    outputs: list[np.ndarray] | None = field(default_factory=list)
    moved: Movement | None = None
    ways: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stand:
    """All that a system is made of."""

    prepared: Prepared
    arena: ArenaInfo
    task: Forced
    budget: str

    @property
    def slots(self) -> int:
        layout = self.prepared.layout
        return parse_budget(self.budget, layout.expert_bytes, layout.slot_bytes, layout.nbytes, "bench.budgets")


class Writer(Protocol):
    """A system that is set up."""

    def write(self, texts: Texts) -> Written: ...

    def close(self) -> None: ...


class Ours:
    """An Executor called directly."""

    def __init__(
        self, stand: Stand, policy: str, demand: bool = False, predicts: bool = False, executor: type[Executor] = Executor
    ):
        prepared = stand.prepared
        spec: ExecutorSpec = replace(prepared.executor_spec(), task=stand.task, slots=stand.slots, policy=policy, demand=demand)
        if predicts and prepared.config.predictor.kind in STEPPING:
            spec = replace(spec, stepping=replace(prepared.predictor_spec(stand.arena.identity), device="cpu"))
        self._is_resident = stand.slots >= sum(layer.experts for layer in prepared.layout.layers)
        self._nobody = Nobody(prepared.model.shape)
        self._layers = prepared.model.shape.layers
        self._executor = executor(spec)
        self._executor.ready()
        self._next = 0

    def write(self, texts: Texts) -> Written:
        done, moved = Written(ways={}), Movement(self._layers)
        assert done.outputs is not None
        for number, batch in enumerate(texts.batches):
            result = self._written(batch)
            if not number:
                while self._is_resident and (any(result.stats.misses) or result.stats.prefetch_bytes):
                    result = self._written(batch)  # tens of gigabytes are still on their way
                continue
            stats = result.stats
            assert stats.first_token_ms is not None
            done.first_ms.append(stats.first_token_ms)
            done.token_ms += stats.token_ms
            done.outputs.append(numbers(result.results))
            moved.hits = [a + b for a, b in zip(moved.hits, stats.hits, strict=True)]
            moved.misses = [a + b for a, b in zip(moved.misses, stats.misses, strict=True)]
            moved.prefetch_bytes += stats.prefetch_bytes
            moved.demand_bytes += stats.demand_bytes
            moved.read_in_place_bytes += stats.read_in_place_bytes
            moved.copy_spans += stats.copy_spans
            moved.stall_ns += int(stats.stall_ms * 1e6)
            moved.resident_peak_bytes = max(moved.resident_peak_bytes, stats.resident_peak_bytes)
            for way, count in (stats.how if isinstance(stats.how, dict) else {}).items():
                done.ways[way] = done.ways.get(way, 0) + count
        done.moved = moved
        return done

    def _written(self, batch: Batch) -> BatchResult:
        batch = replace(batch, index=self._next)
        self._next += 1
        return self._executor.execute(batch, timed(self._nobody, batch.tokens))

    def close(self) -> None:
        self._executor.close()


class Clock(OwnSteps):
    """The model's own forwards, each timed (pipeline.tasks.writing.Steps)."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def hear(self, tokens: np.ndarray, awake: np.ndarray) -> None:
        self.times.append(time.perf_counter())

    @property
    def ms(self) -> list[float]:
        return (np.diff(self.times) * 1e3).tolist()


class Plain:
    """transformers' own forwards with its own cache."""

    def __init__(self, stand: Stand):
        self._task, self._device = stand.task, torch.device(stand.prepared.device)
        self._model = self._make(stand)

    def _make(self, stand: Stand) -> Any:
        with mapped(stand.prepared) as arena:
            memory = arena.memory.to(self._device)
            return whole_model(stand.prepared.model, arena.layout, memory, self._device)

    @torch.inference_mode()
    def write(self, texts: Texts) -> Written:
        done = Written()
        for number, batch in enumerate(texts.batches):
            inputs = self._task.inputs(batch, None)
            clock = Clock()
            said = self._task.forward(self._model, {name: tensor.to(self._device) for name, tensor in inputs.items()}, clock)
            if number:
                done.first_ms.append(clock.ms[0])
                done.token_ms += clock.ms[1:]
                if done.outputs is not None:
                    done.outputs.append(said.double().numpy())
        return done

    def close(self) -> None:
        del self._model


class Accelerate(Plain):
    """accelerate's offload at its best: layers of experts on the device as far as the budget goes, the others brought whole.

    What is brought is one layer's experts over and over, contiguous and pinned, so that its copies run at the link's speed and no
    second copy of all experts is needed; its answers mean nothing. A few tokens are enough.
    """

    def _make(self, stand: Stand) -> Any:
        from accelerate import dispatch_model, infer_auto_device_map  # an extra, for this baseline alone

        prepared, index = stand.prepared, self._device.index or 0
        with mapped(prepared) as arena:
            model: Any = whole_model(prepared.model, arena.layout, arena.memory, torch.device("cpu"))
            shared: dict[tuple, torch.Tensor] = {}
            kinds = set()
            for name in stacked(model):
                module, part = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                tensor = getattr(module, part)
                key = (tuple(tensor.shape), tensor.dtype)
                if key not in shared:
                    shared[key] = tensor.detach().contiguous().pin_memory()
                setattr(module, part, torch.nn.Parameter(shared[key], requires_grad=False))
                kinds.add(type(module).__name__)
            limits = {index: stand.slots * arena.layout.slot_bytes + arena.layout.backbone_bytes, "cpu": 2 * arena.layout.nbytes}
            where = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=sorted(kinds))
            return dispatch_model(model, device_map=where, main_device=index)

    def write(self, texts: Texts) -> Written:
        batch = texts.batches[1]
        assert batch.targets is not None
        few = [replace(batch, targets=tuple(row[:most] for row in batch.targets)) for most in (1, FEW)]
        done = super().write(replace(texts, batches=few))
        done.outputs = None
        return done


@dataclass(frozen=True)
class Kind:
    """How a system is set up, and what there is to choose."""

    make: Callable[[Stand], Writer]
    has_budget: bool = True
    needs_gpu: bool = False
    needs_package: str | None = None


DECODING: dict[str, Kind] = {
    "transformers": Kind(Plain, has_budget=False),
    "resident": Kind(lambda s: Ours(replace(s, budget="100%"), "lookahead"), has_budget=False),
    "sida": Kind(lambda s: Ours(s, "lookahead", predicts=True)),
    "on-demand": Kind(lambda s: Ours(s, "lru", demand=True), needs_gpu=True),
    "accelerate": Kind(Accelerate, needs_gpu=True, needs_package="accelerate"),
}
"""By their names in `bench.systems`, for task generate. Those without a budget come first, in the first budget's turn."""


def check_decoding(config: Config, device: str) -> list[str]:
    """The systems that can run here, in the order given; says which cannot.

    Raises:
        ConfigError: one that is not known, or none that can run.
    """
    from importlib.util import find_spec

    usable = []
    for name in config.bench.systems:
        if name not in DECODING:
            raise ConfigError(f"bench.systems: there is no {name!r} for task generate; known: {', '.join(DECODING)}")
        kind = DECODING[name]
        if kind.needs_gpu and device == "cpu":
            print(f"{name} is left out: it needs a GPU", flush=True)
        elif kind.needs_package is not None and find_spec(kind.needs_package) is None:
            print(f"{name} is left out: it needs {kind.needs_package}; pip install -e '.[bench]'", flush=True)
        else:
            usable.append(name)
    if not usable:
        raise ConfigError("bench.systems names none that can run here")
    return usable
