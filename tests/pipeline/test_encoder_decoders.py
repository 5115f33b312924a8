"""The families with routers and modules of their own, Switch Transformers and NLLB-MoE: logits and written tokens at 30 %."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from pipeline.data import Batch
from pipeline.inputs import encoder_decoder_logits, padded_inputs
from pipeline.tasks.sampling import Sampling
from predictor.tokens import TokenBatch
from tests.conftest import save_switch
from tests.pipeline.test_families import NEW_TOKENS, Served, Written
from tests.pipeline.tiny_families import roughen


class Logits:
    """The logits of all real decoder tokens (pipeline.tasks.registry.Task)."""

    forwards = 1

    def inputs(self, batch, padded):
        return padded_inputs(batch, 1, padded)

    def forward(self, model, inputs, hear=None):
        return encoder_decoder_logits(model, inputs)[inputs["decoder_attention_mask"].bool()]

    def results(self, batch, outputs):
        return [{"logits": outputs}]


def save_nllb(directory, **changes):
    settings = {
        "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_experts": 8, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**settings | changes)).eval()
    roughen(model)
    model.save_pretrained(directory)


def as_routed(self, hidden_states, router_mask, router_probs):
    """What the experts' forward is meant to compute: every expert that the router gives a token, by its weight."""
    output = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens = router_probs[:, expert].nonzero()[:, 0]
        if len(tokens):
            result = self[f"expert_{expert}"](hidden_states[tokens]) * router_probs[tokens, expert, None]
            output[tokens] += result * (1 - self.moe_token_dropout)
    return output


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    made = []
    for i, lengths in enumerate(((9, 5, 3), (7, 11, 2))):
        encoder = tuple(rng.integers(3, 100, n) for n in lengths)
        made.append(Batch(i, np.arange(3), TokenBatch((encoder, tuple(rng.integers(3, 100, 4) for _ in lengths)))))
    return made


@pytest.fixture(params=["switch", "nllb", "nllb with capacity"])
def model(request, tmp_path, monkeypatch):
    if request.param == "switch":
        whole = save_switch(tmp_path / "model", expert_capacity=3, pad_token_id=1, eos_token_id=2, vocab_size=128)
        return tmp_path / "model", whole
    monkeypatch.setattr(NllbMoeExperts, "forward", as_routed)
    fraction = 0.2 if "capacity" in request.param else 1.0
    save_nllb(tmp_path / "model", moe_eval_capacity_token_fraction=fraction)
    return tmp_path / "model", NllbMoeForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()


def test_answers_as_the_whole_model(tmp_path, model):
    directory, whole = model
    served = Served(directory, tmp_path)
    with served.store():
        hits = 0
        for batch, result in zip(batches(), served.run(Logits(), batches()), strict=True):
            with torch.inference_mode():
                theirs = Logits().forward(whole, Logits().inputs(batch, lambda longest: longest))
            ours = result.results[0]["logits"]
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
            hits += sum(result.stats.hits)
        assert hits > 0


def test_writes_what_the_whole_model_writes(tmp_path, model):
    directory, whole = model
    served = Served(directory, tmp_path)
    start = whole.config.decoder_start_token_id
    task = Written(Sampling(max_new_tokens=NEW_TOKENS), 1, (2,), start, None, None, tmp_path, 0)
    prompts = [Batch(b.index, b.rows, TokenBatch((b.tokens.streams[0], (np.array([start]),) * 3))) for b in batches()]
    with served.store():
        for batch, result in zip(prompts, served.run(task, prompts), strict=True):
            ids, mask = batch.pad(0, 1)
            with torch.inference_mode():
                out = whole.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, 1:].tolist()
            assert [row["token_ids"] for row in result.results] == [row[: row.index(2) + 1] if 2 in row else row for row in out]


def test_transformers_own_nllb_uses_two_experts_only(tmp_path):
    """Why `as_routed` stands in for it here. Fails when transformers is mended: then compare with that."""
    save_nllb(tmp_path / "model")
    whole = NllbMoeForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    used = set()
    for name, module in whole.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda m, i, o, name=name: used.add(name.rpartition(".")[2]))
    with torch.inference_mode():
        Logits().forward(whole, Logits().inputs(batches()[0], lambda longest: longest))
    assert used == {"expert_0", "expert_1"}
