"""Joining or starting Ray, as a good guest.

A Ray of its own is started with `address="local"`: plain init would join whatever runs on the machine, even a stale one.
It gets 256 MiB for objects instead of 30 % of the RAM: tables and results are small, and weights never pass through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.errors import ConfigError

OBJECT_STORE_BYTES = 256 * 2**20
PROBE_S = 10.0
LOGS = ray.LoggingConfig(encoding="TEXT", log_level="INFO")
"""Actors' lines say who wrote them: name, id, node."""
ROOT, PACKAGES = Path(__file__).parent.parent, ("pipeline", "predictor", "store")
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit`, whose working directory has the code."""
TOO_LATE = "timed out during startup"


@contextlib.contextmanager
def cluster(address: str | None, several: bool = False) -> Iterator[None]:
    """A connection to Ray for as long as the block lasts; a Ray that was up already is left up.

    Args:
        address: of a running Ray; None: the one that RAY_ADDRESS names, else one of its own.
        several: machines are used that may not have this project's code: it travels along, unless the job has brought it.

    Raises:
        ConfigError: nothing answers at the address; or Ray, of its own, did not start in the time that it gives itself.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _probe(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "logging_config": LOGS}
    if several and address and IN_A_JOB not in os.environ:
        quiet["runtime_env"] = {"py_modules": [str(ROOT / package) for package in PACKAGES]}
    try:
        with _own_logging(), _own_sigterm():
            if address:
                ray.init(address=address, **quiet)
            else:
                os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would put the Executor behind whatever else runs
                ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        if not address:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cluster.address: no Ray answers at {address}: {reason}") from None
    except Exception as error:  # Ray has no class for it
        if TOO_LATE not in str(error):
            raise
        raise ConfigError(
            "Ray did not start within the 30 s that it gives itself: this machine is too busy, or too slow. Run the same command "
            "once it has less to do, or name a Ray that is up by cluster.address"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """What is set up for the actors' logs is set up in this process, too, where it is not wanted."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("ray").setLevel(logging.ERROR)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does is this process's own affair: Ray's handlers end it without a word."""
    heard = signal.getsignal(signal.SIGTERM)
    came = False
    try:
        yield
    except SystemExit as ended:  # that is how: one has come meanwhile
        if ended.code != signal.SIGTERM:
            raise
        came = True
    finally:
        if heard is not None and threading.current_thread() is threading.main_thread():  # elsewhere Ray sets none
            signal.signal(signal.SIGTERM, heard)
    if came:
        ray.shutdown()
        signal.raise_signal(signal.SIGTERM)


def _probe(address: str) -> None:
    """Ray itself would try an address where nobody listens for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like: Ray knows at once
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"cluster.address: no Ray answers at {address} ({error.strerror or error}); start one with `ray start --head`, "
            "or leave cluster.address and RAY_ADDRESS out for a Ray of its own"
        ) from None
