"""Stand-ins of a model: what a budget buys, what a file holds, and what is refused in one line."""

from __future__ import annotations

import os

import pytest
import torch

from predictor import traces
from predictor.calibration import Calibration
from predictor.errors import PredictorError
from predictor.stand_ins import METHODS, StandIns, load, make, plan, save

EXPERTS = (4, 4, 8)
SHAPES = [{"wi": (16, 8), "bias": (16,), "wo": (8, 16)}] * 3


def read(layer: int, part: str, experts: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * layer + len(part))
    return torch.randn(EXPERTS[layer], *SHAPES[layer][part], generator=generator)[experts]


def made(method: str, budget: int = 10**9) -> StandIns:
    return make(plan(method, budget, EXPERTS, SHAPES), EXPERTS, SHAPES, read)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_plan_and_within_its_budget(method):
    wanted = plan(method, 4000, EXPERTS, SHAPES)
    assert make(wanted, EXPERTS, SHAPES, read).nbytes == wanted.nbytes <= 4000


def test_svd_takes_the_largest_rank_that_fits():
    biases, per_rank = 2 * 4 * 16 * 2, 2 * 2 * 4 * (16 + 8) * 2
    assert plan("svd", biases + 3 * per_rank, EXPERTS, SHAPES).size == 3
    assert plan("svd", biases + 3 * per_rank - 1, EXPERTS, SHAPES).size == 2
    assert plan("svd", 10**9, EXPERTS, SHAPES).size == 8  # that is all of it


def test_the_last_moe_layer_gets_none_since_no_router_comes_after_it():
    assert [sorted(parts) for parts in made("4bit").layers] == [["bias", "wi", "wo"], ["bias", "wi", "wo"], []]
    assert plan("svd", 0, EXPERTS[:1], SHAPES[:1]).nbytes == 0


@pytest.mark.parametrize("method", ["svd", "2bit", "4bit"])
def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(method):
    with pytest.raises(PredictorError) as error:
        plan(method, 300, EXPERTS, SHAPES)
    needed = {"svd": 256 + 768, "2bit": 256 + 896, "4bit": 256 + 1408}[method]
    assert f"needs {needed} bytes, the budget is 300" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_come_back_from_disk_as_they_were(tmp_path, method):
    before = StandIns(method, made(method).layers, Calibration((1.0, 0.5, 0.25), (1.0, 0.9, 0.8), (1.0, 1.0, 0.9)))
    save(before, tmp_path / "new" / "s.safetensors", "id")
    after = load(tmp_path / "new" / "s.safetensors", 3, "id")
    assert (after.method, after.calibration, after.nbytes) == (method, before.calibration, before.nbytes)
    for mine, theirs in zip(after.layers, before.layers, strict=True):
        assert mine.keys() == theirs.keys()
        for part, matrices in mine.items():
            assert type(matrices) is type(theirs[part])
            for name, tensor in matrices.tensors.items():
                assert torch.equal(tensor, theirs[part].tensors[name])
    assert os.listdir(tmp_path / "new") == ["s.safetensors"]


def refused(path, layers: int = 3, identity: str = "id") -> str:
    with pytest.raises(PredictorError) as error:
        load(path, layers, identity)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kept", [0, 8, 200, -1])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, kept):
    path = tmp_path / "s.safetensors"
    save(made("svd"), path, "id")
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in refused(path)


def test_those_of_another_model_or_another_number_of_layers_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save(made("svd"), path, "theirs")
    assert "another model" in refused(path)
    assert "3 MoE layers, the model has 5" in refused(path, layers=5, identity="theirs")
    traces.save_atomically({}, path, {"kind": "lstm", "identity": "id"})
    assert "holds a lstm" in refused(path)


def test_a_copy_on_another_device_is_the_same():
    before = made("4bit")
    after = before.to(torch.device("cpu"))
    assert after.nbytes == before.nbytes and after.layers[0].keys() == before.layers[0].keys()
