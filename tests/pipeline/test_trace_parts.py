"""A run's trace: a file per batch while it is under way, one in the end."""

from __future__ import annotations

import numpy as np

from pipeline.predicting.trace_parts import TraceParts
from predictor.tokens import ENCODER, RoutingShape
from predictor.traces import join, load, select
from tests.predictor.made_traces import ragged, random_trace, same_trace

SHAPE = RoutingShape(experts=(8, 4), streams=(ENCODER, ENCODER), top_k=1, vocab_size=30)


def test_batches_are_joined_in_the_order_of_the_input_though_two_sittings_wrote_them_and_nothing_else_is_left(tmp_path):
    traces = [random_trace(np.random.default_rng(i), ragged(np.random.default_rng(i), 3, 30), SHAPE) for i in range(3)]
    first, second = (TraceParts(tmp_path, SHAPE, "id") for _ in range(2))
    first.add(2, traces[2])
    first.add(0, traces[1])  # a batch that was under way when the first sitting was killed is answered again
    for batch in (0, 1):
        second.add(batch, traces[batch])
    rows = {0: [4, 0, 7], 1: [1, 8, 2], 2: [3, 5, 6]}
    second.finish(rows, tmp_path / "elsewhere" / "trace.safetensors")
    expected = select(join(traces), np.array([1, 3, 5, 6, 0, 7, 8, 2, 4]), SHAPE)
    assert same_trace(load(tmp_path / "elsewhere" / "trace.safetensors", SHAPE, "id"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
