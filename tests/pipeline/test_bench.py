"""`bench` on the CPU: every system's rows, what is reported of them, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.bench import command, systems
from pipeline.bench.command import bench
from pipeline.bench.output import BenchDir
from pipeline.bench.report import COLUMNS, draw, markdown
from pipeline.bench.rows import Measured, _errors, ray_over_in_process
from pipeline.bench.systems import SYSTEMS, Combination, check_systems
from pipeline.bench.whole import Pass
from pipeline.bench.workload import _recall
from pipeline.config import Config, load_config, parse
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.prepare import prepare
from predictor.hash_function import HashFunction
from predictor.hash_table import HashTable
from predictor.registry import save_lstm
from store.actor import ExpertStore
from store.errors import SpaceError
from store.load import routers_identity
from store.slots import parse_budget
from tests.conftest import ROOT, config_data, save_switch, write_tsv

BUDGETS = ["10%", "40%"]
EXPERTS = 32


def config(root: Path, output: str = "out", predictor: dict | None = None, **changes) -> Config:
    """A bench of the model in root/model; `changes` are keys of `bench`."""
    settings = {"systems": ["transformers", "sida"], "rounds": 1, "batches": 2} | changes
    data = config_data(root / "model", root / "rows.tsv", root / "arenas", root / output, bench=settings)
    return parse(data | {"predictor": predictor or {"top_k": 1}}, "test")


def with_lstm(root: Path) -> dict:
    """A file of weights that nobody has trained."""
    prepared = prepare(config(root))
    torch.manual_seed(0)
    network = HashFunction(prepared.model.shape, 32, 16)
    identity = routers_identity(prepared.weights, prepared.model.placement)
    save_lstm(network, root / "lstm.safetensors", prepared.model.shape, identity, None)
    return {"kind": "lstm", "path": str(root / "lstm.safetensors"), "top_k": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    save_switch(directory / "model", num_experts=EXPERTS)
    write_tsv(directory / "rows.tsv")
    (directory / "arenas").mkdir()
    return directory


@pytest.fixture(scope="module")
def done(root) -> Path:
    """The output of a bench of everything that a CPU can run without Ray."""
    names = ["transformers", "cpu", "resident", "sida", "paper", "in_process"]
    given = {"batch_sizes": [1, 3], "budgets": BUDGETS, "rounds": 2, "batches": 3, "recall": 0.3}
    bench(config(root, "done", with_lstm(root), systems=names, **given))
    return root / "done"


@pytest.fixture(scope="module")
def report(done) -> dict:
    return json.loads((done / "bench.json").read_text())


def of(report: dict, system: str, **wanted) -> list[dict]:
    return [row for row in report["rows"] if row["system"] == system and all(row[k] == v for k, v in wanted.items())]


def test_every_system_has_a_row_for_all_that_it_can_be_given(report):
    worsened = "oracle worsened to 0.3"
    every = {(row["batch"], row["system"], row["budget"], row["predictor"]) for row in report["rows"]}
    assert len(every) == len(report["rows"])
    assert every == {
        (size, *given)
        for size in (1, 3)
        for given in (
            ("transformers", None, None),
            ("resident", None, "oracle"),
            *(("sida", budget, predictor) for budget in BUDGETS for predictor in ("oracle", worsened, "lstm")),
            *(("paper", budget, "lstm") for budget in BUDGETS),
            *(("in_process", budget, "oracle") for budget in BUDGETS),
        )
    }


def test_a_rehearsal_needs_no_file_to_have_rows_of_its_own(root):
    predictor = {"kind": "rehearsal", "top_k": 1, "stand_ins": {"kind": "4bit", "budget": "100%"}}
    rows = bench(config(root, "rehearsal", predictor, systems=["sida"], budgets=["50%"]))["rows"]
    assert [row["predictor"] for row in rows] == ["oracle", "rehearsal"]
    assert rows[1]["recall"] > 0.9
    assert rows[1]["predict_ms"] > 0
    assert rows[1]["max_error"] < 1e-5


def test_what_a_prediction_beside_the_serving_costs_and_who_has_no_room_for_stand_ins(root, capsys):
    predictor = {"kind": "rehearsal", "top_k": 1, "device": "executor"}
    given = {"systems": ["resident", "sida", "predicting"], "batch_sizes": [1], "batches": 5, "rounds": 2}
    rows = bench(config(root, "live", predictor, budgets=["60%", "20%"], **given))["rows"]
    assert [(row["system"], row["budget"], row["predictor"]) for row in rows] == [
        ("resident", None, "oracle"),
        *(
            (system, budget, name)
            for budget in ("60%", "20%")
            for system, name in (("sida", "oracle"), ("sida", "rehearsal"), ("predicting", "rehearsal"))
        ),
    ]
    assert all((row["prediction_cost"] is not None) == (row["system"] == "predicting") for row in rows)
    assert all(row["max_error"] < 1e-5 for row in rows)
    assert rows[3]["predict_ms"] > 0 and rows[3]["hit_rate"] > 0
    large = predictor | {"stand_ins": {"kind": "4bit", "budget": "100%"}}
    rows = bench(config(root, "large", large, budgets=["5%", "60%"], **given))["rows"]
    assert [row["budget"] for row in rows if row["predictor"] == "rehearsal"] == ["60%", "60%"]
    assert "sida (rehearsal) at 5% is left out: store.budget: '5%'" in capsys.readouterr().out


def test_a_group_has_each_expert_at_one_of_its_devices_and_the_same_answers(root):
    given = replace(config(root, "parallel", systems=["sida", "parallel"], budgets=["50%"], batches=3), executors=2)
    one, group = bench(given)["rows"]
    assert (one["devices"], group["devices"], group["budget"]) == (1, 2, "50%")
    assert group["max_error"] < 1e-5
    assert group["hit_rate"] == 1.0
    assert group["moves"] == 0  # all came before the rounds that count
    assert group["fewest_moves"] is None
    assert (one["placement"], group["placement"]) == (None, "greedy")


def test_placements_take_turns_and_each_says_how_even_it_is(root):
    given = {"systems": ["parallel"], "budgets": ["50%"], "batches": 4, "placements": ["round_robin", "greedy"]}
    rows = bench(replace(config(root, "placements", **given), executors=2))["rows"]
    assert [row["placement"] for row in rows] == ["round_robin", "greedy"]
    assert all(row["max_error"] < 1e-5 and 0.5 <= row["avg_max_load"] <= 1 for row in rows)
    assert rows[0]["avg_max_load"] != rows[1]["avg_max_load"]  # each had a plan of its own
    assert "| parallel, greedy |" in (root / "placements" / "bench.md").read_text()


def test_rows_have_the_keys_that_the_docs_explain(report):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    explained = re.findall(r"^\| `(\w+)` \|", page.partition("## The rows of bench.json")[2].partition("\n## ")[0], re.M)
    for row in report["rows"]:
        assert sorted(row) == sorted(explained)


def test_under_exact_routing_answers_are_those_of_the_whole_model(report):
    for row in report["rows"]:
        if row["system"] != "paper":
            assert row["median_error"] <= row["max_error"] < 1e-5


def test_an_error_of_any_round_counts():
    """The right answers are 1 and 4; the second round's second is wrong by 2."""
    reference = [np.ones((1, 1)), np.full((1, 1), 4.0)]
    rounds = [
        Pass(1.0, reference, [1.0, 1.0]),
        Pass(1.0, [reference[0], np.full((1, 1), 6.0)], [1.0, 1.0]),
        Pass(1.0, reference, [1.0, 1.0]),
    ]
    found = _errors(SimpleNamespace(reference=reference), Measured(Combination("sida", "10%"), rounds))
    assert found.tolist() == [0, 0, 0, 0.5, 0, 0]


def test_recall_is_that_of_the_tables(report):
    for row in report["rows"]:
        if row["predictor"] == "oracle":
            assert row["recall"] == 1.0
        if row["predictor"] == "lstm":
            assert row["recall"] < 0.6  # untrained
        if row["predictor"] is None:
            assert row["recall"] is row["predict_ms"] is None
        else:
            assert row["predict_ms"] > 0
    for row in of(report, "sida", predictor="oracle worsened to 0.3"):
        assert 0.3 <= row["recall"] < 0.85  # an expert of several tokens is found if one of them is left right


def test_recall_counts_experts_and_not_tokens():
    """Of layer 0 one of two is named, of layer 1 both."""
    experts = (np.array([[4], [4], [9]], np.int16), np.array([[1], [2], [2]], np.int16))
    ones = tuple(np.ones(e.shape, np.float32) for e in experts)
    assert _recall([HashTable(experts, ones, ones)], [[[(0, 4), (0, 5)], [(1, 1), (1, 2)]]]) == 3 / 4


def test_more_slots_move_less_and_none_moves_less_than_foresight(report):
    for size in (1, 3):
        assert of(report, "resident", batch=size)[0]["fewest_moves"] == 0
        small, large = (of(report, "sida", batch=size, budget=b, predictor="oracle")[0] for b in BUDGETS)
        assert small["fewest_moves"] > large["fewest_moves"]
        for row in (small, large):
            assert row["moves"] >= row["fewest_moves"] - round(0.4 * 3 * EXPERTS)  # the last round may leave others in slots
            assert row["expert_bytes_resident_peak"] <= 0.4 * report["expert_bytes"]


def test_what_nothing_crosses_a_link_for_has_no_limit(report):
    assert report["link_gb_per_s"] is None
    for row in report["rows"]:
        assert row["limit_ms"] is row["ratio_to_limit"] is row["link_efficiency"] is row["device_memory_peak_bytes"] is None
        assert row["speedup"] is not None


def test_the_system_that_would_be_measured_twice_on_a_cpu_is_left_out(root, capsys):
    done = bench(config(root, "twice", systems=["cpu", "transformers"]))
    assert [row["system"] for row in done["rows"]] == ["transformers"]
    assert "cpu is left out" in capsys.readouterr().out


def test_a_bench_that_is_cut_short_has_said_how_far_it_was_and_keeps_the_budgets_that_it_finished(root, monkeypatch, capsys):
    measure = command._take_turns

    def cut_short(workload, budget, combinations):
        if budget == "40%":
            raise KeyboardInterrupt
        return measure(workload, budget, combinations)

    monkeypatch.setattr(command, "_take_turns", cut_short)
    with pytest.raises(KeyboardInterrupt):
        bench(config(root, "cut", systems=["sida"], budgets=BUDGETS, batch_sizes=[3], batches=1))
    kept = json.loads((root / "cut" / "bench.json").read_text())["rows"]
    assert {row["budget"] for row in kept} == {"10%"}
    said = re.sub(r"[\d.]+ s\b", "- s", capsys.readouterr().out).splitlines()[1:]
    assert said[:5] == [
        "batches of 3: recording the routing of 1, and what transformers answers",
        "batches of 3: recorded in - s",
        "batches of 3, 10%: setting up sida",
        "batches of 3, 10%: set up in - s; rounds to warm up: 1, to measure: 1",
        "batches of 3, 10%: done in - s",
    ]


def test_the_table_has_a_section_per_batch_size_and_a_line_per_row(done, report):
    text = (done / "bench.md").read_text()
    assert re.findall(r"^## .*, batch (\d+)$", text, re.M) == ["1", "3"]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == len(report["rows"]) + 2
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)


def on_a_gpu(report: dict) -> dict:
    """The same rows as if there had been a link and a limit."""
    limits = {"limit_ms": 1.0, "ratio_to_limit": 1.5, "link_efficiency": 0.9, "device_memory_peak_bytes": 5 * 10**9}
    return report | {"link_gb_per_s": 50.0, "rows": [row | limits for row in report["rows"]]}


def test_pictures_are_drawn_and_small(done, report, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = [*done.glob("*.png"), *draw(on_a_gpu(report), tmp_path)]
    assert sorted(path.name for path in drawn) == ["memory.png", "memory.png", "throughput.png", "throughput.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 60_000


def test_a_report_of_systems_without_budgets_can_be_drawn(report, tmp_path):
    rows = [row for row in report["rows"] if row["system"] == "transformers"]
    assert "batch 3" in markdown(report | {"rows": rows})
    pytest.importorskip("matplotlib")
    assert len(draw(report | {"rows": rows}, tmp_path)) == 2


def test_without_matplotlib_a_line_says_what_to_install(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(report, tmp_path) == []
    assert capsys.readouterr().out == "no picture: it needs matplotlib; pip install -e '.[plots]'\n"


def test_every_row_of_sida_has_a_timeline_in_which_one_predictor_makes_one_table_at_a_time(done, report):
    names = [row["timeline"] for row in of(report, "sida")]
    assert len(set(names)) == len(names) == 12
    assert {path.name for path in done.glob("timeline-*.json")} == set(names)
    assert all(row["timeline"] is None for row in report["rows"] if row["system"] != "sida")
    for name in names:
        spans = [e for e in json.loads((done / name).read_text())["traceEvents"] if e["ph"] == "X"]
        assert {span["cat"] for span in spans} >= {"predict", "compute"}
        predicted = sorted((s["ts"], s["ts"] + s["dur"]) for s in spans if s["cat"] == "predict")
        computed = sorted(s["ts"] for s in spans if s["cat"] == "compute")
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(predicted))
        assert all(made[1] <= began + 1e-3 for made, began in zip(predicted, computed, strict=True))
        assert computed[-1] < 60e6  # the tables were made long before: a timeline that begins there shows nothing


def test_rays_share_is_of_the_neighbour_in_time():
    def row(system: str, budget: str, *ms: float) -> dict:
        return {"system": system, "batch": 4, "budget": budget, "round_ms": list(ms)}

    rows = [row("in_process", "10%", 10, 20, 30), row("ray", "10%", 20, 20, 40), row("in_process", "20%", 9, 9, 9)]
    assert ray_over_in_process(rows[::2]) is None
    assert ray_over_in_process(rows) == {
        "median": 0.75,
        "rounds": [0.5, 1.0, 0.75],
        "per_budget": [{"batch": 4, "budget": "10%", "median": 0.75}],
    }
    both = ray_over_in_process([*rows, row("ray", "20%", 10, 10, 10)])
    assert both is not None
    assert both["median"] == 0.9 and [each["median"] for each in both["per_budget"]] == [0.75, 0.9]
    assert "budget 20%: 90.0%" in markdown(
        {"hardware": "", "versions": {}, "link_gb_per_s": None, "arena": {"warm_start": True, "seconds": 0}}
        | {"expert_bytes": 0, "backbone_bytes": 0, "rows": [], "ray_over_in_process": both}
    )


# what is refused


def refused(given: Config) -> str:
    """The message; nothing was loaded, nothing is left."""
    output, arenas = Path(given.output_dir), Path(given.store.directory)
    before = sorted(output.iterdir()) if output.is_dir() else output.exists()
    with pytest.raises(USER_ERRORS) as error:
        bench(given)
    assert "\n" not in str(error.value)
    assert before == (sorted(output.iterdir()) if output.is_dir() else output.exists())
    assert list(arenas.iterdir()) == []
    return str(error.value)


def test_an_unknown_system_is_refused_with_the_nearest_known_one(root):
    assert "bench.systems: there is no 'sidda'; did you mean 'sida'?" in refused(config(root, systems=["sidda"]))
    assert "known: transformers, cpu" in refused(config(root, systems=["transformers", "zzz"]))
    assert "names none" in refused(config(root, systems=[]))


@pytest.mark.parametrize("name", [name for name, kind in SYSTEMS.items() if kind.needs_gpu])
def test_what_needs_a_gpu_is_refused_without_one(root, name):
    assert f"{name!r} needs a GPU" in refused(config(root, systems=["transformers", name]))


def test_a_group_of_one_is_refused(root):
    assert "'parallel' shares experts out, and executors is 1" in refused(config(root, systems=["parallel"]))


def test_placements_of_nothing_are_refused(root):
    assert "which bench.systems does not name" in refused(config(root, placements=["greedy"]))


def test_a_system_whose_package_is_missing_is_refused_with_the_extra_that_brings_it(root, monkeypatch):
    monkeypatch.setattr(systems, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'accelerate' needs accelerate, which is not installed; pip install -e '\.\[bench\]'"):
        check_systems(config(root, systems=["accelerate"]), "cuda:0")
    monkeypatch.setattr(systems, "find_spec", lambda name: "there")
    check_systems(config(root, systems=["accelerate", "on-demand"]), "cuda:0")


def test_the_papers_system_is_refused_without_its_predictor(root):
    assert "'paper' needs predictor.kind=lstm" in refused(config(root, systems=["paper"]))
    missing = {"kind": "lstm", "path": str(root / "nothing.safetensors")}
    assert "nothing.safetensors" in refused(config(root, systems=["paper"], predictor=missing))


@pytest.mark.parametrize("budget", ["20 percent", "120%", "-1"])
def test_a_budget_that_is_none_is_refused_before_anything_is_placed(root, budget):
    assert "bench.budgets" in refused(config(root, budgets=["10%", budget]))


def test_a_directory_that_is_not_a_benchs_is_refused(root, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "letter.txt").write_text("dear")
    assert "holds files that are not a bench's" in refused(replace(config(root), output_dir=str(tmp_path / "kept")))
    (tmp_path / "file").write_text("")
    assert "output_dir" in refused(replace(config(root), output_dir=str(tmp_path / "file")))
    (tmp_path / "kept" / "bench.json").write_text("{}")
    assert "has no config" in refused(replace(config(root), output_dir=str(tmp_path / "kept")))


def test_the_bench_of_another_config_is_not_overwritten(root):
    first = config(root, "kept", systems=["transformers"], batches=1)
    bench(first)
    other = config(root, "kept", systems=["transformers"], batches=2)
    assert "holds a bench with bench.batches = 1, this config has 2" in refused(other)
    bench(first)


def test_a_bench_that_cannot_place_its_experts_leaves_nothing(root, monkeypatch):
    def full(self, progress):
        raise SpaceError("no room")

    monkeypatch.setattr(ExpertStore, "open", full)
    assert refused(config(root, "nowhere")) == "no room"
    assert not (root / "nowhere").exists()


def test_two_benches_do_not_share_a_directory(root, tmp_path):
    given = replace(config(root), output_dir=str(tmp_path / "both"))
    with BenchDir(given), pytest.raises(ConfigError, match="is being written by another bench"):
        BenchDir(given).__enter__()
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("bench-*.yaml")), ids=lambda path: path.name)
def test_the_shipped_benches_name_systems_and_budgets_that_there_are(path):
    given = load_config(path, []).bench
    assert set(given.systems) <= set(SYSTEMS)
    for budget in given.budgets:
        parse_budget(budget, 1000, 10, 1000)


@pytest.mark.slow
def test_the_pipeline_and_direct_calls_are_compared_round_by_round(root):
    done = bench(config(root, "ray", systems=["ray", "in_process"], rounds=3))
    ratio = done["ray_over_in_process"]
    assert len(ratio["rounds"]) == 3
    assert ratio["median"] == sorted(ratio["rounds"])[1] == ratio["per_budget"][0]["median"]
    assert all(row["max_error"] < 1e-5 for row in done["rows"])
