"""metrics.json: figures of all batches, from the journal's entries."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pipeline.batch_result import BatchResult, BatchStats
from pipeline.reports.metrics import (
    PACKAGES,
    batch_metrics,
    executors_counted,
    fidelity,
    miss_path,
    resident_peak,
    stats_of,
    versions,
)
from predictor.accuracy import Accuracy

MS = 1_000_000


def stats(**changes) -> BatchStats:
    """Two MoE layers, 10 tokens, 5 ms."""
    plain = BatchStats(
        start=100 * MS,
        end=105 * MS,
        pid=1,
        tokens=10,
        predict_span=[90 * MS, 92 * MS],
        copy_spans=[[93 * MS, 94 * MS, 3]],
        hits=[3, 1],
        misses=[1, 3],
        prefetch_bytes=300,
        demand_bytes=20,
        read_in_place_bytes=400,
        stall_ms=0.5,
        resident=[2, 2],
        resident_peak_bytes=4,
        predicted_uses=6.5,
        accuracy=Accuracy([5, 1], [9, 3], [10, 10]),
    )
    return dataclasses.replace(plain, **changes)


def test_executors_of_other_machines_have_a_budget_too():
    every = [stats(executor=number) for number in (0, 2, 2)]
    assert resident_peak(every) == 8
    assert executors_counted(every, 1) == 2, "of 4 bytes each"
    assert executors_counted(every, 4) == 4, "who has answered nothing has one, too"


def test_sums_and_rates_are_over_all_batches():
    metrics = batch_metrics([stats(), stats(hits=[1, 0], misses=[0, 0], tokens=30, stall_ms=1.25)], samples=7, seconds=2)
    assert (metrics["samples"], metrics["tokens"], metrics["seconds"], metrics["samples_per_second"]) == (7, 40, 2, 3.5)
    assert metrics["copied_bytes"] == {"prefetch": 600, "demand": 40, "read_in_place": 800}
    assert metrics["hit_rate"] == pytest.approx(5 / 9, abs=1e-4)
    assert metrics["hit_rate_per_layer"] == pytest.approx([4 / 5, 1 / 4], abs=1e-4)
    assert metrics["experts_used_per_layer"] == [2.5, 2]
    assert metrics["stall_ms"] == 1.75


def test_latencies_are_percentiles_of_the_batches():
    latencies = [1, 2, 3, 4, 100]
    metrics = batch_metrics([stats(start=0, end=ms * MS) for ms in latencies], 5, 1)
    assert metrics["latency_ms"] == pytest.approx({f"p{q}": np.percentile(latencies, q) for q in (50, 95, 99)}, abs=1e-3)


def test_one_batch_that_had_its_experts_staged_is_enough_to_say_so_and_why():
    assert miss_path([stats(), stats()]) == {"miss_path": "in_place", "staged_because": None}
    later = [stats(), stats(miss_path="staged: no such luck: at all")]
    assert miss_path(later) == {"miss_path": "staged", "staged_because": "no such luck: at all"}


def test_how_batches_ran_on_a_gpu_is_counted_and_on_a_cpu_there_is_nothing_to_count():
    every = [stats(how="pieces"), stats(how="whole"), stats(how="eager: first of its shape"), stats(how="whole")]
    assert batch_metrics(every, 4, 1)["graphs"] == {"whole": 2, "pieces": 1, "eager: first of its shape": 1}
    assert batch_metrics([stats()], 1, 1)["graphs"] is None


def test_accuracy_weighs_tokens_and_not_batches():
    small = stats(accuracy=Accuracy([1, 1], [1, 1], [1, 1]))
    metrics = batch_metrics([small, stats()], 2, 1)["prediction"]
    assert metrics["top1"] == pytest.approx(8 / 22, abs=1e-4)
    assert metrics["top3"] == pytest.approx(14 / 22, abs=1e-4)
    assert metrics["per_layer"]["top1"] == pytest.approx([6 / 11, 2 / 11], abs=1e-4)
    assert metrics["per_layer"]["top3"] == pytest.approx([10 / 11, 4 / 11], abs=1e-4)


def test_prediction_takes_the_mean_time_of_the_batches_that_were_predicted():
    spans = [[0, 2 * MS], None, [0, 4 * MS]]
    assert batch_metrics([stats(predict_span=span) for span in spans], 3, 1)["prediction"]["ms_per_batch"] == 3


def test_what_was_not_measured_is_null_and_not_0():
    bare = stats(accuracy=Accuracy(), hits=[0, 0], misses=[0, 0], predict_span=None)
    metrics = batch_metrics([bare], 1, 1)
    assert metrics["prediction"]["top1"] is None
    assert metrics["prediction"]["top3"] is None
    assert metrics["hit_rate"] is None
    assert metrics["hit_rate_per_layer"] == [None, None]
    json.dumps(metrics, allow_nan=False)


def test_executors_that_took_over_are_counted():
    for pids, restarts in (((1, 1, 1), 0), ((1, 1, 2, 3, 3), 2), ((1, 2, 1, 2), 1)):  # a late answer is no restart
        metrics = batch_metrics([stats(pid=pid) for pid in pids], 1, 1)
        assert metrics["executor_restarts"] == restarts


def test_statistics_come_back_from_the_journal_as_they_were():
    results = [BatchResult(batch, [{"index": batch}], stats(tokens=batch, load=[[1, 2]])) for batch in (3, 1)]
    entries = [json.loads(json.dumps(result.to_dict())) for result in results]
    assert stats_of(entries) == [result.stats for result in results]
    assert "accuracy" in entries[0]["stats"]  # and the entries are as they were
    assert isinstance(entries[0]["stats"]["accuracy"], dict)


def test_fidelity_sets_hash_routing_beside_exact_routing():
    exact = [{"index": n, "label": n % 2, "scores": []} for n in range(4)]
    hashed = [{"index": n, "label": 0, "scores": []} for n in range(4)]
    report = fidelity(exact, hashed, {"accuracy": 0.8, "f1": 0.0}, {"accuracy": 0.6, "f1": 0.0})
    assert report["same_label"] == 0.5
    assert report["quality_exact"] == {"accuracy": 0.8, "f1": 0.0}
    assert report["quality_hash"] == {"accuracy": 0.6, "f1": 0.0}
    assert report["ratio"] == {"accuracy": pytest.approx(0.75)}  # no share of nothing
    assert "mean_logprob_difference_per_token" not in report


def test_fidelity_of_scores_is_the_difference_per_token():
    exact = [{"index": 0, "tokens": 4, "logprob": -8.0}, {"index": 1, "tokens": 2, "logprob": -3.0}]
    hashed = [{"index": 0, "tokens": 4, "logprob": -10.0}, {"index": 1, "tokens": 2, "logprob": -2.0}]
    report = fidelity(exact, hashed, {"perplexity": 5.0}, {"perplexity": 6.0})
    assert report["mean_logprob_difference_per_token"] == pytest.approx(0.5)
    assert report["ratio"] == {"perplexity": pytest.approx(1.2)}
    assert "same_label" not in report


def test_versions_name_what_results_depend_on():
    found = versions()
    assert {"python", "torch", "ray", "transformers", "numpy", "safetensors"} <= found.keys() <= {"python", *PACKAGES}
    assert all(found.values())
