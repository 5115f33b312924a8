"""Traces: rows stay with their labels through join, select and the disk; a file that is not this model's trace is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_model

from predictor import traces
from predictor.errors import PredictorError
from predictor.tokens import DECODER, ENCODER, RoutingShape
from predictor.traces import Trace, file_kind, join, load, load_checked, save, save_atomically, select
from tests.predictor.made_traces import ragged, random_trace, same_trace

VOCAB = 40
SHAPE = RoutingShape(experts=(8, 8, 4), streams=(ENCODER, ENCODER, DECODER), top_k=1, vocab_size=VOCAB)
ROOT = Path(__file__).parents[2]


def make_trace(seed: int, rows: int = 6) -> Trace:
    rng = np.random.default_rng(seed)
    return random_trace(rng, ragged(rng, rows, VOCAB, streams=2), SHAPE, top_t=4)


def row_by_row(trace: Trace) -> list[list[tuple]]:
    """Per row and MoE layer everything that belongs to it, found by counting along."""
    rows = []
    for row in range(trace.tokens.size):
        parts = []
        for layer, stream in zip(trace.layers, SHAPE.streams, strict=True):
            start = sum(len(r) for r in trace.tokens.streams[stream][:row])
            part = slice(start, start + len(trace.tokens.streams[stream][row]))
            ids = trace.tokens.streams[stream][row].tolist()
            parts.append((ids, layer.top[part].tolist(), layer.probabilities[part].tolist(), layer.weight[part].tolist()))
        rows.append(parts)
    return rows


def test_join_keeps_every_rows_labels_with_it():
    a, b, c = make_trace(0), make_trace(1, rows=1), make_trace(2, rows=3)
    assert row_by_row(join([a, b, c])) == row_by_row(a) + row_by_row(b) + row_by_row(c)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 0, 3], [2], [4, 4, 1]])
def test_select_gives_the_rows_asked_for_in_that_order_with_their_labels(rows):
    trace = make_trace(3)
    every = row_by_row(trace)
    assert row_by_row(select(trace, np.array(rows), SHAPE)) == [every[i] for i in rows]


def test_a_trace_comes_back_from_disk_as_it_was(tmp_path):
    trace = make_trace(4)
    save(trace, tmp_path / "new" / "trace.safetensors", SHAPE, "id")
    assert same_trace(load(tmp_path / "new" / "trace.safetensors", SHAPE, "id"), trace)
    assert os.listdir(tmp_path / "new") == ["trace.safetensors"]


def test_a_file_says_what_it_is_or_nothing(tmp_path):
    path = tmp_path / "trace.safetensors"
    assert file_kind(path) is None
    save(make_trace(4), path, SHAPE, "id")
    assert file_kind(path) == "trace"
    path.write_bytes(path.read_bytes()[:-1])
    assert file_kind(path) is None


def refused(path: Path, identity: str = "id") -> str:
    with pytest.raises(PredictorError) as error:
        load(path, SHAPE, identity)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_refuses_a_missing_file_and_says_how_to_make_one(tmp_path):
    assert "runner.py train" in refused(tmp_path / "nothing.safetensors")
    assert "no such file" in refused(tmp_path)  # a directory


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_load_refuses_a_truncated_file(tmp_path, kept):
    path = tmp_path / "trace.safetensors"
    save(make_trace(5), path, SHAPE, "id")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert "truncated" in refused(path)


def test_load_refuses_what_is_no_safetensors_file(tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"\x80\x04\x95 a pickle, perhaps" * 50)
    assert "not a safetensors file" in refused(path)


def test_load_refuses_another_kind_of_file_and_names_both_kinds(tmp_path):
    path = tmp_path / "table.safetensors"
    save_atomically({"x": np.zeros(3)}, path, {"kind": "token_table", "identity": "id"})
    assert "holds a token_table" in refused(path)
    save_model({"x": torch.zeros(3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    assert f"{path}: not a trace: `python runner.py train CONFIG` did not write it" in refused(path)
    with pytest.raises(PredictorError, match=r"not a predictor's file.* or none: predictor.kind=rehearsal predictor.path=null"):
        load_checked(path, "stand_ins", None)


def test_load_refuses_a_trace_of_another_model(tmp_path):
    path = tmp_path / "trace.safetensors"
    save(make_trace(6), path, SHAPE, "theirs")
    message = refused(path, "ours")
    assert "another model" in message
    assert "theirs" in message
    assert "ours" in message


def test_an_exception_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.safetensors"
    save(make_trace(7), path, SHAPE, "id")

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(traces, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save(make_trace(8), path, SHAPE, "id")
    assert same_trace(load(path, SHAPE, "id"), make_trace(7))
    assert os.listdir(tmp_path) == [path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from predictor import traces

def killed(tensors, file, metadata):
    Path(file).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

traces.save_file = killed
traces.save_atomically({"x": np.ones(2)}, Path(sys.argv[1]), {"kind": "trace", "identity": "id"})
"""


def test_a_kill_while_saving_leaves_the_old_file_and_nothing_that_a_later_save_trips_over(tmp_path):
    path = tmp_path / "trace.safetensors"
    save(make_trace(9), path, SHAPE, "id")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert same_trace(load(path, SHAPE, "id"), make_trace(9))
    save(make_trace(10), path, SHAPE, "id")
    assert same_trace(load(path, SHAPE, "id"), make_trace(10))


def test_a_save_while_another_reads_gives_the_reader_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"kind": "trace", "identity": "id"}
    save_atomically({"x": np.zeros(1000)}, path, metadata)
    with path.open("rb") as reader:
        save_atomically({"x": np.ones(1000)}, path, metadata)
        assert reader.read()[-8000:] == np.zeros(1000).tobytes()
    assert (load_checked(path, "trace", "id")[0]["x"] == 1).all()


def test_load_refuses_a_trace_with_another_number_of_moe_layers(tmp_path):
    path = tmp_path / "trace.safetensors"
    fewer = RoutingShape(SHAPE.experts[:1], SHAPE.streams[:1], SHAPE.top_k, SHAPE.vocab_size)
    whole = make_trace(11)
    save(Trace(whole.tokens, whole.layers[:1]), path, fewer, "id")
    assert f"its experts is {list(fewer.experts)}, this model's is {list(SHAPE.experts)}" in refused(path)
