"""The picture of a timeline: copies that follow each other are one bar, batches under way at once are one."""

from __future__ import annotations

import json

import pytest

from pipeline.bench.lanes import main, merged


def events(*spans: tuple[float, float], lane: str = "copy") -> list[dict]:
    return [{"ph": "X", "cat": lane, "ts": start, "dur": end - start} for start, end in spans]


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0, [(0, 10), (10, 30), (60, 70)]), (15, [(0, 30), (60, 70)]), (40, [(0, 70)])],
)
def test_spans_that_touch_or_nearly_are_one(gap, expected):
    assert merged(events((60, 70), (0, 10), (10, 25), (20, 30)), gap) == expected


def test_a_file_becomes_a_picture_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    made = [{"ph": "M", "name": "thread_name"}, *events((0, 9e4)), *events((1e4, 5e4), lane="compute")]
    (tmp_path / "timeline-sida.json").write_text(json.dumps({"traceEvents": made}))
    main([str(tmp_path / "timeline-sida.json"), "20", "0"])
    assert (tmp_path / "timeline-sida.png").stat().st_size > 500
