"""Texts that a model writes, as a history: it is what a run of the same texts reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.executor import Executor
from pipeline.plan import simulate as simulating
from pipeline.plan.written import AHEAD, Written
from pipeline.prepare import prepare
from predictor.hash_table import HashTable
from predictor.tokens import TokenBatch
from predictor.traces import LayerTrace, Trace
from store.actor import ExpertStore
from tests.conftest import ROOT, SENTENCES, save_switch, write_tsv

TINY = {
    "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """The shipped config with a model of a few kilobytes."""
    shape = json.loads((ROOT / "configs" / "models" / "qwen3-moe-small.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(shape | TINY))
    (tmp_path / "arenas").mkdir()
    rows = write_tsv(tmp_path / "rows.tsv", SENTENCES[:4])
    given = [
        f"model.config={tmp_path / 'model.json'}", f"model.tokenizer={ROOT / 'assets' / 'switch-mini-64'}", f"data.path={rows}",
        f"store.directory={tmp_path / 'arenas'}", "generate.max_new_tokens=6", "bench.batch_sizes=[3]", "bench.budgets=[40%]",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    return load_config(ROOT / "configs" / "simulate-written.yaml", given)


def test_a_run_that_writes_the_same_texts_reads_as_many_experts(small):
    small = replace(small, batch=replace(small.batch, size=3))
    history = simulating.record(small, {})
    prepared = prepare(small)
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    executor = Executor(prepared.executor_spec())
    try:
        stats = [executor.execute(batch, None).stats for batch in prepared.batches]
    finally:
        executor.close()
        store.close(False)
    for layer in range(2):
        assert sum(len(uses[layer]) for uses in history.uses) == sum(s.hits[layer] + s.misses[layer] for s in stats)


def test_true_tables_move_least_and_are_told_apart_by_when_they_come(small):
    rows = simulating.run(small, {})["rows"]
    looking = {row["predictor"]: row for row in rows if row["policy"] == "lookahead"}
    known = [f"oracle, {forwards} ahead" for forwards in AHEAD]
    assert [looking[name]["lookahead"] for name in known] == list(AHEAD)
    assert {"rehearsal", "rehearsal, 0 ahead", "random", "random, 0 ahead", simulating.ON_DEMAND} < looking.keys()
    assert looking["oracle"]["moves"] <= looking[known[1]]["moves"] < looking[known[0]]["moves"]
    assert looking["oracle"]["moves"] < looking["random"]["moves"]


def test_a_row_that_has_ended_is_in_no_later_forward():
    top = np.array([[0], [1], [2], [3], [4], [5]], dtype=np.int16)
    layer = LayerTrace(top, np.ones_like(top, dtype=np.float16), np.ones(6, dtype=np.float16))
    tokens = TokenBatch(((np.arange(2), np.arange(4)),))  # a prompt of two tokens and one more; one of one and three more
    written = Written(tokens, (2, 1), Trace(tokens, (layer,)))
    assert list(written.uses(1)) == [[[0, 1, 2]], [[3]], [[4]], [[5]]]
    table = HashTable((top,), (np.ones((6, 1), np.float32),), (np.ones((6, 1), np.float32),))
    assert [[expert for expert, _ in part.uses[0]] for part in written.tables(table)] == [[0, 1, 2], [3], [4], [5]]


def test_what_an_encoder_decoder_writes_is_not_simulated(small, tmp_path):
    save_switch(tmp_path / "switch")
    no_recipe = replace(small.model.random, recipe=None)
    model = replace(small.model, path=str(tmp_path / "switch"), config=None, tokenizer=None, random=no_recipe)
    with pytest.raises(ConfigError, match="decoders' texts"):
        simulating.record(replace(small, model=model, predictor=replace(small.predictor, kind="random")), {})
