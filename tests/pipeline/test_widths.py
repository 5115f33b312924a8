"""Counting what a table's width fetches and covers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import parse
from pipeline.predicting.widths import MASSES, TOP_KS, count, main, widths
from predictor.hash_table import HashTable
from predictor.tokens import TokenBatch
from predictor.traces import LayerTrace, Trace
from tests.conftest import config_data, save_switch, write_tsv


def table(rows: list[list[int]]) -> HashTable:
    experts = np.array(rows, dtype=np.int16)
    return HashTable((experts,), (experts.astype(np.float32),), (experts.astype(np.float32),))


def trace(chosen: list[int]) -> Trace:
    top = np.array(chosen, dtype=np.int16)[:, None]
    return Trace(TokenBatch(((np.arange(len(chosen)),),)), (LayerTrace(top, top.astype(np.float16), top[:, 0].astype(np.float16)),))


def test_experts_are_counted_once_a_batch_and_none_is_nobody():
    counted = count([table([[1, 2], [1, -1]]), table([[5, 6]])], [trace([1, 3]), trace([5])], top_k=1)
    assert (counted.used, counted.named, counted.covered) == (3, 4, 2)
    assert counted.hit_rate == pytest.approx(2 / 3)
    assert counted.fetched_per_use == pytest.approx(4 / 3)


def test_wider_tables_cover_more_and_fetch_more(tmp_path: Path):
    save_switch(tmp_path / "model")
    (tmp_path / "arenas").mkdir()
    predictor = {"kind": "rehearsal", "stand_ins": {"kind": "2bit", "budget": "100%"}}
    rows = write_tsv(tmp_path / "rows.tsv")
    data = config_data(tmp_path / "model", rows, tmp_path / "arenas", tmp_path / "out", predictor=predictor)
    found = dict(widths(parse(data, "test")))
    for names in ([f"top_k {k}" for k in TOP_KS], [f"mass {m:g}" for m in MASSES]):
        covered, fetched = zip(*((found[name].hit_rate, found[name].fetched_per_use) for name in names), strict=True)
        assert list(covered) == sorted(covered) and list(fetched) == sorted(fetched)
        assert fetched[0] < fetched[-1]
    assert len({counted.used for counted in found.values()}) == 1
    assert not list((tmp_path / "arenas").iterdir())


def test_bad_input_is_one_line(tmp_path: Path, capsys):
    assert main([str(tmp_path / "nothing.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
