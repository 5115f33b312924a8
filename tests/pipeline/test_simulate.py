"""What the simulator says of a model's trace, beside what a run of the model does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.bench.workload import experts_used, record_batches
from pipeline.config import parse
from pipeline.executor import Executor
from pipeline.plan import simulate as simulating
from pipeline.plan.simulate_report import draw
from pipeline.prepare import prepare
from predictor import traces
from predictor.actor import timed
from predictor.baselines import Oracle, Random
from predictor.hash_table import Width
from predictor.token_table import TokenTable
from store.actor import ExpertStore
from store.eviction import POLICIES
from store.simulator import simulate
from tests.conftest import SENTENCES, config_data, save_switch, write_tsv


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config of a small Switch and a few sentences."""
    base = tmp_path_factory.mktemp("simulate")
    save_switch(base / "model")
    rows = write_tsv(base / "rows.tsv", SENTENCES * 4)
    (base / "arenas").mkdir()
    bench = {"batch_sizes": [1, 3], "budgets": ["15%", "40%"]}
    return config_data(base / "model", rows, base / "arenas", base / "out", bench=bench)


@pytest.fixture(scope="module")
def traced(small):
    """Prepared, its routing per batch and its tables by predictor; the arena stands."""
    prepared = prepare(parse(small, "a test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    recorded = record_batches(prepared)
    trace, shape = traces.join(recorded), prepared.model.shape
    makers = {"oracle": Oracle(trace, shape, 1), "counts": TokenTable.fit(trace, shape, Width(2)), "random": Random(shape, 2, 0)}
    tables = {name: [timed(maker, batch.tokens) for batch in prepared.batches] for name, maker in makers.items()}
    yield prepared, [[[e for _, e in layer] for layer in experts_used(t, shape.top_k)] for t in recorded], tables
    store.close(False)


@pytest.mark.parametrize("predictor", ["oracle", "counts", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_on_a_cpu_hits_and_moves_in_every_batch_as_simulated(traced, policy, predictor):
    prepared, uses, tables = traced
    slots, lookahead = 8, 3
    moved = simulate(prepared.layout, slots, policy, uses, [p.table.uses for p in tables[predictor]], lookahead)
    executor = Executor(replace(prepared.executor_spec(background=False), slots=slots, policy=policy))
    try:
        for planned in range(len(uses) + lookahead):
            if planned < len(uses):
                executor.plan(planned, tables[predictor][planned])
            if (batch := planned - lookahead) >= 0:
                stats = executor.execute(prepared.batches[batch], tables[predictor][batch]).stats
                expected = moved[batch]
                assert (stats.hits, stats.misses) == (expected.hits, expected.misses)
                assert stats.moves == sum(experts for _, _, experts in expected.copy_spans) + sum(expected.misses)
                assert stats.prefetch_bytes == expected.prefetch_bytes
                assert stats.read_in_place_bytes == expected.read_in_place_bytes
                assert stats.resident_peak_bytes == expected.resident_peak_bytes
    finally:
        executor.close()
    assert sum(sum(m.hits) for m in moved) > 0
    assert sum(sum(m.misses) for m in moved) > 0 or predictor == "oracle"


def test_the_command_writes_a_row_for_every_batch_size_budget_predictor_and_policy(small, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small))  # which is YAML
    assert simulating.main([str(config), f"output_dir={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "simulate.json").read_text())
    named = [(row["batch"], row["budget"], row["predictor"], row["policy"]) for row in report["rows"]]
    predictors = ("oracle", "random", simulating.ON_DEMAND)
    assert named == [(b, m, t, p) for b in (1, 3) for m in ("15%", "40%") for t in predictors for p in POLICIES]
    for row in [*report["rows"], *report["one_by_one"]]:
        assert row["hits"] + row["misses"] == row["uses"]
        assert row["misses"] + row["copies"] == row["moves"] >= row["fewest_moves"] > 0
    one_by_one = [(row["batch"], row["budget"], row["policy"]) for row in report["one_by_one"]]
    assert one_by_one == [(b, m, p) for b in (1, 3) for m in ("15%", "40%") for p in simulating.ONE_BY_ONE]
    text = (tmp_path / "out" / "simulate.md").read_text()
    assert text.count("| oracle | 40% |") == text.count("| random | 15% |") == 2


def test_with_true_tables_looking_ahead_moves_least(small, tmp_path):
    config = replace(parse(small, "a test"), output_dir=str(tmp_path))
    rows = [row for row in simulating.run(config, {})["rows"] if row["predictor"] == "oracle"]
    for key in {(row["batch"], row["budget"]) for row in rows}:
        moves = {row["policy"]: row["moves"] for row in rows if (row["batch"], row["budget"]) == key}
        assert moves["lookahead"] == min(moves.values())


def test_the_picture_fits_a_repository(small, tmp_path):
    pytest.importorskip("matplotlib")
    report = simulating.run(replace(parse(small, "a test"), output_dir=str(tmp_path)), {})
    assert draw(report, tmp_path) == [tmp_path / "simulate.png"]
    assert 5_000 < (tmp_path / "simulate.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictor", "token_table"], "--predictor token_table: it is written KIND=FILE"),
        (["--predictor", "token_table=nowhere.safetensors"], "nowhere.safetensors"),
        (["--predictor", "crystal_ball=x"], "crystal_ball"),
        (["bench.budgets=[150%]"], "bench.budgets"),
        (["store.policy=lifi"], "lifi"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(small, tmp_path, capsys, arguments, message):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small))
    assert simulating.main([str(config), f"output_dir={tmp_path / 'out'}", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
