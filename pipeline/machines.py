"""The machines of a run: on each a store with the arena, and Executors. Whoever joins is used, whoever goes takes nothing with it.

A thread of its own looks who is there, so that the driver's loop only finds that it has more Executors. When one does not answer
any more the loop notices by itself. The driver's machine stays: the driver ends with it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from pipeline.actors import ActorLost, Actors, result, start_executors, start_store
from pipeline.device import ExecutorSpec
from pipeline.losses import Loss, Told
from store.actor import ArenaInfo
from store.load import Placement
from store.weights import Source

LOOK_S = 1.0
ANSWER_S = 10.0
"""Who takes longer to say who they are, or to close, has gone with Ray itself, which would be asked for a minute."""
SENDERS = 3
"""So many other machines are asked for the arena, one after the other."""


@dataclass
class Machine:
    """One of them.

    Attributes:
        node: Ray's id.
        name: for people.
        arena: None: not there yet.
        pid: of its store's process, as far as is known.
        joined: its Executors are sent work.
    """

    node: str
    name: str
    store: Any
    arena: ArenaInfo | None = None
    executors: list[Any] = field(default_factory=list)
    pid: int = 0
    joined: bool = False

    @classmethod
    def own(cls, store: Any, arena: ArenaInfo) -> Machine:
        """The driver's, whose Executors are started elsewhere."""
        node = ray.get_runtime_context().get_node_id()
        return cls(node, _name(next(n for n in ray.nodes() if n["NodeID"] == node)), store, arena, pid=arena.pid)


@dataclass(frozen=True)
class Wanted:
    """What is started on a machine.

    Attributes:
        arena: where it lies, unless the machine has another directory for arenas.
        executors: at most; fewer where there are fewer GPUs.
    """

    spec: ExecutorSpec
    arena: Path
    source: Source
    placement: Placement
    executors: int


class Machines:
    """Those of one run, the driver's own among them."""

    def __init__(
        self, actors: Actors, own: Machine, wanted: Wanted, most: int | Literal["all"], say: Callable[[str], None], lost: Told
    ):
        """
        Args:
            most: how many are used at once.
            say: told what joins and what goes.
            lost: told of what has gone.
        """
        self._actors, self._wanted, self._say, self._lost = actors, wanted, say, lost
        self._most = float("inf") if most == "all" else most
        own.joined = True
        self._machines = {own.node: own}
        self._refused: set[str] = set()
        self._numbers = len(actors.executors)
        self._starting, self._counting, self._end = threading.Lock(), threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []
        self.used = [_described(own)]
        """Every machine that ever had the arena, for metrics.json."""
        if self._most > 1:
            self._begin(self._watch)

    def close(self, keep: bool, patience_s: float) -> None:
        """Ends what is on other machines, then every store, which gives its arena up. Never raises: Ray itself may have gone."""
        with self._starting:
            self._end.set()
        if self._most > 1:  # a Ray that is gone, too, would not say who is there
            with contextlib.suppress(RayError):
                self._part()
        for machine in list(self._machines.values()):
            if not machine.joined and machine.node not in self._refused:  # the run was shorter than its start
                self._say(f"machine {machine.name} was not ready before the run ended, and did nothing")
        closing = []
        for machine in list(self._machines.values()):
            with contextlib.suppress(RayError):
                for executor in machine.executors:
                    ray.kill(executor)
                self._look_at_store(machine)
                closing.append((machine.store, machine.store.close.remote(keep, patience_s)))
        for store, closed in closing:
            with contextlib.suppress(RayError):
                ray.get(closed, timeout=patience_s + ANSWER_S)
                ray.kill(store)
        for thread in self._threads:
            thread.join()

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, name="machines", daemon=True))
        self._threads[-1].start()

    def _watch(self) -> None:
        while not self._end.wait(LOOK_S):
            with contextlib.suppress(RayError):
                self._look()

    def _part(self) -> dict[str, dict[str, Any]]:
        """Takes leave of machines that have gone, and returns those that are there, by Ray's id."""
        there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for machine in [machine for node, machine in self._machines.items() if node not in there]:
            if self._machines.pop(machine.node, None) is not None:  # the other thread has not been quicker
                self._lost(Loss("machine", machine.name))
                self._say(f"machine {machine.name} has gone; what it had been sent is sent to others")
        return there

    def _look(self) -> None:
        there = self._part()
        for machine in list(self._machines.values()):
            with contextlib.suppress(RayError):
                self._look_at_store(machine)
        for id, node in there.items():
            if id not in self._machines.keys() | self._refused and len(self._machines.keys() - self._refused) < self._most:
                self._join(id, node)

    def _look_at_store(self, machine: Machine) -> None:
        """Whether its process is still the same."""
        if machine.arena is None:
            return
        pid = ray.get(machine.store.pid.remote(), timeout=ANSWER_S)
        with self._counting:  # one death is one loss, whoever sees it
            restarted, machine.pid = pid != machine.pid, pid
        if restarted:
            self._lost(Loss("store", f"ExpertStore of {machine.name}"))

    def _join(self, id: str, node: dict[str, Any]) -> None:
        count = self._wanted.executors
        if self._wanted.spec.device != "cpu":
            count = min(count, int(node["Resources"].get("GPU", 0)))
        if not count:
            self._refused.add(id)
            return
        with self._starting:
            if self._end.is_set():  # nobody would close it
                return
            store = start_store(self._wanted.arena, self._wanted.source, self._wanted.placement, node=id)
            machine = self._machines[id] = Machine(id, _name(node), store)
        self._begin(self._bring, machine, count)

    def _bring(self, machine: Machine, count: int) -> None:
        """Has the arena come to a machine, starts its Executors, and tells the driver of them when they are ready."""
        try:
            arena = self._arena(machine)
            machine.pid, machine.arena = arena.pid, arena
            with self._starting:
                if self._end.is_set():
                    return
                spec = replace(self._wanted.spec, arena=arena.path)
                machine.executors = start_executors(spec, count, self._numbers, machine.node)
                self._numbers += count
            pids = result([executor.ready.remote() for executor in machine.executors])
        except Exception as error:  # whatever it is, the others go on
            if not self._end.is_set():
                self._refused.add(machine.node)
                self._say(f"machine {machine.name} is not used: {' '.join(str(error).split())}")
                with contextlib.suppress(RayError):
                    for executor in machine.executors:  # their GPUs are for others
                        ray.kill(executor)
            return
        machine.joined = True
        self.used.append(_described(machine))
        self._actors.pids.update((executor, {pid}) for executor, pid in zip(machine.executors, pids, strict=True))
        self._actors.executors.extend(machine.executors)
        self._say(f"machine {machine.name} has joined: {count} Executors; arena by {arena.came_by}")

    def _arena(self, machine: Machine) -> ArenaInfo:
        senders = [other.store for other in list(self._machines.values()) if other.arena is not None]
        for sender in random.sample(senders, min(SENDERS, len(senders))):  # whoever has it can send it: not all ask one
            try:
                return result(machine.store.open.remote(sender=sender))
            except (ActorLost, RayError) as error:
                reason = error
        raise reason


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def _described(machine: Machine) -> dict[str, Any]:
    assert machine.arena is not None
    arena = machine.arena
    return {"name": machine.name, "warm_start": arena.warm_start, "came_by": arena.came_by, "seconds": round(arena.seconds, 4)}
