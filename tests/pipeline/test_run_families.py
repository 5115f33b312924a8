"""Four families through the three Ray actors: `run` from a checkpoint to predictions.jsonl, as transformers scores and writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.cluster import cluster
from pipeline.config import parse
from pipeline.run import run
from tests.conftest import SENTENCES, TOKENIZER, VOCABULARY, read_jsonl
from tests.pipeline.tiny_families import save_tiny

pytestmark = pytest.mark.slow
CONTEXT = 64
STOP = 1


@pytest.fixture(scope="module")
def own_ray():
    """One Ray for the module; run() uses the connection that there is."""
    with cluster(None):
        yield


def answered(tmp_path: Path, directory: Path, task: str) -> tuple[list[dict], dict]:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    (tmp_path / "rows.txt").write_text("\n".join(SENTENCES) + "\n")
    settings = {
        "task": task,
        "model": {"path": str(directory), "dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.txt")},
        "generate": {"max_new_tokens": 5},
        "batch": {"size": 3},
        "predictor": {"kind": "random", "top_k": 2},
        "store": {"budget": "30%", "directory": str(tmp_path / "arenas")},
        "output_dir": str(tmp_path / task),
    }
    metrics = run(parse(settings, "test"))
    assert list((tmp_path / "arenas").iterdir()) == []
    return read_jsonl(tmp_path / task / "predictions.jsonl"), metrics


@pytest.fixture
def model(request, tmp_path):
    """A family's directory and its whole model."""
    cls = save_tiny(request.param, tmp_path / "model", vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "model")
    return tmp_path / "model", cls.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v2"], indirect=True)
def test_a_family_scores_through_ray(tmp_path, own_ray, model):
    directory, whole = model
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows, metrics = answered(tmp_path, directory, "score")
    assert 0 < metrics["expert_bytes"]["resident_peak"] <= 0.3 * metrics["expert_bytes"]["total"]
    for row, text in zip(rows, SENTENCES, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            scores = whole(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert row["logprob"] == pytest.approx(scores.double().sum().item(), rel=1e-5)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"], indirect=True)
def test_a_family_writes_through_ray(tmp_path, own_ray, model, capsys):
    directory, whole = model
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows, metrics = answered(tmp_path, directory, "generate")
    assert metrics["new_tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert metrics["ms_to_first_token"]["p50"] > 0
    said = capsys.readouterr().out
    for number, (row, text) in enumerate(zip(rows, SENTENCES, strict=True), start=1):
        ids = torch.tensor([tokenizer(text).input_ids[:-1]])
        with torch.inference_mode():
            out = whole.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=STOP)[0, ids.shape[1] :].tolist()
        assert row["token_ids"] == out
        assert f"row {number}: {row['text']}\n" in said
