"""Ray clusters of a test's own: several nodes on this machine, each with a directory for its arenas, and the means to kill them.

What is to happen in the middle of a run is done by the driver itself, between two batches: so it happens every time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline import run as run_module
from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.reports.output import OutputDir
from store.actor import DIRECTORY

OBJECT_STORE = 100 * 2**20
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "metrics_report_interval_ms": 1000,
}
"""A node that does not answer is given up after 5 s instead of 15, and figures come every second instead of every ten."""


class Nodes:
    """A head, to which the test is connected as a driver, and nodes that come and go. Nothing of it outlives `several`."""

    def __init__(self, root: Path):
        self._root = root
        self._named: dict[str, Any] = {}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
                "_system_config": QUICK,
            },
        )
        self._connection = contextlib.ExitStack()
        self._connection.enter_context(cluster(self._cluster.address))

    @property
    def names(self) -> list[str]:
        return sorted(self._named)

    def add(self, name: str, has_directory: bool = True) -> None:
        """A node whose arenas lie in `arenas(name)`."""
        if has_directory:
            self.arenas(name).mkdir(exist_ok=True)
        own = {DIRECTORY: str(self.arenas(name))}
        self._named[name] = self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE, env_vars=own)

    def arenas(self, name: str) -> Path:
        return self._root / f"arenas-{name}"

    def kill(self, name: str) -> None:
        """As when the power goes: the raylet first, so that nobody can say goodbye, then whatever it had started."""
        node = self._named.pop(name)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        orphans = raylet.children(recursive=True)
        for process in (raylet, *orphans):
            with contextlib.suppress(psutil.Error):
                os.kill(process.pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def processes(self, name: str) -> list[psutil.Process]:
        """Of the actors of a class, on any node, the oldest first."""
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            with contextlib.suppress(psutil.Error):
                title = (process.info["cmdline"] or [""])[0]
                if title.startswith(f"ray::{name}") and self._is_ours(process):
                    found.append(process)
        return sorted(found, key=lambda process: process.info["create_time"])

    def figures(self) -> str:
        """What Prometheus would be told by the head."""
        port = next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            return page.read().decode()

    def logs(self) -> str:
        """What the head's actors have written."""
        directory = Path(self._cluster.head_node.get_logs_dir_path())
        return "".join(file.read_text(errors="replace") for file in directory.glob("worker-*.err"))

    def shut_down(self) -> None:
        self._connection.close()
        self._cluster.shutdown()

    def _is_ours(self, process: psutil.Process) -> bool:
        raylets = {node.all_processes["raylet"][0].process.pid for node in self._cluster.list_all_nodes()}
        return bool(raylets & {parent.pid for parent in process.parents()})


@contextlib.contextmanager
def several(root: Path) -> Iterator[Nodes]:
    nodes = Nodes(root)
    try:
        yield nodes
    finally:
        nodes.shut_down()


class Scripted(OutputDir):
    """Does what a test wants done when so many batches are in the journal."""

    script: Mapping[int, Callable[[], None]] = {}

    def add(self, entry: dict[str, Any]) -> None:
        super().add(entry)
        if "batch" in entry:
            self.batches = getattr(self, "batches", 0) + 1
            self.script.get(self.batches, lambda: None)()


class Said(list[str]):
    """What a run has said of machines."""

    def wait_for(self, text: str, count: int = 1, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while sum(text in line for line in self) < count:
            assert time.monotonic() < deadline, (text, list(self))
            time.sleep(0.05)


def scripted_run(monkeypatch, plain: dict, script: Mapping[int, Callable[[], None]], said: Said) -> dict[str, Any]:
    """`run`, with something done after so many batches; returns its metrics."""
    monkeypatch.setattr(run_module, "OutputDir", type("OutputDir", (Scripted,), {"script": script}))
    monkeypatch.setattr(run_module.tqdm, "write", said.append)
    return run_module.run(parse(plain, "test"))
