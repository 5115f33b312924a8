"""Ranks in processes of this machine, without Ray: for tests, and for machines that have none.

Each process reads calls from its pipe as they come, so that the next batch is made ready while one runs, and answers in their
order.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any

from pipeline.batch_result import BatchResult
from pipeline.device import ExecutorSpec
from pipeline.errors import USER_ERRORS
from pipeline.parallel.exchange import PeerLost, Traffic
from pipeline.parallel.group import GroupLost, Step
from pipeline.parallel.membership import START_S, MeetingPlace, Membership
from pipeline.parallel.placement import Assignment
from pipeline.parallel.rank import Rank

GRACE_S = 30.0
"""How long ranks that are told to close may take."""


@dataclass(frozen=True)
class Failed:
    """What a rank's process says of an exception; the original may not travel."""

    error: BaseException | None
    """One that is for the user, as it is."""
    text: str
    lost: bool
    """Another rank is the cause."""


class Processes:
    """See `pipeline.parallel.group.Ranks`."""

    def __init__(self, spec: ExecutorSpec, assignment: Assignment, timeout_s: float):
        """Starts one process per rank and waits until all can work.

        Args:
            spec: of every rank; on a GPU, each rank has one of its own, and sees no other.
            timeout_s: a rank that does not answer for so long is taken for lost.

        Raises:
            GroupLost: a rank has died.
            One of USER_ERRORS: a rank cannot stand.
        """
        self._timeout_s = timeout_s
        self._place = MeetingPlace(assignment, timeout_s)
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for rank in range(assignment.devices):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(spec, self._place.membership(rank), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._said: list[deque[Any]] = [deque() for _ in self._pipes]
        try:
            self._hear(START_S)
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the ranks' processes."""
        return [process.pid or 0 for process in self._processes]

    def submit(self, step: Step) -> None:
        for pipe, call in zip(self._pipes, step.calls(len(self._pipes)), strict=True):
            self._send(pipe, call)

    def answer(self) -> list[BatchResult]:
        return self._hear(self._timeout_s)

    def traffic(self) -> list[Traffic]:
        """What each rank has sent so far. When all steps have been answered."""
        for pipe in self._pipes:
            self._send(pipe, "traffic")
        return self._hear(self._timeout_s)

    def close(self) -> None:
        """Lets every rank give up what it has; `stop` where there is no time for that."""
        for pipe in self._pipes:
            self._send(pipe, None)
        for process in self._processes:
            process.join(GRACE_S)
        self.stop()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def _send(self, pipe: Connection, call: Any) -> None:
        try:
            pipe.send(call)
        except OSError as error:
            raise GroupLost(f"a rank has died: {error}") from error

    def _hear(self, timeout_s: float) -> list[Any]:
        """The next word of every rank."""
        while not all(self._said):
            silent = [pipe for pipe, said in zip(self._pipes, self._said, strict=True) if not said]
            ready = wait(silent, timeout_s)
            if not ready:
                raise GroupLost(f"{len(silent)} of {len(self._pipes)} ranks have said nothing for {timeout_s:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    self._said[rank].append(_understood(self._pipes[rank].recv()))
                except (EOFError, OSError) as error:
                    raise GroupLost(f"rank {rank} has died") from error
        return [said.popleft() for said in self._said]


def _understood(word: Any) -> Any:
    if not isinstance(word, Failed):
        return word
    if word.error is not None:
        raise word.error
    if word.lost:
        raise GroupLost(word.text)
    raise RuntimeError(word.text)


def _work(spec: ExecutorSpec, membership: Membership, pipe: Connection) -> None:
    """The life of a rank's process."""
    if spec.device != "cpu":  # before torch asks CUDA anything
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[membership.rank] if visible else str(membership.rank)
    answers: SimpleQueue[Future[Any] | None] = SimpleQueue()
    try:
        rank = Rank(replace(spec, alone=True), membership)
        pipe.send(rank.ready())
    except BaseException as error:
        pipe.send(_failed(error))
        return
    speaking = threading.Thread(target=_speak, args=(answers, pipe), name="speak")
    speaking.start()
    try:
        while (call := pipe.recv()) is not None:
            if call == "traffic":
                done: Future[Any] = Future()
                done.set_result(rank.traffic)
                answers.put(done)
            else:
                answers.put(rank.step(*call))
        rank.close()
    except EOFError:  # whoever started the group is gone
        os._exit(1)
    finally:
        answers.put(None)


def _speak(answers: SimpleQueue[Future[Any] | None], pipe: Connection) -> None:
    while (answer := answers.get()) is not None:
        try:
            word = answer.result()
        except BaseException as error:
            word = _failed(error)
        pipe.send(word)


def _failed(error: BaseException) -> Failed:
    text = f"{type(error).__name__}: {error}"
    return Failed(error if isinstance(error, USER_ERRORS) else None, text, isinstance(error, PeerLost))
