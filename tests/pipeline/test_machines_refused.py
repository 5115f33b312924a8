"""Who takes the place of a machine that cannot be used: the bookkeeping alone, with machines that are only names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from pipeline import machines as machines_module
from pipeline.machines import Machine, Machines, Wanted
from store.actor import ArenaInfo

ARENA = ArenaInfo(Path("arena"), 1, "identity", False, 0.0)


def remote(answer: object) -> SimpleNamespace:
    return SimpleNamespace(remote=lambda *arguments, **named: answer)


def store(**_: object) -> SimpleNamespace:
    return SimpleNamespace(open=remote(ARENA), close=remote(True), pid=remote(ARENA.pid))


@dataclass
class Spec:
    device: str = "cpu"
    arena: Path = Path("arena")


class Started:
    """An Executor's handle."""

    def __init__(self, node: str):
        self.node, self.ready = node, remote(node)


@pytest.fixture
def there(monkeypatch) -> SimpleNamespace:
    """nodes: those that Ray knows, as it tells of them; killed: actors; started: of stores the nodes."""
    world = SimpleNamespace(nodes=[], killed=[], started=[])

    def start_store(*_: object, node: str) -> SimpleNamespace:
        world.started.append(node)
        return store()

    def start_executors(spec: Spec, count: int, first: int, node: str) -> list[Started]:
        return [Started(node) for _ in range(count)]

    def result(said: object) -> object:
        if said == ["bad"]:
            raise RayError("no libc")
        return said

    ray = SimpleNamespace(nodes=lambda: world.nodes, get=lambda said, timeout: said, kill=world.killed.append)
    monkeypatch.setattr(machines_module, "ray", ray)
    monkeypatch.setattr(machines_module, "result", result)
    monkeypatch.setattr(machines_module, "start_store", start_store)
    monkeypatch.setattr(machines_module, "start_executors", start_executors)
    monkeypatch.setattr(machines_module, "LOOK_S", 3600.0)  # the test looks
    return world


def node(name: str) -> dict[str, object]:
    return {"NodeID": name, "Alive": True, "NodeManagerAddress": name, "Resources": {}}


@pytest.fixture
def machines(there):
    there.nodes = [node("own")]
    actors, wanted = SimpleNamespace(executors=[], pids={}), Wanted(Spec(), Path("arena"), None, None, 1)
    said: list[str] = []
    made = Machines(actors, Machine("own", "own", store(), ARENA, pid=ARENA.pid), wanted, 2, said.append, lambda loss: None)
    made.said, made.actors = said, actors
    yield made
    made.close(False, 0.0)


def look(machines: Machines) -> None:
    """Once, and until what it has begun has ended."""
    before = len(machines._threads)
    machines._look()
    for thread in machines._threads[before:]:
        thread.join(30)


def test_a_machine_that_cannot_be_used_takes_nobodys_place_and_keeps_nothing(machines, there):
    there.nodes.append(node("bad"))
    look(machines)
    assert "machine bad (bad) is not used: no libc" in machines.said
    assert [actor.node for actor in there.killed] == ["bad"]
    there.nodes.append(node("good"))
    look(machines)
    assert [executor.node for executor in machines.actors.executors] == ["good"], "two were wanted, and two there are"
    there.nodes.append(node("third"))
    look(machines)
    assert there.started == ["bad", "good"]


def test_nobody_joins_what_has_been_closed(machines, there):
    machines.close(False, 0.0)
    there.nodes.append(node("late"))
    look(machines)
    assert there.started == []


def test_a_machine_that_was_not_ready_before_the_end_is_told_of(machines, there, monkeypatch):
    there.nodes.append(node("good"))
    look(machines)
    there.nodes = [node("own"), node("slow")]
    monkeypatch.setattr(machines, "_bring", lambda *_: None)
    look(machines)
    machines.close(False, 0.0)
    assert [line for line in machines.said if "not ready" in line] == [
        "machine slow (slow) was not ready before the run ended, and did nothing"
    ]
