"""The paper's tables on small real models: what is exact is exact, what a predictor knows is seen, what is missing is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from pipeline.errors import ConfigError
from pipeline.predicting import train as training
from pipeline.predicting.measured import measure
from pipeline.predicting.sheet import load_sheet
from pipeline.predicting.tables import TABLES, lines, main
from pipeline.predicting.train import record
from predictor.errors import PredictorError
from tests.conftest import ROOT, SENTENCES, save_switch, write_tsv

PREDICTORS = {
    "random": {"kind": "random"},
    "token table": {"kind": "token_table", "train": {}},
    "svd": {"kind": "rehearsal", "stand_ins": {"kind": "svd", "budget": "100%"}},
}


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    """Of a head on an encoder, an encoder-decoder that scores, and a row whose data is not there."""
    directory = tmp_path_factory.mktemp("tables")
    save_switch(directory / "head", head=True, num_labels=2)
    save_switch(directory / "text", seed=1)
    (directory / "arenas").mkdir()
    rows = str(write_tsv(directory / "rows.tsv", [*SENTENCES, *(f"{a} {b}" for a in SENTENCES for b in SENTENCES[:2])]))
    write_tsv(directory / "others.tsv", [f"{b} and {a}" for a in SENTENCES for b in SENTENCES[:3]])
    asked = {"task": "classify", "labels": {0: "negative", 1: "positive"}}
    data = {"path": rows, "text": "sentence"}
    training = {"path": str(directory / "others.tsv")}
    made = {
        "common": {"batch": {"size": 3}, "store": {"budget": "40%", "directory": str(directory / "arenas")}},
        "rows": {
            "head": asked
            | {"model": {"path": str(directory / "head"), "dtype": "float32"}, "data": data | {"label": "label"}}
            | {"training": training, "paper": {"fidelity": "98.25 %"}},
            "text": {
                "task": "score",
                "model": {"path": str(directory / "text"), "dtype": "float32"},
                "data": data | {"target": "sentence"},
                "training": training,
            },
            "absent": asked | {"model": {"path": str(directory / "head")}, "data": {"path": str(directory / "absent.tsv")}},
        },
        "predictors": PREDICTORS,
        "directory": str(directory / "predictors"),
    }
    path = directory / "sheet.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def table(name: str, sheet: Path) -> tuple[list[list[str]], list[str]]:
    """Its cells without the header, and what was said."""
    said: list[str] = []
    made = list(lines(name, load_sheet(sheet, []), said.append))
    width = len(TABLES[name][1]) + 1
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in made]
    assert len(cells[0]) == width and all(len(row) == width for row in cells[2:])
    return cells[2:], said


def test_exact_routing_is_the_whole_model_and_a_rehearsal_of_full_rank_nearly_so(sheet):
    rows, said = table("fidelity", sheet)
    assert [row[:2] for row in rows] == [["head", name] for name in PREDICTORS]
    for row in rows:
        assert row[2] == row[3] and float(row[7]) < 1e-5
        assert row[8] == "98.25 %"
    assert rows[2][5] == "100.0%" and rows[2][4] == rows[2][3]
    assert len(said) == 1 and "absent is left out" in said[0]


def test_perplexity_is_of_texts_that_are_scored(sheet):
    rows, _ = table("perplexity", sheet)
    assert [row[0] for row in rows] == ["text"] * 3
    for row in rows:
        assert float(row[2]) == pytest.approx(float(row[3]), rel=1e-6)
    ratios = [abs(float(row[5].split()[0]) - 1) for row in rows]
    assert ratios[2] < 0.01 < ratios[0]


def test_hits_are_of_every_layer_and_a_better_predictor_has_more(sheet):
    rows, _ = table("hits", sheet)
    head = [row for row in rows if row[0] == "head"]
    means = [float(row[3].split("%")[0]) for row in head]
    assert means[0] < means[1] < means[2] and means[2] > 98
    assert head[2][4].startswith("100.0% / 100.00%") and len(head[2][4].split(";")) == 2
    assert [row[2] == "-" for row in head] == [True, True, False]


def test_what_texts_leave_idle_is_counted_text_by_text(sheet):
    loaded = load_sheet(sheet, [])
    config = loaded.config("head")
    found = measure(config, {"svd": loaded.config("head", "svd")}, answers=False)
    memory = found.predicted["svd"].memory
    assert len(memory) == 21 and not found.whole
    for one in memory:
        assert 2 / 16 <= one.used <= min(2 * one.tokens, 16) / 16 and one.named >= one.used - 1e-9
    rows, _ = table("memory", sheet)
    head = [row for row in rows if row[0] == "head"]
    assert sum(int(row[2]) for row in head) == 21
    idle = [float(row[3].strip("%")) for row in head]
    assert idle == sorted(idle, reverse=True)


def test_all_tables_are_of_one_measurement_whose_figures_are_kept(sheet, capsys):
    assert main(["all", str(sheet), "predictors={svd: {kind: rehearsal, stand_ins: {kind: svd, budget: 100%}}}"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in TABLES] == list(TABLES)
    loaded = load_sheet(sheet, [])
    head, text = (json.loads(loaded.figures(row).read_text()) for row in ("head", "text"))
    assert head["whole"]["accuracy"] == head["exact"]["accuracy"] and text["whole"]["perplexity"] > 1
    assert (
        list(head["predictors"]) == ["svd"] and sum(saved["texts"] for saved in head["predictors"]["svd"]["memory"].values()) == 21
    )
    assert f"{head['predictors']['svd']['mean_top1']:.1%}" in printed
    assert not loaded.figures("absent").exists()


def test_what_a_prediction_costs_is_measured(sheet):
    rows, _ = table("cost", sheet)
    assert all(float(row[3]) > 0 and row[2] == "3" for row in rows)


def test_a_predictor_of_another_model_is_refused(sheet):
    other = [f"rows.head.model.path={sheet.parent / 'text'}", "rows.head.task=score", "rows.head.data.target=sentence"]
    loaded = load_sheet(sheet, other)
    load_sheet(sheet, []).train("head")
    config = loaded.config("head", "token table")
    with pytest.raises(PredictorError, match="made for another model"):
        measure(loaded.config("head"), {"token table": config}, answers=False)


def test_what_a_row_trains_is_trained_on_one_trace(sheet, tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(training, "record", lambda prepared: traced.append(prepared) or record(prepared))
    lstm = "{kind: lstm, train: {epochs: 1, hidden: 8}}"
    found = {}
    for directory, predictors in (("both", ["lstm", "table"]), ("alone", ["table"])):
        kinds = {"lstm": lstm, "table": "{kind: token_table, train: {}}"}
        said = ", ".join(f"{name}: {kinds[name]}" for name in predictors)
        loaded = load_sheet(
            sheet, [f"directory={tmp_path / directory}", f"predictors={{{said}}}", "rows.head.train={batch_size: 5}"]
        )
        loaded.train("head")
        found[directory] = {path.name: load_file(path) for path in (tmp_path / directory).glob("*.safetensors")}
        assert loaded.config("head", predictors[0]).train.batch_size == 5
    assert len(traced) == 2  # one a sheet
    assert sorted(found["both"]) == ["head-lstm.safetensors", "head-table.safetensors"]
    together, alone = (found[directory]["head-table.safetensors"] for directory in ("both", "alone"))
    assert all((together[name] == tensor).all() for name, tensor in alone.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say TABLE SHEET.yaml"),
        (["table3", "x.yaml"], "TABLE one of perplexity"),
        (["hits", "nothing.yaml"], "nothing.yaml: No such file"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_predictor_that_cannot_be_trained_is_refused(sheet):
    with pytest.raises(ConfigError, match="random is not trained"):
        load_sheet(sheet, ["predictors.random.train={}"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda path: path.name)
def test_every_sheet_that_ships_can_be_read(path):
    assert load_sheet(path, []).rows
