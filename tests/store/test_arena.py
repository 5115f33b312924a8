"""The arena: whole or absent under its name, shared by processes, read-only, kept while used, and no trace of whoever dies.

Other processes come from a fork server that has torch imported (a spawned one would import it for seconds) and, unlike forks of
the test, hold none of its descriptors, and so none of its locks.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
import resource
import signal
import stat
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import store.arena
from store.arena import BUILDING, Arena, arena_path, build, clean, remove_unfinished
from store.errors import SpaceError
from store.layout import ArenaLayout
from store.room import free_bytes

PATIENCE_S = 60
LAYOUT = ArenaLayout.of(
    [(4, {"wi": ((3, 5), "float32"), "wo": ((5,), "float32")}), (2, {"wi": ((100, 7), "float32")})], {"norm": ((9,), "float32")}
)
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "pytest"])


def contents(seed: int = 0) -> torch.Tensor:
    """All data of an arena; different for every seed in every block."""
    return torch.rand(LAYOUT.nbytes // 4, generator=torch.Generator().manual_seed(seed)).view(torch.uint8)


def fill_with(seed: int) -> Callable[[torch.Tensor], None]:
    def fill(memory: torch.Tensor) -> None:
        memory.copy_(contents(seed))

    return fill


def make(path: Path, seed: int = 0) -> Arena:
    return build(path, LAYOUT, f"id-{seed}", fill_with(seed))


def leave(path: Path, seed: int = 0) -> Path:
    """An arena that nobody uses."""
    make(path, seed).close()
    return path


def holds(arena: Arena, seed: int) -> bool:
    return arena.identity == f"id-{seed}" and torch.equal(arena.memory, contents(seed))


def inode(path: Path) -> int:
    return path.stat().st_ino


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


class Child:
    """Another process, which answers through a pipe; `target` gets the other end first."""

    def __init__(self, target: Callable, *args):
        self._answers, theirs = processes.Pipe()
        self.process = processes.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self):
        assert self._answers.poll(PATIENCE_S), "no answer"
        return self._answers.recv()

    def go(self) -> None:
        self._answers.send("go")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.exit_code() == -signal.SIGKILL

    def exit_code(self) -> int | None:
        self.process.join(PATIENCE_S)
        return self.process.exitcode


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """Starts processes that end with the test."""
    started: list[Child] = []

    def start(target: Callable, *args) -> Child:
        started.append(Child(target, *args))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.join(PATIENCE_S)


@pytest.fixture
def path(arena_dir: Path) -> Path:
    return arena_path(arena_dir, "0123abcd")


# What other processes do.


def child_uses(answers, path: Path) -> None:
    """Attaches, describes what it sees, and keeps it until told to go."""
    arena = Arena.attach(path)
    if arena is None:
        answers.send(None)
        return
    blocks = {}
    for layer, layout in enumerate(arena.layout.layers):
        for expert in range(layout.experts):
            block = arena.block(layer, expert)
            blocks[layer, expert] = (block.data_ptr() % 256, hashlib.sha256(block.numpy().tobytes()).hexdigest())
    norm = arena.backbone()["norm"]
    answers.send((arena.identity, blocks, norm.data_ptr() % 256, norm.tolist()))
    answers.recv()
    arena.close()


def child_builds(answers, path: Path, seed: int, filled: Path, wait_for_go: bool = False) -> None:
    """Builds or attaches; a line in `filled` tells that it was this process that filled the arena."""

    def fill(memory: torch.Tensor) -> None:
        with filled.open("a") as f:
            f.write(f"{os.getpid()}\n")
        half = memory.numel() // 2
        memory[:half] = contents(seed)[:half]
        if wait_for_go:
            answers.send("filling")
            answers.recv()
        memory.copy_(contents(seed))

    arena = build(path, LAYOUT, f"id-{seed}", fill, poll_s=0.005)
    answers.send(
        (inode(path), os.fstat(arena._fd).st_ino, arena.identity, hashlib.sha256(arena.memory.numpy().tobytes()).hexdigest())
    )
    answers.recv()


def child_writes(answers, path: Path, built_here: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    arena = make(path) if built_here else Arena.attach(path)
    answers.send("about to write")
    arena.block(0, 1)[3] = 7
    answers.send("written")


def child_builds_with_an_open_umask(answers, path: Path) -> None:
    os.umask(0)
    arena = build(path, LAYOUT, "id-0", lambda memory: answers.send(stat.S_IMODE(os.stat(f"{path}{BUILDING}").st_mode)))
    answers.send(stat.S_IMODE(path.stat().st_mode))
    arena.close()


# Attaching and reading.


def test_attaching_an_arena_that_is_not_there_gives_none_and_makes_nothing(arena_dir, path):
    assert Arena.attach(path) is None
    assert Arena.attach(arena_dir / "no" / "such" / "directory") is None
    assert files(arena_dir) == []


def test_an_arena_is_named_by_user_and_fingerprint(arena_dir):
    assert arena_path(arena_dir, "f00d") == arena_dir / f"sida-{os.getuid()}-f00d"


def test_another_process_finds_the_right_bytes_in_every_block_at_aligned_addresses(path, child):
    arena = make(path, 3)
    identity, blocks, norm_at, norm = child(child_uses, path).answer()
    data = contents(3)
    assert identity == "id-3"
    assert blocks.keys() == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    for (layer, expert), (misaligned, digest) in blocks.items():
        start = LAYOUT.layers[layer].expert_offset(expert)
        expected = data[start : start + LAYOUT.layers[layer].block.nbytes]
        assert misaligned == 0
        assert digest == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
        assert torch.equal(arena.block(layer, expert), expected)
    assert norm_at == 0
    assert norm == LAYOUT.backbone[0].view(data).tolist()


def test_an_arena_describes_itself(path):
    leave(path, 1)
    arena = Arena.attach(path)
    assert arena.layout == LAYOUT
    assert arena.identity == "id-1"
    assert arena.memory.numel() == LAYOUT.nbytes
    assert list(arena.backbone()) == ["norm"]


def test_building_what_is_there_attaches_it_and_fills_nothing(path):
    leave(path, 1)
    first = inode(path)
    arena = build(path, LAYOUT, "id-2", lambda memory: pytest.fail("filled again"))
    assert holds(arena, 1)
    assert inode(path) == first


def test_only_its_owner_may_read_an_arena_finished_or_not_whatever_the_umask(path, child):
    builder = child(child_builds_with_an_open_umask, path)
    assert builder.answer() == 0o600
    assert builder.answer() == 0o600


@pytest.mark.parametrize("built_here", [False, True], ids=["a user", "the builder itself"])
def test_a_write_into_a_finished_arena_ends_the_process_and_changes_nothing(path, child, built_here):
    if not built_here:
        leave(path)
    writer = child(child_writes, path, built_here)
    assert writer.answer() == "about to write"
    assert writer.exit_code() == -signal.SIGSEGV
    assert holds(Arena.attach(path), 0)


def test_views_outlive_close_and_the_file(path):
    arena = make(path, 1)
    block = arena.block(1, 1)
    expected = block.clone()
    assert arena.remove()
    assert torch.equal(block, expected)
    del arena
    assert torch.equal(block, expected)


# Whoever dies.


def test_a_builder_killed_in_the_middle_leaves_nothing_that_is_trusted(arena_dir, path, child, tmp_path):
    builder = child(child_builds, path, 1, tmp_path / "filled", True)
    assert builder.answer() == "filling"
    assert Arena.attach(path) is None  # half built is not there
    builder.kill()
    assert Arena.attach(path) is None
    assert files(arena_dir) == [path.name + BUILDING]
    arena = make(path, 2)
    assert holds(arena, 2)
    assert files(arena_dir) == [path.name]


def test_what_a_killed_builder_left_is_not_even_read(arena_dir, path, child):
    """A longer leftover, full of ones: the arena built in its place has its own size and bytes."""
    (arena_dir / (path.name + BUILDING)).write_bytes(b"\xff" * 10 * LAYOUT.nbytes)
    small = make(arena_dir / "other", 5)
    arena = build(path, LAYOUT, "id-0", lambda memory: None)  # fills nothing: what shows through?
    assert arena.memory.count_nonzero() == 0
    assert path.stat().st_size == small.path.stat().st_size


def test_clean_removes_what_a_killed_builder_left_but_nothing_that_is_being_built(arena_dir, path, child, tmp_path):
    builder = child(child_builds, path, 1, tmp_path / "filled", True)
    assert builder.answer() == "filling"
    leftover = arena_dir / (path.name + BUILDING)
    assert clean(arena_dir) == ([], [leftover])
    nbytes = leftover.stat().st_size
    assert nbytes >= LAYOUT.nbytes
    builder.kill()
    removed, in_use = clean(arena_dir)
    assert [(r.path, r.nbytes) for r in removed] == [(leftover, nbytes)]
    assert in_use == []
    assert files(arena_dir) == []


def test_what_a_killed_builder_left_is_removed_and_what_is_being_built_is_not(arena_dir, path, child, tmp_path):
    remove_unfinished(path, 0)  # there is none
    builder = child(child_builds, path, 1, tmp_path / "filled", True)
    assert builder.answer() == "filling"
    remove_unfinished(path, 0.1)
    assert files(arena_dir) == [path.name + BUILDING]
    builder.kill()
    remove_unfinished(path, 5)
    assert files(arena_dir) == []


def test_a_builder_that_was_cleaned_away_early_still_ends_with_a_whole_arena(arena_dir, path, child, tmp_path):
    builder = child(child_builds, path, 1, tmp_path / "filled", True)
    assert builder.answer() == "filling"
    clean(arena_dir)
    builder.go()
    there, held, *_ = builder.answer()
    assert there == held
    assert holds(Arena.attach(path), 1)


def test_an_arena_in_use_is_removed_neither_by_clean_nor_by_another_user(arena_dir, path, child):
    leave(path)
    user = child(child_uses, path)
    assert user.answer() is not None
    assert clean(arena_dir) == ([], [path])
    assert Arena.attach(path).remove() is False
    assert holds(Arena.attach(path), 0)


@pytest.mark.parametrize("by_clean", [False, True], ids=["remove", "clean"])
def test_a_killed_user_holds_nothing(arena_dir, path, child, by_clean):
    leave(path)
    user = child(child_uses, path)
    assert user.answer() is not None
    user.kill()
    if by_clean:
        assert [r.path for r in clean(arena_dir)[0]] == [path]
    else:
        assert Arena.attach(path).remove()
    assert not path.exists()


def test_the_last_of_two_users_removes_the_file(path):
    first, second = make(path), Arena.attach(path)
    assert first.remove() is False
    assert path.exists()
    assert torch.equal(second.memory, contents())
    assert second.remove() is True
    assert not path.exists()


def test_closing_gives_the_arena_up_although_views_are_left(arena_dir, path):
    arena = make(path)
    block = arena.block(0, 0)
    arena.close()
    arena.close()  # twice does no harm
    removed, _ = clean(arena_dir)
    assert [r.path for r in removed] == [path]
    assert block.numel() == LAYOUT.layers[0].block.nbytes


def test_clean_touches_no_other_file_and_says_what_it_freed(arena_dir):
    strangers = [f"sida-{os.getuid() + 1}-aaaa", f"sida-{os.getuid()}", "sida-", "something else", f"sida-{os.getuid()}0-aaaa"]
    for name in strangers:
        (arena_dir / name).write_bytes(b"x")
    mine = [leave(arena_path(arena_dir, f"{i}")) for i in range(2)]
    kept = make(arena_path(arena_dir, "9"))
    size = kept.path.stat().st_size
    removed, in_use = clean(arena_dir)
    assert [(r.path, r.nbytes) for r in removed] == [(path, size) for path in mine]
    assert in_use == [kept.path]
    assert files(arena_dir) == sorted([*strangers, kept.path.name])


# Builders at once.


@pytest.mark.parametrize("count", [2, 4])
def test_of_builders_at_once_one_fills_and_all_attach_the_same_file(arena_dir, path, child, tmp_path, count):
    filled = tmp_path / "filled"
    first = child(child_builds, path, 0, filled, True)
    assert first.answer() == "filling"
    others = [child(child_builds, path, i, filled) for i in range(1, count)]
    assert not any(other._answers.poll(0.1) for other in others)  # none has an arena before it is whole
    first.go()
    answers = [builder.answer() for builder in (first, *others)]
    assert len(set(answers)) == 1
    there, held, identity, digest = answers[0]
    assert there == held == inode(path)
    assert (identity, digest) == ("id-0", hashlib.sha256(contents(0).numpy().tobytes()).hexdigest())
    assert filled.read_text().split() == [str(first.process.pid)]
    assert files(arena_dir) == [path.name]


def test_of_builders_that_start_at_the_same_moment_one_fills(arena_dir):
    """Threads: descriptors, and so locks, of their own, and nothing between them and the first step."""
    for round_ in range(25):
        path = arena_path(arena_dir, f"{round_}")
        fills, arenas = [], []
        start = threading.Barrier(4)

        def run(seed: int, path=path, fills=fills, arenas=arenas, start=start) -> None:
            def fill(memory: torch.Tensor) -> None:
                fills.append(seed)
                memory.copy_(contents(seed))

            start.wait(PATIENCE_S)
            arenas.append(build(path, LAYOUT, f"id-{seed}", fill, poll_s=0.001))

        in_threads([lambda seed=seed: run(seed) for seed in range(4)])
        assert len(fills) == 1
        assert len(arenas) == 4
        assert all(holds(arena, fills[0]) for arena in arenas)
        assert len({os.fstat(arena._fd).st_ino for arena in arenas} | {inode(path)}) == 1
        for arena in arenas:
            arena.close()
    assert len(files(arena_dir)) == 25  # and nothing half built


def test_a_waiting_builder_takes_over_from_a_killed_one(path, child, tmp_path):
    first = child(child_builds, path, 1, tmp_path / "filled", True)
    assert first.answer() == "filling"
    second = child(child_builds, path, 2, tmp_path / "filled")
    assert not second._answers.poll(0.1)
    first.kill()
    there, held, identity, _ = second.answer()
    assert (there, identity) == (held, "id-2")
    assert holds(Arena.attach(path), 2)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_a_builder_that_raises_leaves_nothing_behind_and_its_error_unchanged(arena_dir, path, error):
    def fill(memory: torch.Tensor) -> None:
        views = [memory[i : i + 10] for i in range(5)]  # kept by the traceback, as every filler's are
        views[0].fill_(1)
        raise error("half way")

    with pytest.raises(error, match="half way"):
        build(path, LAYOUT, "id", fill)
    assert files(arena_dir) == []
    assert holds(make(path, 2), 2)


def test_a_waiting_builder_takes_over_from_one_that_raises(path):
    filling, may_fail = threading.Event(), threading.Event()

    def fail(memory: torch.Tensor) -> None:
        filling.set()
        assert may_fail.wait(PATIENCE_S)
        raise BrokenError

    def first() -> None:
        with pytest.raises(BrokenError):
            build(path, LAYOUT, "id", fail)

    def second() -> None:
        assert filling.wait(PATIENCE_S)
        threading.Timer(0.05, may_fail.set).start()
        arena = build(path, LAYOUT, "id-2", fill_with(2), poll_s=0.005)
        assert holds(arena, 2)

    in_threads([first, second])


# Removal while others attach. First the windows one by one, opened by hand, then all at once.


@pytest.fixture
def before_flock(monkeypatch) -> Callable[[int, Callable[[], None]], list[int]]:
    """before_flock(operation, act): act() runs once, just before the next flock of that kind; the kernel's part is real."""
    real = store.arena.fcntl.flock

    def arrange(operation: int, act: Callable[[], None]) -> list[int]:
        calls: list[int] = []

        def flock(fd: int, op: int) -> None:
            if op == operation and not calls:
                calls.append(op)
                act()
            real(fd, op)

        monkeypatch.setattr(store.arena.fcntl, "flock", flock)
        return calls

    return arrange


SHARED, EXCLUSIVE = store.arena.fcntl.LOCK_SH, store.arena.fcntl.LOCK_EX | store.arena.fcntl.LOCK_NB


def test_an_arena_removed_between_opening_and_locking_it_is_not_attached(arena_dir, path, before_flock):
    leave(path)
    assert before_flock(SHARED, path.unlink) == []
    assert Arena.attach(path) is None


def test_an_arena_replaced_between_opening_and_locking_it_is_attached_in_its_new_form(arena_dir, path, before_flock):
    leave(path, 1)
    new = leave(arena_dir / "new", 2)
    before_flock(SHARED, lambda: os.rename(new, path))
    arena = Arena.attach(path)
    assert holds(arena, 2)
    assert os.fstat(arena._fd).st_ino == inode(path)


def test_an_arena_cleaned_away_between_publishing_and_use_is_built_again(arena_dir, path, monkeypatch):
    """Changing an exclusive lock into a shared one gives it up for a moment."""
    real, removed, fills = store.arena.fcntl.flock, [], []

    def flock(fd: int, operation: int) -> None:
        if operation == SHARED and path.exists() and not removed:
            real(fd, store.arena.fcntl.LOCK_UN)
            removed.append(True)
            assert [r.path for r in clean(arena_dir)[0]] == [path]
        real(fd, operation)

    monkeypatch.setattr(store.arena.fcntl, "flock", flock)
    arena = build(path, LAYOUT, "id-0", lambda memory: (fills.append(1), memory.copy_(contents(0))))
    assert removed
    assert len(fills) == 2
    assert os.fstat(arena._fd).st_ino == inode(path)
    assert holds(arena, 0)


def test_a_building_file_cleaned_away_before_it_is_locked_is_made_again(arena_dir, path, before_flock):
    calls = before_flock(EXCLUSIVE, lambda: os.unlink(f"{path}{BUILDING}"))
    arena = build(path, LAYOUT, "id-0", fill_with(0), poll_s=0)
    assert calls
    assert holds(arena, 0)
    assert os.fstat(arena._fd).st_ino == inode(path)
    assert files(arena_dir) == [path.name]


def test_an_arena_finished_by_another_just_before_the_lock_is_attached_not_built_over(arena_dir, path, before_flock):
    finished: list[Arena] = []

    def another_finishes() -> None:
        aside = leave(arena_dir / "aside", 7)
        os.rename(aside, path)
        finished.append(Arena.attach(path))

    calls = before_flock(EXCLUSIVE, another_finishes)
    arena = build(path, LAYOUT, "id-0", lambda memory: pytest.fail("built over"), poll_s=0)
    assert calls
    assert holds(arena, 7)
    assert os.fstat(arena._fd).st_ino == os.fstat(finished[0]._fd).st_ino == inode(path)
    assert files(arena_dir) == [path.name]


def test_clean_does_not_remove_an_arena_that_took_the_place_of_the_one_it_opened(arena_dir, path, before_flock):
    leave(path, 1)
    new = leave(arena_dir / "new", 2)
    calls = before_flock(EXCLUSIVE, lambda: os.rename(new, path))
    removed, _ = clean(arena_dir)
    assert calls
    assert removed == []
    assert holds(Arena.attach(path), 2)


def test_cleaning_all_the_time_never_leaves_a_user_with_an_arena_that_is_not_the_one_at_its_path(arena_dir, path):
    expected = contents()
    done = threading.Event()
    seen = Counter()

    def check(arena: Arena, what: str) -> None:
        seen[what] += 1
        mine = os.fstat(arena._fd).st_ino
        assert mine == inode(path)
        time.sleep(0.0002)  # the cleaner looks, and must find it in use
        assert mine == inode(path)
        assert torch.equal(arena.memory, expected)
        arena.close()
        time.sleep(0.0002)  # and may find it free

    def fill(memory: torch.Tensor) -> None:
        seen["filled"] += 1
        memory.copy_(expected)

    def builds() -> None:
        while not done.is_set():
            check(build(path, LAYOUT, "id-0", fill, poll_s=0.0002), "built or attached")

    def attaches() -> None:
        while not done.is_set():
            arena = Arena.attach(path)
            if arena is not None:
                check(arena, "attached")

    def cleans() -> None:
        deadline = time.monotonic() + PATIENCE_S / 2
        try:
            while seen["removed"] < 200 and time.monotonic() < deadline:
                seen["removed"] += path in [r.path for r in clean(arena_dir)[0]]
        finally:
            done.set()

    in_threads([builds, attaches, cleans])
    assert seen["removed"] and seen["filled"] and seen["attached"]  # it did race, as often as this machine can
    clean(arena_dir)
    assert files(arena_dir) == []


# No room.


def check_refusal(error: SpaceError, directory: Path) -> tuple[int, ...]:
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"{directory}: the arena needs ")
    needs, free, short = map(int, re.search(r"needs (\d+) bytes, (\d+) are free: (\d+) bytes short", message).groups())
    assert short == needs - free > 0
    return needs, free


def test_an_arena_larger_than_what_is_free_is_refused_with_the_shortfall_before_a_byte_is_taken(arena_dir, path, monkeypatch):
    size = leave(arena_path(arena_dir, "same")).stat().st_size
    clean(arena_dir)
    monkeypatch.setattr(store.arena, "free_bytes", lambda directory: size - 1)
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: pytest.fail("took space"))
    with pytest.raises(SpaceError) as error:
        build(path, LAYOUT, "id", lambda memory: pytest.fail("filled"))
    assert check_refusal(error.value, arena_dir) == (size, size - 1)
    assert "clean" in str(error.value)
    assert files(arena_dir) == []
    monkeypatch.undo()
    monkeypatch.setattr(store.arena, "free_bytes", lambda directory: size)
    make(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_arena_that_cannot_be_reserved_is_refused_and_leaves_nothing(arena_dir, path, monkeypatch, number):
    def full(fd: int, offset: int, nbytes: int) -> None:
        os.truncate(fd, nbytes // 2)  # it may stop half way
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpaceError, match=rf"^{arena_dir}: cannot reserve \d+ bytes .*{os.strerror(number)}$"):
        build(path, LAYOUT, "id", lambda memory: pytest.fail("filled"))
    assert files(arena_dir) == []


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a filesystem here")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


LARGE = ArenaLayout.of([(2, {"w": ((2**18,), "float32")})], {})


def test_a_small_filesystem_refuses_a_large_arena_and_stays_empty(tiny):
    with pytest.raises(SpaceError) as error:
        build(arena_path(tiny, "large"), LARGE, "id", lambda memory: pytest.fail("filled"))
    needs, free = check_refusal(error.value, tiny)
    assert needs > LARGE.nbytes == 2 * 2**20
    assert free == 2**20
    assert files(tiny) == []
    make(arena_path(tiny, "small")).close()


def test_a_filesystem_that_fills_up_meanwhile_is_an_error_and_no_signal(tiny, monkeypatch):
    monkeypatch.setattr(store.arena, "free_bytes", lambda directory: 2**40)
    with pytest.raises(SpaceError, match="cannot reserve"):
        build(arena_path(tiny, "large"), LARGE, "id", lambda memory: pytest.fail("filled"))
    assert files(tiny) == []
    assert free_bytes(tiny) == 2**20  # as imported: the real one


def test_shared_memory_has_no_more_room_than_there_is_ram(monkeypatch, tmp_path):
    monkeypatch.setattr("store.room.available_memory", lambda: 12345)
    assert free_bytes(Path("/dev/shm")) == 12345
    stat = os.statvfs(tmp_path)
    assert free_bytes(tmp_path) == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.2)


def in_threads(targets: list[Callable[[], None]]) -> None:
    """Runs them at once; raises the first error of any."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "stuck"
