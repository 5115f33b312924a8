"""The actors of a run: how they are started, waited for and ended, and how their errors come back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.device import ExecutorSpec
from pipeline.dispatch import MAX_WAITING
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.executor import Executor
from pipeline.predicting.rehearsal import ArenaModel
from predictor.actor import Predictor
from predictor.registry import STEPPING, PredictorSpec
from predictor.tokens import TokenBatch
from store.actor import ArenaInfo, ExpertStore
from store.load import Placement
from store.weights import Source

CALL_RETRIES = 5
"""A batch during which the Executor dies more often than this is taken for the cause."""


_STARTED = count(1)


class ActorLost(RuntimeError):
    """An actor will not answer a call any more: its machine has gone, or it died too often during that call."""


def start_actor(cls: type, *arguments: Any, node: str | None = None, name: str | None = None, **options: Any) -> Any:
    """An actor of `cls`, restarted when it dies, its unanswered calls repeated.

    Args:
        node: Ray's id of the machine, where its arena is; None: this one. When that has gone the actor has, too.
        name: what dashboard and logs call it; None: its class.
    """
    options["name"] = f"{name or cls.__name__}-{os.getpid()}.{next(_STARTED)}"  # drivers may share a namespace
    there: Any = NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)
    durable = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=CALL_RETRIES, scheduling_strategy=there, **options)
    return durable(cls).remote(*arguments)


def start_store(path: Path, source: Source, placement: Placement, node: str | None = None) -> Any:
    """The ExpertStore actor of a machine. Several calls at once: a build is asked how far it is, another machine for chunks.

    Args:
        node: another machine than this; see `start_actor`.
    """
    return start_actor(ExpertStore, path, source, placement, node is not None, node=node, max_concurrency=8)


def with_predictor(spec: ExecutorSpec, predictor: PredictorSpec, here: bool) -> ExecutorSpec:
    """What an Executor is made of, with the predictors that are to be in its own process.

    Args:
        here: all of it: nobody sends tables.
    """
    if spec.task.forwards > 1 and predictor.kind in STEPPING:
        spec = replace(spec, stepping=replace(predictor, device="cpu"))
    return replace(spec, predictor=predictor if here else None)


def start_executors(spec: ExecutorSpec, wanted: int, first: int = 0, node: str | None = None) -> list[Any]:
    """So many of one machine, numbered from `first`, each with a GPU of its own where `spec` names one."""
    options: dict[str, Any] = {"max_concurrency": MAX_WAITING + 1}
    if spec.device != "cpu":
        options["num_gpus"] = 1  # Ray shows an actor only those that it asked for
    return [
        start_actor(Executor, replace(spec, number=number, alone=True), node=node, name=f"Executor-{number}", **options)
        for number in range(first, first + wanted)
    ]


def open_store(store: Any, progress: Callable[[int], None]) -> ArenaInfo:
    """Waits for the arena, telling how many bytes are placed."""
    info = store.open.remote()
    while not ray.wait([info], timeout=0.5)[0]:
        progress(result(store.placed_bytes.remote()))
    return result(info)


@dataclass(frozen=True)
class Actors:
    """The Predictor and the Executors of a run.

    Attributes:
        predictor: None: the Executors have the predictor in their own processes.
        executors: those that can be sent work; other machines' come and go (machines.py).
        pids: of each actor the processes that it has been seen to be, that of `ready` first. Who answers from another has died.
    """

    predictor: Any
    executors: list[Any]
    pids: dict[Any, set[int]] = field(default_factory=dict)

    @classmethod
    def start(
        cls, spec: ExecutorSpec, predictor: PredictorSpec, arena: ArenaInfo, threads: int, here: bool = False, executors: int = 1
    ) -> Actors:
        """Starts all; `ready` waits for them.

        Args:
            here: the predictor runs in the Executors' processes, on their devices.
            executors: how many, each with a GPU of its own where `spec` names one.

        Raises:
            ConfigError: GPUs are wanted that Ray does not have.
        """
        own: dict[str, Any] = {} if here or predictor.device == "cpu" else {"num_gpus": 1}
        wanted, there = (executors if spec.device != "cpu" else 0) + len(own), gpus_here()
        if wanted > there:
            raise ConfigError(
                f"executors: {executors} take {wanted} GPUs{' with the Predictor' if own else ''}, and this Ray has "
                f"{there or 'none'} to give here; write `device: cpu`, fewer executors, or start it with "
                f"`ray start --num-gpus {wanted}`"
            )
        asked = None
        if not here:
            asked = start_actor(Predictor, predictor, ArenaModel(spec.model, arena.path), threads, **own)
        return cls(asked, start_executors(with_predictor(spec, predictor, here), executors))

    def ready(self) -> None:
        """Waits until all can work.

        Raises:
            PredictorError: the predictor's file cannot be used.
        """
        for actor, pid in zip(self._all, result([actor.ready.remote() for actor in self._all]), strict=True):
            self.pids.setdefault(actor, set()).add(pid)

    def finish(self) -> None:
        """All is done: the Executors give up the arena."""
        for closed in [executor.close.remote() for executor in self.executors]:
            with contextlib.suppress(ActorLost):  # whoever has gone has given it up
                result(closed)

    def stop(self) -> None:
        """Ends all, whatever they are doing; their locks on the arena go with their processes, shortly after."""
        for actor in self._all:
            ray.kill(actor)

    def predict(self, tokens: TokenBatch) -> ray.ObjectRef:
        """Asks for a table. Where the Executors make them, they do so in turn."""
        if self.predictor is not None:
            return self.predictor.predict.remote(tokens)
        self.executors.append(self.executors.pop(0))
        return self.executors[-1].predict.remote(tokens)

    @property
    def _all(self) -> list[Any]:
        return [*self.executors, *([self.predictor] if self.predictor is not None else [])]


def result(refs: Any) -> Any:
    """ray.get, with errors as they were raised rather than as Ray wraps them."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, USER_ERRORS):
            raise cause from None
        raise
    except (RayActorError, ActorUnschedulableError) as error:
        name = getattr(error, "actor_class_name", None) or "an actor"
        reason = " ".join(str(error).split())
        raise ActorLost(f"{name} died {CALL_RETRIES + 1} times during one call, or its machine has gone: {reason}") from None


def gpus_here() -> int:
    """GPUs that Ray has to give on this machine."""
    node = ray.get_runtime_context().get_node_id()
    return int(next(n["Resources"].get("GPU", 0) for n in ray.nodes() if n["NodeID"] == node))
