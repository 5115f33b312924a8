"""The ExpertStore, called plainly: builds once, finds again what was built, and removes only what nobody uses."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from store.actor import ExpertStore
from store.arena import BUILDING, Arena
from store.checkpoint import SINGLE, Checkpoint, CheckpointSource
from store.errors import CheckpointError, SpaceError
from store.load import Placement, routers_identity

PATIENCE_S = 60
PLACEMENT = Placement(
    experts=(tuple({"w": f"e{i}.w"} for i in range(4)),), backbone={"norm": "norm"}, dtype="float32", routers=("router",)
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint: expert i is full of i."""
    made = {f"e{i}.w": torch.full((10, 10), float(i)) for i in range(4)} | {"norm": torch.ones(7), "router": torch.ones(4, 10)}
    (tmp_path / "model").mkdir()
    save_file(made, tmp_path / "model" / SINGLE)
    return tmp_path / "model"


@pytest.fixture
def path(directory: Path, arena_dir: Path) -> Path:
    return PLACEMENT.arena_path(Checkpoint(directory), arena_dir)


@pytest.fixture
def make(path: Path, directory: Path):
    """make() -> an ExpertStore as the driver, or a restart, makes it."""
    return lambda: ExpertStore(path, CheckpointSource(directory), PLACEMENT)


def check(path: Path) -> None:
    arena = Arena.attach(path)
    assert [arena.block(0, i)[:400].view(torch.float32).unique().tolist() for i in range(4)] == [[0], [1], [2], [3]]
    arena.close()


def test_open_builds_the_arena_and_describes_it(make, path, directory):
    store = make()
    assert not path.exists()  # making one costs nothing
    info = store.open()
    check(path)
    assert info.path == path
    assert info.nbytes == 4 * 512 + 256
    assert info.identity == routers_identity(Checkpoint(directory), PLACEMENT)
    assert info.warm_start is False
    assert info.seconds > 0
    assert store.placed_bytes() == 4 * 512 + 7 * 4


def test_opening_again_changes_nothing(make, path):
    store = make()
    info, inode = store.open(), path.stat().st_ino
    assert store.open() == info
    assert path.stat().st_ino == inode


def test_a_second_store_starts_warm(make, path):
    first = make()
    built = first.open()
    second = make()
    found = second.open()
    assert found.warm_start is True
    assert second.placed_bytes() == 0
    assert (found.path, found.nbytes, found.identity) == (built.path, built.nbytes, built.identity)


def test_close_with_keep_leaves_the_file_for_a_warm_start(make, path):
    store = make()
    store.open()
    inode = path.stat().st_ino
    assert store.close(keep=True) is False
    assert path.stat().st_ino == inode
    again = make()
    assert again.open().warm_start is True
    assert path.stat().st_ino == inode
    check(path)
    assert again.close(keep=False) is True  # and was not left in use by the first
    assert not path.exists()


def test_close_without_keep_removes_the_file_and_leaves_the_directory_empty(make, path):
    store = make()
    store.open()
    assert store.close(keep=False) is True
    assert list(path.parent.iterdir()) == []
    assert store.close(keep=False) is False  # twice does no harm


def test_close_does_not_remove_what_another_holds(make, path):
    store = make()
    store.open()
    executor = Arena.attach(path)
    assert store.close(keep=False) is False
    check(path)
    executor.close()
    assert make().close(keep=False) is True
    assert not path.exists()


def test_a_store_that_never_opened_has_nothing_to_remove(make, path):
    assert make().close(keep=False) is False
    assert list(path.parent.iterdir()) == []


def test_a_restarted_store_needs_no_checkpoint(make, path, directory):
    make().open()  # and is killed: never closed
    shutil.rmtree(directory)
    restarted = make()
    assert restarted.open().warm_start is True
    check(path)


def test_a_restarted_store_builds_what_was_not_finished(make, path):
    path.with_name(path.name + BUILDING).write_bytes(b"half built")
    store = make()
    assert store.open().warm_start is False
    check(path)
    assert list(path.parent.iterdir()) == [path]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.001)


def child_opens(answers, path: Path, directory: Path) -> None:
    class Slow(ExpertStore):
        def _count_placed(self, nbytes: int) -> None:
            super()._count_placed(nbytes)
            answers.send(self.placed_bytes())
            time.sleep(PATIENCE_S)

    Slow(path, CheckpointSource(directory), PLACEMENT).open()


def test_a_store_killed_while_loading_is_replaced_by_one_that_loads_all(make, path, directory):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "pytest"])
    answers, theirs = processes.Pipe()
    process = processes.Process(target=child_opens, args=(theirs, path, directory), daemon=True)
    process.start()
    assert answers.poll(PATIENCE_S), "no answer"
    assert answers.recv() == 512  # one expert is placed
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE_S)
    assert make().open().warm_start is False
    check(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_build_under_way_gives_up_when_closed_and_leaves_nothing(make, path, monkeypatch):
    store, placed, go_on = make(), threading.Event(), threading.Event()
    count = store._count_placed

    def slowly(nbytes: int) -> None:
        placed.set()
        assert go_on.wait(PATIENCE_S)
        count(nbytes)

    monkeypatch.setattr(store, "_count_placed", slowly)
    answers: list[object] = []

    def opens() -> None:
        try:
            answers.append(store.open())
        except InterruptedError as error:
            answers.append(error)

    opening = threading.Thread(target=opens, daemon=True)
    opening.start()
    assert placed.wait(PATIENCE_S)
    closing = threading.Thread(target=lambda: answers.append(store.close(keep=True)), daemon=True)
    closing.start()
    until(lambda: store._closing)
    go_on.set()
    opening.join(PATIENCE_S)
    closing.join(PATIENCE_S)
    assert isinstance(answers[0], InterruptedError)
    assert answers[1] is False
    assert list(path.parent.iterdir()) == []
    store.open()  # and it may be asked again
    check(path)


def test_close_waits_for_those_who_are_about_to_end(make, path):
    store = make()
    store.open()
    executor = Arena.attach(path)
    threading.Timer(0.1, executor.close).start()
    assert store.close(keep=False, patience_s=PATIENCE_S) is True
    assert not path.exists()


def test_a_checkpoint_that_is_not_there_is_refused_when_opened_and_the_store_can_be_asked_again(make, path, directory):
    shutil.move(directory, directory.with_name("elsewhere"))
    store = make()
    with pytest.raises(CheckpointError, match="model"):
        store.open()
    assert store.close(keep=False) is False
    shutil.move(directory.with_name("elsewhere"), directory)
    store.open()
    check(path)


def test_no_room_is_an_error_with_the_shortfall_and_leaves_nothing(make, path, monkeypatch):
    monkeypatch.setattr("store.arena.free_bytes", lambda directory: 1000)
    with pytest.raises(SpaceError, match=r"1000 are free: \d+ bytes short"):
        make().open()
    assert list(path.parent.iterdir()) == []
