"""What tests share: small real models made on the spot, and directories of their own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.data import Batch
from pipeline.tasks.registry import Task

torch.set_num_threads(1)  # the models are tiny: more threads on busy cores wait for each other

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIRST = ("tests/pipeline/test_exactness.py", "tests/store", "tests/predictor", "tests/pipeline/test_")
"""Where time is short."""

RAY_S = 12
"""Seconds. Where importing what an actor imports takes longer, Ray does not start in the 30 s that it gives itself, with what the
tests of a second core do beside it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="leave out tests that have not begun by then (seconds as of `date +%%s`), and say "
                     "so; of those that start Ray, all where this machine is too slow for it")  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that start Ray first: they take minutes each, and at the end one core would wait for the other.

    Where time is short they come last, since a machine that is slow is slowest at these, and what all else stands on comes first.
    """

    def turn(item: pytest.Item) -> tuple[bool, int]:
        is_slow = item.get_closest_marker("slow") is not None
        if config.getoption("--until") is None:
            return not is_slow, 0
        return is_slow, next((i for i, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST))

    items.sort(key=turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until is None:
        return
    if time.time() > until:
        pytest.skip("no time left (--until)")
    if item.get_closest_marker("slow") and (seconds := _seconds_to_import()) > RAY_S:
        pytest.skip(f"too slow a machine to start Ray on: {seconds:.0f} s to import torch and transformers")


@functools.cache
def _seconds_to_import() -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
    return time.monotonic() - start


ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "assets" / "switch-mini-64"
VOCABULARY = 12288
"""Of TOKENIZER: a model that reads with it has as many embeddings, or it is refused."""
SENTENCES = (
    "a quiet film that earns its tears",
    "the plot is a mess",
    "never dull, often funny, and in the end surprisingly moving",
    "too long",
    "it has charm to spare and a cast that knows what to do with it",
    "I wanted my money back after ten minutes of this",
    "good",
)


def switch_config(**changes):
    """A Switch Transformer of a few hundred KiB: 2 MoE layers in the encoder, 1 in the decoder, 8 experts each."""
    from transformers import SwitchTransformersConfig

    settings = {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4,
        "num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
        "num_experts": 8, "expert_capacity": 64, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    return SwitchTransformersConfig(**settings | changes)


def save_switch(directory: Path, seed: int = 0, head: bool = False, max_shard_size: str = "5GB", **changes):
    """Writes a random Switch checkpoint with a tokenizer, as published ones are; returns the model, whole, float32, eval.

    Routing of a random model spreads over the experts because embeddings and routers are wide (N(0, 1)).
    """
    from transformers import SwitchTransformersForConditionalGeneration

    from pipeline.tasks.classifier import SwitchTransformersForSequenceClassification

    torch.manual_seed(seed)
    cls = SwitchTransformersForSequenceClassification if head else SwitchTransformersForConditionalGeneration
    model = cls(switch_config(**changes)).eval()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory)
    return model


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Stand-ins that a test makes are kept where no other run of the tests, and no user, looks."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def switch(tmp_path: Path) -> Callable:
    """Makes a checkpoint in a new directory: switch(**changes) -> (directory, whole model)."""
    made = 0

    def make(**changes):
        nonlocal made
        made += 1
        directory = tmp_path / f"switch-{made}"
        return directory, save_switch(directory, **changes)

    return make


@pytest.fixture
def arena_dir(tmp_path: Path) -> Path:
    """A store.directory that no other test sees."""
    directory = tmp_path / "arenas"
    directory.mkdir()
    return directory


def write_tsv(path: Path, sentences=SENTENCES, labels=(0, 1)) -> Path:
    """sentence, label; labels taken in turn."""
    lines = ["sentence\tlabel", *(f"{s}\t{labels[i % len(labels)]}" for i, s in enumerate(sentences))]
    path.write_text("\n".join(lines) + "\n")
    return path


def config_data(model: Path, rows: Path, arenas: Path, output: Path, **changes) -> dict:
    """The plain data of a config for a small run; `changes` are top-level keys."""
    return {
        "task": "classify",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(rows), "text": "sentence", "label": "label"} | changes.pop("data", {}),
        "labels": {"0": "negative", "1": "positive"},
        "batch": {"size": 2, "order": "input"},
        "predictor": {"kind": "random", "top_k": 2},
        "store": {"budget": "40%", "policy": "lru", "directory": str(arenas)},
        "output_dir": str(output),
    } | changes


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(task: Task, model: PreTrainedModel, batch: Batch) -> list[dict]:
    """A task's results from a plain transformers model, padded to the longest row."""
    with torch.inference_mode():
        inputs = task.inputs(batch, lambda longest: longest)
        outputs = task.forward(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
        return task.results(batch, outputs.cpu())
