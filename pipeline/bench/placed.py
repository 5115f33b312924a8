"""Who has which expert where the bench shares them out, and how evenly the batches' tokens then fall on devices."""

from __future__ import annotations

from pipeline.bench.workload import Combination, Workload
from pipeline.parallel.load import Balance, predicted
from pipeline.parallel.placement import Assignment, place


def placed(workload: Workload, given: Combination) -> Assignment:
    """By the true tables of the first half of the batches, as one plans on what has been seen."""
    assert given.placement is not None, "only systems that share experts out are placed"
    prepared = workload.prepared
    loads = predicted([prediction.table for prediction in workload.tables["oracle"]], prepared.model.shape)
    half = max(1, len(workload.batches) // 2)
    return place([load[:half] for load in loads], given.devices, given.placement, prepared.config.parallel.replicas)


def avg_max_load(workload: Workload, given: Combination) -> float | None:
    """Towards MoE Deployment's Avg Max Load of all batches: the busiest device's share of a batch's tokens, mean over MoE layers
    and batches; 1 / devices would be even. None: each device has the experts it wants."""
    if given.placement is None:
        return None
    loads = predicted([prediction.table for prediction in workload.tables["oracle"]], workload.prepared.model.shape)
    return round(Balance.of(loads, placed(workload, given)).avg_max_load, 4)
