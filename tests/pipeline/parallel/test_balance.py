"""The command that plans on one half of a trace and judges on the other."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pipeline.bench.workload import record_batches
from pipeline.config import parse
from pipeline.parallel import balance
from pipeline.parallel.balance_report import draw
from pipeline.parallel.load import Balance
from pipeline.parallel.placement import PLACEMENTS, place
from pipeline.prepare import prepare
from predictor import traces
from store.actor import ExpertStore
from tests.conftest import SENTENCES, config_data, save_switch, write_tsv


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config of a small Switch and a few sentences."""
    base = tmp_path_factory.mktemp("balance")
    save_switch(base / "model")
    rows = write_tsv(base / "rows.tsv", SENTENCES * 2)
    (base / "arenas").mkdir()
    return config_data(base / "model", rows, base / "arenas", base / "out", bench={"batch_sizes": [1, 3]})


def test_a_row_for_every_batch_size_number_of_devices_replicas_and_placement(small, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small))  # which is YAML
    assert balance.main([str(config), f"output_dir={tmp_path / 'out'}", "--devices", "2,4", "--replicas", "0,1"]) == 0
    report = json.loads((tmp_path / "out" / "balance.json").read_text())
    keys = ("batch", "part", "devices", "replicas", "planned_on", "placement")
    plans = (balance.FIRST_HALF, balance.HINDSIGHT)
    named = [tuple(row[key] for key in keys) for row in report["rows"]]
    parts = ("encoder", "decoder")
    assert named == [(*k, r, p, n) for k in product((1, 3), parts, (2, 4)) for r in (0, 1) for p in plans for n in PLACEMENTS]
    for row in report["rows"]:
        assert 1 / row["devices"] <= row["avg_max_load"] + 1e-4 <= row["max_load"] + 2e-4 <= 1 + 2e-4
    assert (tmp_path / "out" / "balance.md").read_text().count("| 4 | 0.250 | 1 | first half |") == 4


def test_a_saved_trace_gives_the_same_as_a_recording_and_reads_no_data(small, tmp_path):
    config = replace(parse(small, "a test"), output_dir=str(tmp_path / "recorded"))
    recorded = balance.run(config, [2], [0])
    prepared = prepare(config)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    arena = store.open()
    trace = traces.join(record_batches(prepared))
    store.close(False)
    traces.save(trace, tmp_path / "trace.safetensors", prepared.model.shape, arena.identity)
    saved = replace(
        config,
        trace=replace(config.trace, load=str(tmp_path / "trace.safetensors")),
        data=replace(config.data, path="nowhere.tsv"),
        output_dir=str(tmp_path / "replayed"),
    )
    assert balance.run(saved, [2], [0])["rows"] == recorded["rows"]


def test_the_first_half_plans_and_the_second_is_judged():
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(6), 4), rng.dirichlet(np.ones(6), 5)
    loads = balance.Loads([np.concatenate([first, second])], None)
    for row in balance.judge(loads, [3], [0]):
        seen = {balance.FIRST_HALF: first, balance.HINDSIGHT: second}[row["planned_on"]]
        expected = Balance.of([second], place([seen], 3, row["placement"]))
        assert row["avg_max_load"] == pytest.approx(expected.avg_max_load, abs=1e-4)
        assert row["max_load"] == pytest.approx(expected.max_load, abs=1e-4)


def test_the_picture_fits_a_repository(small, tmp_path):
    pytest.importorskip("matplotlib")
    report = balance.run(replace(parse(small, "a test"), output_dir=str(tmp_path)), [2, 4], [0])
    assert draw(report, tmp_path) == [tmp_path / "balance.png"]
    assert 3_000 < (tmp_path / "balance.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace.load=nowhere.safetensors"], "nowhere.safetensors"),
        (["bench.batch_sizes=[500]"], "planning and judging need two or more"),
        (["data.path=nowhere.tsv"], "nowhere.tsv: no such file"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(small, tmp_path, capsys, arguments, message):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small))
    assert balance.main([str(config), f"output_dir={tmp_path / 'out'}", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said


def test_no_device_is_refused(small, capsys):
    with pytest.raises(SystemExit):
        balance.main(["config.yaml", "--devices", "0"])
    assert "0 is less than 1" in capsys.readouterr().err
