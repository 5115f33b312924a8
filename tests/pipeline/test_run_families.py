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
from tests.conftest import SENTENCES, TOKENIZER, read_jsonl
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


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"])
def test_a_family_is_served_through_ray(tmp_path, own_ray, capsys, family):
    cls = save_tiny(family, tmp_path / "model", vocab_size=8192, max_position_embeddings=CONTEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "model")
    whole = cls.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    scored, metrics = answered(tmp_path, tmp_path / "model", "score")
    assert 0 < metrics["expert_bytes"]["resident_peak"] <= 0.3 * metrics["expert_bytes"]["total"]
    written, metrics = answered(tmp_path, tmp_path / "model", "generate")
    assert metrics["new_tokens"] == sum(len(row["token_ids"]) for row in written)
    assert metrics["ms_to_first_token"]["p50"] > 0
    said = capsys.readouterr().out
    for number, text in enumerate(SENTENCES):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            scores = whole(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            out = whole.generate(ids[:, :-1], max_new_tokens=5, do_sample=False, eos_token_id=STOP)[0, ids.shape[1] - 1 :].tolist()
        assert scored[number]["logprob"] == pytest.approx(scores.double().sum().item(), rel=1e-5)
        assert written[number]["token_ids"] == out
        assert f"row {number + 1}: {written[number]['text']}\n" in said
