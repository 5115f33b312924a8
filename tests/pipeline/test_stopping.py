"""A signal ends a command in order, is told in one line, and leaves the process as it was."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.stopping import stoppable


@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGTERM, 143, "stopped by SIGTERM; go on"), (signal.SIGINT, 130, "interrupted; go on")]
)
def test_a_signal_lets_what_was_begun_end(capsys, sent, code, said):
    ended, before = [], signal.getsignal(signal.SIGTERM)
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)

    def command() -> int:
        try:
            os.kill(os.getpid(), sent)
            signal.pause()
        finally:
            ended.append(True)
        return 0

    try:
        assert stoppable(command, "go on") == code
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert ended and capsys.readouterr().err == said + "\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_otherwise_the_exit_code_is_the_commands():
    assert [stoppable(lambda code=code: code) for code in (0, 2, None)] == [0, 2, 0]
