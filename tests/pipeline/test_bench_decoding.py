"""`bench` of task generate, to its last line, on a CPU and with a GPU's code on the host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench import decoding
from pipeline.bench.command import bench
from pipeline.bench.decoding_limit import needed
from pipeline.bench.decoding_systems import DECODING, Ours
from pipeline.bench.decoding_workload import cut
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.executor import Executor
from store.simulator import layout_of
from tests.conftest import ROOT, TOKENIZER, VOCABULARY

CONFIG = ROOT / "configs" / "bench-qwen3-30b.yaml"
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2,
}  # fmt: skip


def small(tmp_path: Path, *overrides: str):
    """The shipped config with a model of a few kilobytes."""
    shape = json.loads((ROOT / "configs" / "models" / "qwen3-30b-a3b.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(shape | SMALL))
    (tmp_path / "arenas").mkdir(exist_ok=True)
    given = [
        f"model.config={tmp_path / 'model.json'}", f"model.tokenizer={TOKENIZER}", "model.dtype=float32",
        f"data.path={ROOT / 'assets' / 'movie' / 'dev.tsv'}", "data.limit=120", f"store.directory={tmp_path / 'arenas'}",
        "store.keep=false", "bench.batch_sizes=[1, 3]", "bench.prompts=[5, 9]", "bench.budgets=[25%, 50%]",
        "generate.max_new_tokens=8", f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    return load_config(CONFIG, [*given, *overrides])


def check(report: dict, systems: set[str]) -> None:
    assert {row["system"] for row in report["rows"]} == systems
    for row in report["rows"]:
        assert row["max_error"] < 1e-5, "a time counts only beside the same answers"
        assert row["ms_per_token"]["p10"] <= row["ms_per_token"]["median"] <= row["ms_per_token"]["p90"]
        assert row["ms_to_first_token"] > 0
        assert row["steps"] == 7
        assert 2 * 3 <= row["experts_per_token"] <= 2 * 3 * row["batch"]
        if row["budget"] is not None:
            assert 0 < row["min_moves_per_token"] <= row["limit_moves_per_token"] <= row["experts_per_token"]
            assert row["moves"] > 0
    fewer = [row for row in report["rows"] if row["budget"] == "50%"]
    for row in fewer:
        same = ("system", "batch", "prompt_tokens")
        (more,) = (r for r in report["rows"] if r["budget"] == "25%" and all(r[key] == row[key] for key in same))
        assert row["limit_moves_per_token"] < more["limit_moves_per_token"]


def test_a_bench_on_a_cpu(tmp_path, capsys):
    report = bench(small(tmp_path, "bench.systems=[transformers, sida, on-demand]"))
    check(report, {"transformers", "sida"})
    assert "on-demand is left out: it needs a GPU" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["rows"] == report["rows"]
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.count("| sida (recent) | 25% |") == 4
    assert not list((tmp_path / "arenas").iterdir())


def test_a_bench_with_a_gpus_code(tmp_path, monkeypatch):
    """All but the capture, the kernels and CUDA's own functions."""
    pytest.importorskip("triton")
    from pipeline.gpu import replays
    from tests.pipeline.host_gpu import HostGraphs, host_gpu

    monkeypatch.setattr(HostGraphs, "refused", None)
    monkeypatch.setattr(replays, "ASKED_ABOVE", 0)
    monkeypatch.setattr(decoding, "check_decoding", lambda config, device: list(config.bench.systems))
    with host_gpu():
        report = bench(small(tmp_path, "bench.systems=[resident, sida, on-demand]"))
    check(report, {"resident", "sida", "on-demand"})
    for row in report["rows"]:
        if row["system"] == "resident":
            assert row["hit_rate"] == 1.0
        elif row["system"] == "on-demand":
            assert row["copied_bytes"]["demand"] > 0
        else:
            assert row["graphs"]["pieces"] > 0
            assert row["copied_bytes"]["prefetch"] > 0, "the next layer's experts come before their router has spoken"
            assert row["hit_rate"] > 0.5


def test_resident_counts_when_every_expert_has_come(tmp_path, monkeypatch):
    """To give a GPU tens of gigabytes takes longer than to write the text that warms it up."""
    written = []

    class Filling(Executor):
        def execute(self, *args, **kwargs):
            result = super().execute(*args, **kwargs)
            written.append(len(written))
            return replace(result, stats=replace(result.stats, misses=[len(written) <= 3, 0, 0], prefetch_bytes=len(written) <= 5))

    resident = replace(DECODING["resident"], make=lambda s: Ours(replace(s, budget="100%"), "lookahead", executor=Filling))
    monkeypatch.setitem(DECODING, "resident", resident)
    report = bench(small(tmp_path, "bench.systems=[resident]", "bench.batch_sizes=[1]", "bench.prompts=[5]"))
    assert [row["hit_rate"] for row in report["rows"]] == [1.0]
    assert len(written) == 5 + 1 + 1  # until nothing was missing and nothing came, and the text that counts


def test_texts_are_consecutive_and_their_targets_follow():
    texts = cut(np.arange(1000), size=2, prompt=5, follow=7, batches=2, source="x")
    assert len(texts.batches) == 3
    assert [len(batch.targets[0]) for batch in texts.batches] == [5, 7, 7]
    rows = [
        np.concatenate([ids, after]) for b in texts.batches[1:] for ids, after in zip(b.tokens.streams[0], b.targets, strict=True)
    ]
    assert np.array_equal(np.concatenate(rows), np.arange(24, 72))
    assert texts.steps == 12


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="give more data, or lower"):
        bench(small(tmp_path, "bench.prompts=[400]", "data.limit=5"))


def test_a_system_of_another_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no 'paper' for task generate; known: transformers, resident, sida"):
        bench(small(tmp_path, "bench.systems=[paper]"))


def test_what_a_budget_cannot_avoid_is_known_for_a_case_done_by_hand():
    """Two layers of four experts, two slots. A warm-up fills them with expert 0 of each; the next prompt asks for both again, and
    its steps for one new expert each, then for the old ones."""
    layout = layout_of([4, 4])
    warm = [[[0], [0]], [[0], [0]]]
    text = [[[0], [0]], [[1], [1]], [[0], [0]]]
    need = needed(layout, 2, [warm, text])
    assert need.prompt == 0
    assert need.fewest == 2, "kept, the new ones read in place"
    assert need.steps >= need.fewest
