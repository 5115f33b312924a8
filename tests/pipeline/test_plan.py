"""`plan`: bytes from headers alone, moves that a run then makes, and verdicts for models that fit and that do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import NotASafetensorsRepoError

from pipeline.bench.workload import record_batches
from pipeline.config import Config, parse
from pipeline.errors import ModelError
from pipeline.executor import Executor
from pipeline.plan import footprint as footprints
from pipeline.plan.command import plan, table
from pipeline.plan.expected import MIN, Expected, Pace, Routed, expect, knee, simulated
from pipeline.plan.footprint import footprint, gb
from pipeline.plan.provenance import provenance
from pipeline.plan.recorded import replay
from pipeline.predicting.train import train
from pipeline.prepare import load_tokenizer, prepare
from pipeline.reports.output import OutputDir
from pipeline.tasks.registry import make_task
from pipeline.weights import hub
from predictor import traces
from predictor.actor import timed
from predictor.baselines import Random
from store.actor import ExpertStore
from store.checkpoint import DTYPES, Checkpoint
from store.errors import SpaceError
from store.load import load
from store.simulator import Moves
from tests.conftest import SENTENCES, config_data, save_switch, write_tsv

GIB = 2**30


@pytest.fixture
def make(tmp_path, arena_dir):
    """Makes the config of a small model over some sentences."""
    save_switch(tmp_path / "model")
    rows = write_tsv(tmp_path / "rows.tsv", [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(30)])

    def config(**changes) -> Config:
        return parse(config_data(tmp_path / "model", rows, arena_dir, tmp_path / "out", **changes), "test")

    return config


@pytest.fixture
def trace(make, tmp_path) -> str:
    """The routing of all rows."""
    path = tmp_path / "trace.safetensors"
    train(make(predictor={"kind": "oracle", "path": str(path)}))
    return str(path)


def test_bytes_come_from_headers_and_are_those_of_the_arena(make, arena_dir, monkeypatch):
    config = make()
    prepared = prepare(config)
    arena = load(arena_dir / "arena", prepared.weights, prepared.model.placement)
    built, total = arena.layout.nbytes, arena.layout.expert_bytes
    arena.remove()

    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read_into", read)
    monkeypatch.setattr(Checkpoint, "sample", read)
    report = plan(config)
    assert report["bytes"]["arena"] == built
    assert report["bytes"]["experts"] == total
    assert report["bytes"]["backbone"] == prepared.layout.backbone_bytes
    assert report["free_bytes"].keys() == {"device", "host", "shm"} and min(report["free_bytes"].values()) > 0
    assert report["rows"] == []
    assert report["link_gb_per_s"] > 0
    assert report["auto"]["budget"] == "100%"
    assert list(arena_dir.iterdir()) == []


def test_writes_plan_json_beside_which_a_run_can_go(make, tmp_path):
    config = make()
    report = plan(config)
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert {"bytes", "free_bytes", "rows", "auto"} <= written.keys()
    assert written | {"config": None} == report | {"config": None}
    OutputDir(config).abandon()  # raises where it is not allowed
    (tmp_path / "out" / "something.txt").write_text("of another program")
    with pytest.raises(ValueError, match="holds files that are not a run's"):
        OutputDir(config)


def test_a_model_of_the_hub_is_planned_without_its_weights(make, tmp_path, monkeypatch):
    at_home = footprint(make())
    small = tmp_path / "small"
    small.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / name, small)
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = Checkpoint(tmp_path / "model").tensors
    headers = {name: SimpleNamespace(dtype=names[info.dtype], shape=list(info.shape)) for name, info in stored.items()}
    asked = []

    def download(model, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(small)

    monkeypatch.setattr(hub, "snapshot_download", download)
    files = {"model.safetensors": SimpleNamespace(tensors=headers)}
    monkeypatch.setattr(hub, "get_safetensors_metadata", lambda model: SimpleNamespace(files_metadata=files))
    config = make()
    there = footprint(replace(config, model=replace(config.model, path="some/model")))
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in asked)
    assert there.layout == at_home.layout

    def pickled(model):
        raise NotASafetensorsRepoError("no safetensors")

    monkeypatch.setattr(hub, "get_safetensors_metadata", pickled)
    with pytest.raises(ModelError, match="pickled weights have no headers to plan with"):
        footprint(replace(config, model=replace(config.model, path="some/model")))


def test_rows_for_every_budget_and_policy_with_the_bound_below(make, trace, arena_dir, tmp_path, capsys):
    budgets = ["0", "20%", "50%", "100%"]
    report = plan(make(plan={"trace": trace, "budgets": budgets, "policies": ["lru", "lookahead"]}))
    rows = {(row["budget"], row["policy"]): row for row in report["rows"]}
    assert {budget for budget, _ in rows} == {*budgets, "40%"}, "the config's own budget is among them"
    assert {policy for _, policy in rows} == {"lru", "lookahead", MIN}
    uses = rows["0", "lru"]["moves"]
    for budget in ["0", "20%", "40%", "50%", "100%"]:
        least = rows[budget, MIN]["moves"]
        for policy in ("lru", "lookahead"):
            row = rows[budget, policy]
            assert row["moves"] >= least
            assert 0 <= row["hit_rate"] <= 1
            assert row["samples_per_second"] > 0
    assert rows["0", "lru"]["hit_rate"] == 0 and rows["0", MIN]["moves"] == uses
    bound = [rows[budget, MIN]["moves"] for budget in ["0", "20%", "40%", "50%", "100%"]]
    assert bound == sorted(bound, reverse=True) and bound[-1] < bound[0]
    assert list(arena_dir.iterdir()) == [], "nothing of the scratch arena is left"
    shown = capsys.readouterr().out
    assert report["trace"] == {"rows": 30, "rows_of_data": 30, "same_routers": True} and "warning" not in shown
    for text in ("offloading is pointless", "moves per use", "store.budget=auto would take 100%"):
        assert text in shown
    own, slot = rows["40%", "lru"], report["bytes"]["slot"]
    line = next(line for line in shown.splitlines() if line.startswith("store.budget: 40% is "))
    assert line.startswith(f"store.budget: 40% is {own['slots']} slots, {gb(own['slots'] * slot)}, ")
    assert f"; {own['moves'] / uses:.3f} moves per use under lru, " in line and "refuse" not in line


def test_a_trace_of_other_data_or_another_model_is_told(make, trace, tmp_path):
    def told(**changes) -> list[str]:
        config = make(plan={"trace": trace}, **changes)
        model = prepare(make()).model if config.data.path == "nowhere.tsv" else prepare(config).model
        task = make_task(config, model, load_tokenizer(model.tokenizer))
        return provenance(config, model, task, replay(config, model).batches).warnings(config)

    others = write_tsv(tmp_path / "others.tsv", ["quite another text", "and one more"])
    assert told() == []
    assert told(batch={"size": 4, "order": "length"}) == [], "the order of rows is the config's"
    assert told(data={"limit": 20}) == [
        f"warning: plan.trace is of other rows: 20 of its 30 are among the 20 of {tmp_path / 'rows.tsv'}, as the config reads them"
    ]
    assert told(data={"path": str(others)}) == [
        f"warning: plan.trace is of other data: none of its 30 rows is among the 2 of {others}, as the config reads them"
    ]
    assert "none of its 30 rows" in told(data={"prefix": "sentence: "})[0]
    assert told(data={"path": "nowhere.tsv"}) == [
        "whether plan.trace is of the config's data is not known: nowhere.tsv: no such file"
    ]
    save_switch(tmp_path / "model", seed=1)
    assert told() == ["warning: plan.trace was recorded from another model of this shape: its routers are not this model's"]


@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead"])
def test_expected_moves_are_those_of_a_run(make, trace, policy):
    """With random tables, the worst there are, and copies that are made when they are planned."""
    config = make(plan={"trace": trace}, predictor={"kind": "random", "top_k": 2, "lookahead": 3})
    prepared = prepare(config)
    replayed = replay(config, prepared.model)
    expected = Moves.of(simulated(replayed.routed, prepared.slots, policy))
    assert 0 < expected.moves < expected.uses == replayed.routed.count
    load(prepared.arena, prepared.weights, prepared.model.placement).close()
    executor = Executor(replace(prepared.executor_spec(background=False), policy=policy))
    tables = Random(prepared.model.shape, 2, config.seed)
    planned, stats = 0, []
    predictions = [timed(tables, batch.tokens) for batch in prepared.batches]
    for batch in prepared.batches:
        while planned < min(len(prepared.batches), batch.index + 4):
            executor.plan(planned, predictions[planned])
            planned += 1
        stats.append(executor.execute(batch, predictions[batch.index]).stats)
    executor.close()
    assert sum(sum(s.misses) for s in stats) == expected.misses
    assert sum(s.moves for s in stats) == expected.moves


def test_a_recorded_trace_is_in_the_order_of_the_input_whatever_the_order_of_its_batches(make, tmp_path):
    config = make(batch={"size": 4, "order": "input"})
    rows = [row for batch in prepare(config).batches for row in batch.tokens.streams[0]]
    path = tmp_path / "trace.safetensors"
    train(make(batch={"size": 4, "order": "length"}, predictor={"kind": "oracle", "path": str(path)}))
    recorded = traces.load(path, prepare(config).model.shape, None).tokens.streams[0]
    assert [row.tolist() for row in recorded] == [row.tolist() for row in rows]


@pytest.mark.parametrize("interrupted", [train, record_batches])
def test_nothing_holds_the_arena_once_a_recording_is_interrupted(make, tmp_path, monkeypatch, interrupted):
    """By Ctrl-C or SIGTERM; then it goes, or can be removed."""
    config = make(predictor={"kind": "oracle", "path": str(tmp_path / "trace.safetensors")})
    prepared = prepare(make())
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    monkeypatch.setattr(Executor, "trace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        interrupted(config if interrupted is train else prepared)
    assert store.close(keep=False), "nobody else holds it"


def test_with_overlap_order_the_batches_are_those_that_a_run_would_make(make, trace):
    rows = {}
    for order in ("input", "overlap"):
        config = make(plan={"trace": trace}, batch={"size": 4, "order": order, "window": 12})
        rows[order] = [batch.rows.tolist() for batch in replay(config, prepare(config).model).batches]
    assert rows["input"] != rows["overlap"]
    for start in range(0, 8, 3):
        window = slice(start, start + 3)
        assert sorted(chain(*rows["overlap"][window])) == list(chain(*rows["input"][window]))


def test_what_does_not_fit_is_said_with_what_is_missing(make, monkeypatch):
    config = make()
    whole = footprint(config)
    monkeypatch.setattr(footprints, "free_bytes", lambda directory: whole.layout.nbytes - 1000)
    monkeypatch.setattr(footprints, "free_for_experts", lambda device, layout, in_memory: layout.expert_bytes // 2)
    tight = footprint(config)
    text = "\n".join(tight.sentences())
    assert not tight.arena_fits and "1000 bytes short" in text
    assert not tight.experts_fit and "50% of the experts' bytes fit the device" in text
    budget, reason = tight.auto()
    assert budget == f"{int(24 * 0.45) * whole.layout.slot_bytes}B" and "10 of 24 fit" in reason
    assert tight.slots(budget, "store.budget") == 10, "auto's budget can be written into a config"


def test_a_budget_that_is_none_is_refused_by_its_key(make):
    with pytest.raises(SpaceError, match=r"plan\.budgets: 'much' is not a budget"):
        plan(make(plan={"budgets": ["much"]}))


def test_time_is_what_was_tried_and_a_straight_line_between():
    pace = Pace.of([(40, 4.0), (0, 1.0), (20, 2.0), (20, 3.0), (20, 1.9)], predict_s=1.5, expert_s=0.1)
    assert pace.seconds(20) == 2.0, "the one in the middle of those that move alike"
    assert pace.seconds(30) == 3.0
    assert pace.seconds(0) == 1.5, "tables come no faster"
    assert pace.seconds(50) == pytest.approx(5.0), "what is beyond all that was tried takes the link's time"
    assert pace.compute_s == 1.0 and pace.is_link_bound(11) and not pace.is_link_bound(9)
    assert Pace.of([], 0.5, None).seconds(10) is None


def test_the_knee_is_where_a_curve_bends():
    assert knee([(0, 100), (10, 20), (50, 10), (100, 0)]) == 10
    assert knee([(0, 100), (50, 50), (100, 0)]) is None
    assert knee([(0, 100), (100, 100)]) is None
    assert knee([(7, 3)]) is None


def test_the_bound_knows_the_future_and_nobody_moves_less():
    uses = [[[b % 3]] for b in range(30)]
    routed = Routed(30, (3,), uses, [[[(b % 3, 1.0)]] for b in range(30)])
    pace = Pace.of([(0, 1.0), (1, 2.0)], 0.0, 1.0)
    assert expect(routed, "2", 2, MIN, pace).moves == 12  # two are kept, the third is moved each of its 10 times
    assert expect(routed, "3", 3, MIN, pace).moves == 3
    assert expect(routed, "2", 2, "lookahead", pace).moves >= 12
    assert expect(routed, "3", 3, MIN, pace).samples_per_second == 1.0, "when they come again nothing moves"


def test_the_table_says_what_does_not_fit_now():
    rows = [Expected(b, s, p, m, m, 0.0, None) for b, s, m in (("10%", 2, 50), ("50%", 9, 5)) for p in ("lru", MIN)]
    lines = table(rows, 100, fit=5, policy="lru")
    assert "0.500" in lines[2] and "does not fit" not in lines[2]
    assert "0.050" in lines[3] and lines[3].endswith("does not fit now")


def test_random_weights_are_planned_without_making_them(tmp_path, arena_dir):
    data = config_data(Path("unused"), write_tsv(tmp_path / "rows.tsv"), arena_dir, tmp_path / "out")
    root = Path(__file__).parents[2]
    big = root / "configs" / "models" / "switch-base-256.json"
    data["model"] = {"config": str(big), "random": {"recipe": "switch"}, "tokenizer": str(root / "assets" / "switch-mini-64")}
    known = footprint(parse(data, "test"))
    assert known.experts == 1536 and known.layout.expert_bytes > 20 * GIB
    assert known.model.dtype == "float32"
