"""One Executor beside several, to the last line, on CPUs: the figures that a machine with several GPUs is asked for."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.bench.executors import arena_memory, described, main
from pipeline.errors import ConfigError
from tests.conftest import config_data, save_switch, write_tsv


@pytest.fixture
def config(tmp_path) -> Path:
    """The file of a config over seven rows."""
    save_switch(tmp_path / "model")
    (tmp_path / "arenas").mkdir()
    plain = config_data(
        tmp_path / "model", write_tsv(tmp_path / "data.tsv"), tmp_path / "arenas", tmp_path / "out",
        predictor={"kind": "none", "top_k": 1}, executors=2, bench={"rounds": 2, "budgets": ["40%"]},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path / "config.yaml"


@pytest.mark.slow
def test_each_workload_is_answered_by_one_and_by_two_and_the_experts_lie_there_once(config, tmp_path):
    assert main([str(config), "bench.batches=3", "--", "batch.size=1", "--", "batch.size=4", "bench.budgets=[40%]"]) == 0
    report = json.loads((tmp_path / "out" / "executors.json").read_text())
    assert [(row["batch"], row["batches"]) for row in report["rows"]] == [(1, 3), (4, 3)]  # the seven rows over again
    for row in report["rows"]:
        assert len(row["throughput_ratio"]["rounds"]) == 2
        assert sum(row["batches_of_each"]) == 2 * 3
        assert row["largest_difference_of_answers"] <= 1e-6
        assert set(row["ms_per_batch"]) == set(row["driver_ms_per_batch"]) == {"1", "2"}
    memory = report["arena"]["in_memory"]["40%"]
    assert 0 < memory["2"] <= 1.02 * memory["1"] <= 1.02 * (report["arena"]["bytes"] + 2**20)
    assert report["links"] is None  # no GPU here
    assert list((tmp_path / "arenas").iterdir()) == []


def test_a_ratio_stands_beside_its_aim_where_there_is_one():
    row = {
        "budget": "20%",
        "workload": "w",
        "batch": 8,
        "ms_per_batch": {"1": 50.0, "2": 25.5},
        "driver_ms_per_batch": {"1": 1, "2": 2},
    }
    for ratio, aim, said in (
        (1.96, 1.9, "1.960 x (aim 1.900: met)"),
        (1.93, 1.95, "(aim 1.950: missed)"),
        (0.9, None, "0.900 x; the driver"),
    ):
        assert said in described(row | {"throughput_ratio": {"median": ratio}, "aim": aim})


def test_one_executor_has_nobody_to_be_set_beside(config):
    with pytest.raises(ConfigError, match="executors=2"):
        main([str(config), "executors=1"])


def test_pages_that_several_map_count_once(tmp_path):
    path = tmp_path / "sida-0-x"
    path.write_bytes(b"x" * 8 * mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mine:
        assert arena_memory(path, [os.getpid()]) == 0  # nobody has looked at it yet
        assert len(mine[:]) == arena_memory(path, [os.getpid()])
        reader = (
            f"import mmap, time; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); m[:]; print(); time.sleep(60)"
        )
        other = subprocess.Popen([sys.executable, "-c", reader], stdout=subprocess.PIPE)
        try:
            assert other.stdout is not None
            other.stdout.readline()
            assert arena_memory(path, [os.getpid(), other.pid]) == len(mine)
            assert arena_memory(path, [os.getpid()]) == len(mine) // 2
        finally:
            other.kill()
            other.communicate()
