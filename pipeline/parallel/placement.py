"""Which device each expert belongs to: load balancing as in "Towards MoE Deployment" (arXiv 2303.06182), and round robin.

Pure functions over loads. A load is a float array (batches, experts) per MoE layer: the share of a batch's tokens that an expert
gets, rows adding to 1. Every device gets as many experts of a layer as any other, or one more; the paper's problem is then
multi-way number partitioning, once per MoE layer, since layers run one after the other.

Knows nothing of devices, tokens or weights; where loads come from, load.py knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EVERYWHERE = -1
"""In place of an owner: a copy of the expert is on every device."""

CORRELATION_WEIGHT = 0.5
"""Of the correlation between two experts beside the mean load, as in the paper."""


@dataclass(frozen=True)
class Assignment:
    """Who has which expert.

    Attributes:
        owners: per MoE layer int16 (experts,), the device, or `EVERYWHERE`.
    """

    owners: tuple[np.ndarray, ...]
    devices: int

    def own(self, device: int) -> list[list[int]]:
        """Per MoE layer the experts that a device has, ascending."""
        return [np.flatnonzero((layer == device) | (layer == EVERYWHERE)).tolist() for layer in self.owners]

    @property
    def most(self) -> int:
        """Experts of the device that has most of them: the slots that each needs for all to be resident."""
        return max(sum(map(len, self.own(device))) for device in range(self.devices))


Placement = Callable[[np.ndarray, int], np.ndarray]
"""From one layer's load, (batches, experts), and the number of devices: the owners, int16 (experts,)."""


def round_robin(load: np.ndarray, devices: int) -> np.ndarray:
    """Expert e on device e mod devices, whatever the load."""
    return (np.arange(load.shape[1]) % devices).astype(np.int16)


def greedy(load: np.ndarray, devices: int) -> np.ndarray:
    """The expert with the highest mean load goes first, each to the device that has least so far, among those with a free place."""
    mean = load.mean(axis=0)
    return _one_by_one(mean, devices, lambda expert, held: float(mean[held].sum()))


def anti_correlation(load: np.ndarray, devices: int) -> np.ndarray:
    """Greedy, but experts that are busy in the same batches weigh more beside each other: sum of mean_m + 0.5 * correlation(a, m)
    over the experts m that a device has so far, for the expert a to be placed."""
    mean, together = load.mean(axis=0), correlation(load)
    return _one_by_one(mean, devices, lambda expert, held: float((mean[held] + CORRELATION_WEIGHT * together[expert, held]).sum()))


PLACEMENTS: dict[str, Placement] = {"round_robin": round_robin, "greedy": greedy, "anti_correlation": anti_correlation}
"""By their names in `parallel.placement`."""


def place(loads: Sequence[np.ndarray], devices: int, placement: str, replicas: int = 0) -> Assignment:
    """
    Args:
        loads: per MoE layer (batches, experts).
        replicas: the so many experts of each layer with the highest mean load lie on every device; the others are shared out.
    """
    owners = []
    for load in loads:
        hottest = np.argsort(-load.mean(axis=0), kind="stable")
        others = np.sort(hottest[replicas:])
        owner = np.full(load.shape[1], EVERYWHERE, dtype=np.int16)
        owner[others] = PLACEMENTS[placement](load[:, others], devices)
        owners.append(owner)
    return Assignment(tuple(owners), devices)


def correlation(load: np.ndarray) -> np.ndarray:
    """Pearson's, between experts over batches: (experts, experts); 0 for an expert whose load never changes."""
    apart = load - load.mean(axis=0)
    norm = np.sqrt((apart**2).sum(axis=0))
    scaled = np.divide(apart, norm, out=np.zeros_like(apart), where=norm > 1e-12)
    return scaled.T @ scaled


def _one_by_one(mean: np.ndarray, devices: int, cost: Callable[[int, list[int]], float]) -> np.ndarray:
    """Places experts by descending mean, each where `cost(expert, experts there)` is least among the devices with a free place."""
    each, more = divmod(len(mean), devices)  # so many devices may take one more than the others
    held: list[list[int]] = [[] for _ in range(devices)]
    owner = np.zeros(len(mean), dtype=np.int16)
    for expert in np.argsort(-mean, kind="stable").tolist():
        full = sum(len(experts) > each for experts in held)
        free = [device for device, experts in enumerate(held) if len(experts) < each + (full < more)]
        device = min(free, key=lambda device: cost(expert, held[device]))
        held[device].append(expert)
        owner[expert] = device
    return owner
