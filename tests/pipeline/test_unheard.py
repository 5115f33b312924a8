"""What `| head` does to a command: nothing."""

from __future__ import annotations

import os
import subprocess
import sys

from pipeline.unheard import unheard
from tests.conftest import ROOT


def test_what_nobody_reads_any_more_is_written_nowhere_and_ends_nothing():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as plain:
        stream = unheard(plain)
        print("heard", file=stream, flush=True)
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        for _ in range(3):
            print("unheard", file=stream, flush=True)
        stream.write("left in the buffer")
        stream.close()


def test_what_python_does_not_buffer_is_heard_line_by_line():
    """As in a job of Ray's, which sets PYTHONUNBUFFERED."""
    code = "import sys; from pipeline.unheard import unheard; sys.stdout = unheard(sys.stdout); print('heard'); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdin is not None
        assert running.stdout.readline() == b"heard\n"
        running.stdin.close()


def test_the_launcher_ends_as_it_would_have(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "runner.py", "clean", tmp_path], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
