"""What was lost on the way, as metrics.json and the journal have it."""

from __future__ import annotations

import json

from pipeline.losses import KINDS, Loss, loss_metrics


def test_losses_are_counted_by_kind_and_told_in_their_order():
    losses = [Loss("machine", "m", at=3), Loss("executor", "Executor 1", redone=4, at=1), Loss("executor", "Executor 0", 2, at=2)]
    metrics = loss_metrics(losses)
    assert (metrics["executors"], metrics["machines"], metrics["stores"], metrics["batches_redone"]) == (2, 1, 0, 6)
    assert [one["name"] for one in metrics["each"]] == ["Executor 1", "Executor 0", "m"]


def test_nothing_lost_is_said_as_noughts():
    assert loss_metrics([]) == {f"{kind}s": 0 for kind in KINDS} | {"batches_redone": 0, "each": []}


def test_a_loss_comes_back_from_the_journal_as_it_was():
    loss = Loss("store", "ExpertStore of a", 1)
    assert Loss(**json.loads(json.dumps(loss.to_dict()))) == loss
