"""SIGTERM ends what is under way as Ctrl-C does: nothing is left behind, and one line says what happened. Knows no command."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[list[int]]:
    """SIGTERM, which Kubernetes, `ray job stop` and `timeout` send, ends what is under way as Ctrl-C does.

    Yields what has come of it so far. A KeyboardInterrupt, since Ray makes one of whatever a handler raises while it waits.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:  # `timeout` sends two, and what has begun to end is to end well
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def stoppable(command: Callable[[], int | None], again: str = "the same command begins anew") -> int:
    """Runs a command to its end or to a signal; returns the exit code: its own, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        again: what a person can do after that.
    """
    with sigterm_interrupts() as terminated:
        try:
            return command() or 0
        except KeyboardInterrupt:
            print(f"{'stopped by SIGTERM' if terminated else 'interrupted'}; {again}", file=sys.stderr)
            return 143 if terminated else 130
