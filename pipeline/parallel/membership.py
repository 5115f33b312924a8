"""How the ranks of a group find one another: a meeting place that whoever starts them opens, and the ticket that each gets.

Ports are bound to the meeting place's own address: on one machine to 127.0.0.1, where nobody else hears them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.parallel.exchange import Exchange, PeerLost
from pipeline.parallel.placement import Assignment

LOOPBACK = "127.0.0.1"

START_S = 300.0
"""How long ranks may take to come: each is a process that has yet to start. One that dies meanwhile is noticed sooner."""


@dataclass(frozen=True)
class Membership:
    """One rank's place in a group; travels to it.

    Attributes:
        address, port: of the meeting place.
        timeout_s: a rank that keeps the others waiting longer, once all have come, is taken for lost.
    """

    rank: int
    assignment: Assignment
    address: str
    port: int
    timeout_s: float

    def join(self, device: torch.device) -> Exchange:
        """Waits for all ranks. Once in a process.

        Raises:
            PeerLost: not all have come.
        """
        if self.address == LOOPBACK:  # gloo and NCCL listen on ports of their own
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        try:
            store = dist.TCPStore(self.address, self.port, is_master=False, timeout=timedelta(seconds=START_S))
            store.set(f"rank {self.rank}", "has come")
            store.wait([f"rank {rank}" for rank in range(self.assignment.devices)])
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                store=store,
                rank=self.rank,
                world_size=self.assignment.devices,
                timeout=timedelta(seconds=self.timeout_s),
                device_id=None if device.type == "cpu" else device,  # NCCL then connects now, and not in the first batch
            )
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} found no group at {self.address}:{self.port}: {error}") from error
        return Exchange(self.rank, self.assignment, device)


def leave() -> None:
    """Gives up this process's place in its group, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class MeetingPlace:
    """Where one group meets, once: a group that is started again needs another."""

    def __init__(self, assignment: Assignment, timeout_s: float, address: str = LOOPBACK):
        self._assignment, self._timeout_s, self._address = assignment, timeout_s, address
        listening = socket.create_server((address, 0))  # torch by itself would listen on every interface
        self._port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            address, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )  # fmt: skip

    def membership(self, rank: int) -> Membership:
        return Membership(rank, self._assignment, self._address, self._port, self._timeout_s)
