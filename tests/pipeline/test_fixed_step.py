"""A step whose tensors stay where they are writes the tokens that transformers' own does, for rows of unequal lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.inputs import padded_inputs
from pipeline.tasks.fixed_step import FixedStep, why_not_fixed
from pipeline.tasks.generate import Generate
from pipeline.tasks.sampling import Sampling
from pipeline.tasks.writing import DONE, OwnSteps
from predictor.tokens import TokenBatch
from tests.pipeline.tiny_families import save_tiny

NEW = 9
FIXED = (
    "afmoe", "axk1", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe",
    "hy_v3", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl",
    "mistral4", "mixtral", "muse_spark", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_omni_moe", "qwen3_vl_moe", "solar_open",
)  # fmt: skip
"""All that docs/models.md counts."""
OTHERS = {"jamba": "layers of kind|no single graph", "minimax": "no single graph", "qwen3_next": "layers of kind|no single graph"}


class FixedSteps(OwnSteps):
    """Runs every step in place, without a recording. Two batches in a row, as a cache that is used again sees them."""

    def __init__(self) -> None:
        self.kept: FixedStep | None = None
        self.steps = 0

    def fixed(self, model, rows, most):
        assert why_not_fixed(model) is None
        if self.kept is None:
            self.kept = FixedStep(model, rows, most)
        self.kept.reset()
        self.where = [tensor.data_ptr() for tensor in self.kept.inputs.values()]
        return self.kept

    def next(self, tokens, awake, forward):
        self.steps += 1
        self.kept.advance(tokens, awake)
        before = [tensor.data_ptr() for tensor in self.kept.inputs.values()]
        logits = self.kept.forward(self.kept.inputs)
        assert before == [tensor.data_ptr() for tensor in self.kept.inputs.values()]
        return logits


def make(family: str, directory: Path):
    torch.manual_seed(0)
    return save_tiny(family, directory).from_pretrained(directory, dtype=torch.float32).eval()


def task(**sampling) -> Generate:
    return Generate(Sampling(max_new_tokens=NEW, **sampling), 0, (1,), None, None, None, Path("unused"), 0)


def prompts(seed: int, lengths=(9, 5, 12)) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    batch = TokenBatch((tuple(rng.integers(3, 100, n) for n in lengths),))

    class Some:
        tokens = batch

        def pad(self, stream, value, padded, left):
            from pipeline.data import pad

            return pad(batch, stream, value, padded, left)

    return padded_inputs(Some(), 0, lambda longest: longest, left=True) | {"seed": torch.tensor(7)}


@pytest.mark.parametrize("family", FIXED)
def test_tokens_are_those_of_transformers(tmp_path, family):
    model = make(family, tmp_path / "model")
    steps = FixedSteps()
    for seed, lengths in ((0, (9, 5, 12)), (1, (12, 12, 12))):  # a mask of ones is left out by transformers
        inputs = prompts(seed, lengths)
        with torch.inference_mode():
            ours = task().forward(model, inputs, steps)
            own = task().forward(model, inputs)
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            theirs = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=1, pad_token_id=0)
        theirs = theirs[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(ours, own)
        for mine, right in zip(ours.tolist(), theirs.tolist(), strict=True):
            kept = [token for token in mine if token != DONE]
            assert kept == right[: len(kept)]
            assert len(kept) == NEW or kept[-1] == 1
    assert steps.steps > NEW


def test_samples_are_those_of_transformers(tmp_path):
    model = make("qwen3_moe", tmp_path / "model")
    inputs = prompts(3)
    with torch.inference_mode():
        ours, own = (task(sample=True, temperature=0.8, top_k=30).forward(model, inputs, s) for s in (FixedSteps(), None))
    assert torch.equal(ours, own)


@pytest.mark.parametrize("family", OTHERS)
def test_who_keeps_more_than_keys_and_values_is_not_fixed(tmp_path, family):
    import re

    assert re.search(OTHERS[family], why_not_fixed(make(family, tmp_path / "model")))
