"""Joining or starting Ray, as a good guest.

A Ray of its own is started with `address="local"`: plain init would join whatever runs on the machine, even a stale one.
It gets 256 MiB for objects instead of 30 % of the RAM: tables and results are small, and weights never pass through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.errors import ConfigError

OBJECT_STORE_BYTES = 256 * 2**20
PROBE_S = 10.0


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to Ray for as long as the block lasts; a Ray that was up already is left up.

    Args:
        address: of a running Ray; None: the one that RAY_ADDRESS names, else one of its own.

    Raises:
        ConfigError: nothing answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _probe(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
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
    try:
        yield
    finally:
        ray.shutdown()


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
