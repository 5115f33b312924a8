"""Rehearsal through Ray's actors, and free labels: a run saves its trace, `train` learns from it, another run uses that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import SwitchTransformersForConditionalGeneration

from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.predicting.train import train
from pipeline.prepare import prepare
from pipeline.run import run
from predictor.stand_ins import StandIns, load, save
from tests.conftest import SENTENCES, answers, config_data, read_jsonl, save_switch, write_tsv

pytestmark = pytest.mark.slow
ROWS = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(80)]


@pytest.fixture(scope="module", autouse=True)
def _own_ray():
    with cluster(None):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("prediction") / "switch"
    save_switch(directory)
    return directory


@pytest.fixture
def settings(tmp_path, model):
    (tmp_path / "arenas").mkdir()
    data = write_tsv(tmp_path / "data.tsv", ROWS)

    def make(output: str, **changes):
        changes["predictor"] = {"kind": "rehearsal", "stand_ins": {"kind": "4bit", "budget": "60%"}} | changes.pop("predictor", {})
        return parse(config_data(model, data, tmp_path / "arenas", tmp_path / output, **changes), "test")

    return make


def scores(directory: Path) -> np.ndarray:
    return np.array([row["scores"] for row in read_jsonl(directory / "predictions.jsonl")])


def test_answers_are_those_of_the_whole_model_wherever_a_rehearsal_runs(settings, tmp_path, model):
    store = {"budget": "70%", "policy": "lookahead", "directory": str(tmp_path / "arenas")}
    whole = SwitchTransformersForConditionalGeneration.from_pretrained(model).eval()
    prepared = prepare(settings("unused", predictor={"kind": "random"}))
    truth = {row["index"]: row["scores"] for batch in prepared.batches for row in answers(prepared.task, whole, batch)}
    for device in ("cpu", "executor"):
        metrics = run(settings(device, predictor={"device": device}, store=store))
        np.testing.assert_allclose(scores(tmp_path / device), [truth[i] for i in range(len(ROWS))], rtol=1e-5, atol=1e-5)
        assert metrics["prediction"]["kind"] == "rehearsal"
        assert metrics["prediction"]["per_layer"]["top1"][0] == 1
        assert metrics["prediction"]["ms_per_batch"] > 0
        assert (metrics["expert_bytes"]["stand_ins"] > 0) and not list((tmp_path / "arenas").iterdir())


def test_a_run_saves_its_trace_whoever_decides_and_train_learns_from_it(settings, tmp_path, model):
    saved, made = (
        {routing: tmp_path / f"{routing}.safetensors" for routing in ("exact", "hash")},
        tmp_path / "stand-ins.safetensors",
    )
    for routing, path in saved.items():
        run(settings(routing, trace={"save": str(path)}, routing=routing))
        assert not (tmp_path / routing / "trace").exists()
    exact, hashed = (load_file(path) for path in saved.values())  # under hash routing the routers decide in a second pass
    assert exact.keys() == hashed.keys()
    for name, tensor in exact.items():
        np.testing.assert_allclose(tensor, hashed[name], atol=1e-3, err_msg=name)
    loaded = {"load": str(saved["hash"])}
    train(settings("none", predictor={"path": str(made)}, trace=loaded, train={"holdout": 0.3}))
    metrics = run(settings("second", predictor={"path": str(made)}))
    assert metrics["prediction"]["drift"] is None
    oracle = run(settings("third", predictor={"kind": "oracle", "path": str(saved["exact"])}))
    assert oracle["prediction"]["top1"] == 1


def test_what_distilling_makes_worse_is_not_kept(settings, tmp_path, capsys):
    def trained(name: str, **how) -> Path:
        path = tmp_path / f"{name}.safetensors"
        train(settings("none", predictor={"path": str(path)}, train={"epochs": 1} | how))
        return path

    spoilt, still = trained("spoilt", lr=1e3), trained("still", lr=1e-9)
    assert capsys.readouterr().out.count("left undistilled") >= 1
    identity = _metadata(spoilt)["identity"]
    for one, other in zip(load(spoilt, 3, identity).layers, load(still, 3, identity).layers, strict=True):
        for part in one:
            for name, tensor in one[part].tensors.items():
                assert (tensor == other[part].tensors[name]).all(), f"{part} {name}"


def test_a_predictor_that_does_worse_than_its_file_says_is_named_in_the_metrics(settings, tmp_path):
    made = tmp_path / "stand-ins.safetensors"
    train(settings("none", predictor={"path": str(made), "stand_ins": {"kind": "none"}}))
    identity = _metadata(made)["identity"]
    worse = load(made, 3, identity)
    calibration = worse.calibration
    assert calibration is not None
    promised = type(calibration)(calibration.temperatures, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    save(StandIns(worse.method, worse.layers, promised), made, identity)
    metrics = run(settings("drifted", predictor={"path": str(made), "top_k": 1}))  # top-3 is hardly ever wrong with so few experts
    assert "the predictor has drifted" in metrics["prediction"]["drift"]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as f:
        return f.metadata()
