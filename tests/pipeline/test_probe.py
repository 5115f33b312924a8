"""What the probe says of a machine: on a CPU that it has nothing to ask, on a GPU figures that can be."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.bench import probe


def test_without_a_gpu_one_line_says_so(capsys, tmp_path):
    assert probe.main(["configs/quickstart.yaml", "device=cpu", f"output_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: device: cpu")
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_asks_link_layer_and_start(tmp_path, arena_dir):
    given = [f"store.directory={arena_dir}", f"output_dir={tmp_path}", "device=cuda"]
    assert probe.main(["configs/quickstart.yaml", *given]) == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert {row["block_bytes"] for row in found["link"]} >= {2**16, 2**20}
    assert all(0 < row["arena"] < 1000 for row in found["link"])
    assert all(row["slots_ms"] > 0 and row["in_place_ms"] > 0 for row in found["layer"])
    assert not list(arena_dir.iterdir())  # store.keep is false
