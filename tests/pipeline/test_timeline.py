"""timeline.json: Chrome's trace format, one lane per kind of work."""

from __future__ import annotations

import json

import pytest

from pipeline.reports.timeline import LANES, timeline
from tests.pipeline.test_metrics import MS, stats


def events(*batches) -> tuple[list[dict], list[dict]]:
    """(spans, names)."""
    trace = json.loads(timeline(list(batches)))
    every = trace["traceEvents"]
    assert {event["ph"] for event in every} <= {"X", "M"}
    return [e for e in every if e["ph"] == "X"], [e for e in every if e["ph"] == "M"]


def lane(spans: list[dict], name: str) -> list[dict]:
    return [span for span in spans if span["cat"] == name]


def test_each_kind_of_work_has_a_lane_of_its_own_with_its_name():
    spans, names = events(stats())
    tids = {name: {span["tid"] for span in lane(spans, name)} for name in LANES}
    assert all(len(found) == 1 for found in tids.values())
    assert len(set.union(*tids.values())) == len(LANES)
    titles = {(event["pid"], event["tid"]): event["args"]["name"] for event in names if event["name"] == "thread_name"}
    assert titles == {(1, tids[name].pop()): name for name in LANES}


def test_spans_stand_where_the_work_was_in_microseconds_from_the_first():
    copies = [[95 * MS, 96 * MS, 1], [110 * MS, 112 * MS, 4]]
    later = stats(start=120 * MS, end=130 * MS, predict_span=[91 * MS, 93 * MS], copy_spans=copies)
    spans, _ = events(stats(), later)
    where = {name: [(span["ts"], span["dur"]) for span in lane(spans, name)] for name in LANES}
    assert where["predict"] == [(0, 2000), (1000, 2000)]
    assert where["copy"] == [(3000, 1000), (5000, 1000), (20000, 2000)]
    assert where["compute"] == [(10000, 5000), (30000, 10000)]


@pytest.mark.parametrize(
    "first",
    [{"start": 1 * MS}, {"predict_span": [1 * MS, 2 * MS]}, {"copy_spans": [[50 * MS, 51 * MS, 1], [1 * MS, 2 * MS, 1]]}],
    ids=["compute", "predict", "copy"],
)
def test_whatever_came_first_is_at_0_and_nothing_before_it(first):
    spans, _ = events(stats(), stats(**first))
    assert min(span["ts"] for span in spans) == 0
    assert all(span["dur"] >= 0 for span in spans)


def test_a_batch_without_prediction_or_copies_has_its_compute_span_only():
    spans, _ = events(stats(predict_span=None, copy_spans=[]))
    assert [span["cat"] for span in spans] == ["compute"]


def test_a_span_says_what_it_did():
    spans, _ = events(stats())
    assert lane(spans, "copy")[0]["args"] == {"experts": 3}
    assert lane(spans, "compute")[0]["args"] == {"tokens": 10, "hits": 4, "misses": 4, "stall_ms": 0.5}
    assert lane(spans, "predict")[0]["args"] == {"expected expert uses": 6.5}


def test_each_executor_process_has_its_own_group_of_lanes():
    spans, names = events(stats(pid=7), stats(pid=9), stats(pid=7))
    assert [span["pid"] for span in lane(spans, "compute")] == [7, 9, 7]
    assert sorted(e["pid"] for e in names if e["name"] == "process_name") == [7, 9]
    assert len([e for e in names if e["name"] == "thread_name"]) == 2 * len(LANES)
