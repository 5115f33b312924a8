"""Used from a cluster: a Ray head of the test's own, a submitted job, and a run that joins a Ray that is up.

The head is started with --block, so that ending that one process ends what it started and nothing else; HOME, ports and
directories are the test's own, and so is the authentication token.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, config_data, read_jsonl, save_switch, write_tsv

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """Outside the range of Ray's workers, 10002 to 19999."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port > 20000:
            return port


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A Ray head with token authentication; yields the environment that reaches it."""
    home = tmp_path_factory.mktemp("home")
    sockets = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: a socket's path has 107 bytes
    port, dashboard = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    log = (home / "head.log").open("w+")
    options = {
        "port": port, "dashboard-port": dashboard, "temp-dir": sockets, "num-cpus": 2, "object-store-memory": 100_000_000,
        "ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port(),
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--disable-usage-stats", *flags],
        env=env,
        stdout=log,
        stderr=log,
    )
    try:
        env |= {"HEAD": f"127.0.0.1:{port}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
        wait_for_jobs(env, process, home / "head.log")
        yield env
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(sockets, ignore_errors=True)


def wait_for_jobs(env: dict[str, str], process: subprocess.Popen, log: Path) -> None:
    """Until the head takes jobs: its agent comes up after the dashboard does."""
    for _ in range(60):
        assert process.poll() is None, log.read_text()
        asked = subprocess.run(
            [RAY, "job", "submit", "--address", env["DASHBOARD"], "--", "true"], env=env, capture_output=True, text=True
        )
        if asked.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(log.read_text() + asked.stdout + asked.stderr)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A working directory as a user would submit it: the project's code, a small model, its config."""
    directory = tmp_path_factory.mktemp("project")
    for name in ("pipeline", "predictor", "store", "runner.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / name)
    save_switch(directory / "model")
    write_tsv(directory / "data.tsv")
    (directory / "arenas").mkdir()
    plain = config_data(Path("model"), Path("data.tsv"), directory / "arenas", Path("runs/job"))
    (directory / "config.yaml").write_text(yaml.safe_dump(plain))
    return directory


def submit(head: dict[str, str], project: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--address", head["DASHBOARD"], "--working-dir", "."]
    command += ["--", sys.executable, "runner.py", "run", "config.yaml", *overrides]
    return subprocess.run(command, cwd=project, env=head, capture_output=True, text=True, timeout=300)


def test_a_submitted_job_writes_where_it_was_told(head, project, tmp_path):
    done = submit(head, project, f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 7
    assert list((project / "arenas").iterdir()) == []


def test_a_submitted_job_with_a_relative_output_dir_is_told_the_fix(head, project):
    done = submit(head, project)
    assert done.returncode != 0
    assert "add output_dir=/absolute/path" in done.stdout + done.stderr


def test_a_run_joins_the_ray_that_is_up_and_leaves_it_up(head, project, tmp_path):
    command = [sys.executable, "runner.py", "run", "config.yaml", f"output_dir={tmp_path / 'out'}"]
    env = head | {"RAY_ADDRESS": head["HEAD"]}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 7
    alive = subprocess.run([RAY, "job", "list", "--address", head["DASHBOARD"]], env=head, capture_output=True)
    assert alive.returncode == 0


def test_cluster_address_names_the_ray_before_the_environment_does(head, project):
    script = (
        "import ray\n"
        "from pipeline.cluster import cluster\n"
        f"with cluster({head['HEAD']!r}):\n"
        "    print(ray.get_runtime_context().gcs_address.rpartition(':')[2])\n"
    )
    env = head | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    done = subprocess.run([sys.executable, "-c", script], cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == head["HEAD"].rpartition(":")[2], done.stdout + done.stderr


def test_an_address_where_no_ray_answers_is_one_clear_line(project, tmp_path):
    command = [sys.executable, "runner.py", "run", "config.yaml", f"output_dir={tmp_path / 'out'}"]
    command.append(f"cluster.address=127.0.0.1:{free_port()}")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: cluster.address")]
    assert "Traceback" not in done.stderr
