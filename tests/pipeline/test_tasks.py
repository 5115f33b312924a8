"""Tasks: rows to token ids, and logits to results, against what transformers computes for each row by itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SwitchTransformersEncoderModel

from pipeline.config import Config, ModelConfig, parse
from pipeline.data import BatchConfig, Row, make_batches
from pipeline.errors import ConfigError
from pipeline.models import describe
from pipeline.tasks.registry import make_task
from predictor.tokens import DECODER, ENCODER
from tests.conftest import SENTENCES, TOKENIZER, answers, save_switch

WORDS = {"0": "negative", "1": "positive"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are tiny; two threads on busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


class Served:
    """A checkpoint, described, beside the whole model."""

    def __init__(self, directory, **changes):
        self.whole = save_switch(directory, **changes)
        self.spec, _ = describe(ModelConfig(str(directory)), torch.device("cpu"))


@pytest.fixture(scope="module")
def text_to_text(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("text-to-text"))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("head"), head=True, num_labels=3)


def config(**changes) -> Config:
    plain = {"model": {"path": "m"}, "data": {"path": "d.tsv"}, "labels": WORDS}
    return parse(plain | changes, "test")


def rows_of(sentences=SENTENCES, **fields) -> list[Row]:
    return [Row(text, **fields) for text in sentences]


def run(task, model, tokenizer, rows: list[Row], size: int = 3, max_tokens: int = 512) -> list[dict]:
    """All results by row, from batches of unequal rows."""
    encoded, _ = task.encode(tokenizer, rows, max_tokens)
    results = []
    with torch.inference_mode():
        for batch in make_batches(encoded, BatchConfig(size=size, order="input")):
            results += answers(task, model, batch)
    assert [result["index"] for result in results] == list(range(len(rows)))
    return results


# classify, text to text


def test_a_label_is_scored_by_its_words_first_token_at_the_first_decoder_step(text_to_text, tokenizer):
    task = make_task(config(), text_to_text.spec, tokenizer)
    results = run(task, text_to_text.whole, tokenizer, rows_of())
    firsts = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS.values()]
    for sentence, result in zip(SENTENCES, results, strict=True):
        inputs = tokenizer(sentence, return_tensors="pt")
        start = torch.tensor([[text_to_text.whole.config.decoder_start_token_id]])
        with torch.inference_mode():
            logits = text_to_text.whole(input_ids=inputs.input_ids, decoder_input_ids=start).logits[0, 0]
        assert result["scores"] == pytest.approx(logits[firsts].tolist(), abs=1e-4)
        assert result["label"] == int(np.argmax(result["scores"]))


def test_it_is_the_token_that_transformers_would_generate_if_it_had_only_the_labels(text_to_text, tokenizer):
    task = make_task(config(), text_to_text.spec, tokenizer)
    firsts = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS.values()]
    for result, sentence in zip(run(task, text_to_text.whole, tokenizer, rows_of()), SENTENCES, strict=True):
        generated = text_to_text.whole.generate(
            **tokenizer(sentence, return_tensors="pt"), max_new_tokens=1, prefix_allowed_tokens_fn=lambda batch, ids: firsts
        )
        assert generated[0, 1].item() == firsts[result["label"]]


def test_labels_come_back_in_the_configs_order_and_form(text_to_text, tokenizer):
    turned = config(labels={"good": "positive", "-1": "negative"})
    results = run(make_task(turned, text_to_text.spec, tokenizer), text_to_text.whole, tokenizer, rows_of())
    straight = run(make_task(config(), text_to_text.spec, tokenizer), text_to_text.whole, tokenizer, rows_of())
    assert {result["label"] for result in results} <= {"good", -1}
    for result, other in zip(results, straight, strict=True):
        assert result["scores"] == other["scores"][::-1]
        assert result["label"] == {0: -1, 1: "good"}[other["label"]]


@pytest.mark.parametrize("words", [("positive", "positive"), ("positive one", "positive two")])
def test_labels_whose_words_begin_with_the_same_token_are_refused(text_to_text, tokenizer, words):
    with pytest.raises(ConfigError, match="begin with the same token") as error:
        make_task(config(labels={"0": words[0], "1": words[1]}), text_to_text.spec, tokenizer)
    assert all(repr(word) in str(error.value) for word in words)


def test_a_word_without_a_token_is_refused(text_to_text, tokenizer):
    with pytest.raises(ConfigError, match="no token of ''"):
        make_task(config(labels={"0": "", "1": "good"}), text_to_text.spec, tokenizer)


# classify with a head


def test_a_head_reads_the_mean_of_the_encoders_outputs_over_real_tokens(head, tokenizer):
    labels = {"0": "a", "1": "b", "2": "c"}
    results = run(make_task(config(labels=labels), head.spec, tokenizer), head.whole, tokenizer, rows_of())
    encoder = SwitchTransformersEncoderModel(head.whole.config).eval()
    loaded = encoder.load_state_dict(head.whole.state_dict(), strict=False)
    assert set(loaded.unexpected_keys) == {"classifier.weight", "classifier.bias"}
    assert set(loaded.missing_keys) <= {"encoder.embed_tokens.weight"}  # tied to the shared one
    for sentence, result in zip(SENTENCES, results, strict=True):
        with torch.inference_mode():
            states = encoder(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]  # (tokens, d_model), no padding
        by_hand = head.whole.classifier.weight @ states.mean(dim=0) + head.whole.classifier.bias
        assert result["scores"] == pytest.approx(by_hand.tolist(), abs=1e-4)
        assert result["label"] == int(by_hand.argmax())


def test_a_number_of_labels_that_is_not_the_heads_is_refused_with_both_numbers(head, tokenizer):
    with pytest.raises(ConfigError, match=r"names 2 labels, the classification head of .* has 3"):
        make_task(config(), head.spec, tokenizer)


@pytest.mark.parametrize("architecture", ["SwitchTransformersModel", "SwitchTransformersEncoderModel"])
def test_a_model_that_has_neither_a_head_nor_a_language_to_answer_in_is_refused(text_to_text, tokenizer, architecture):
    bare = dataclasses.replace(text_to_text.spec, architecture=architecture)
    with pytest.raises(ConfigError, match=architecture):
        make_task(config(), bare, tokenizer)


# score


def scored(**changes) -> Config:
    return config(task="score", data={"path": "d.tsv", "target": "target"}, **changes)


def test_a_score_is_the_logarithm_of_the_targets_probability_as_transformers_own_loss_has_it(text_to_text, tokenizer):
    rows = [Row(text, target=target) for text, target in zip(SENTENCES, reversed(SENTENCES), strict=True)]
    task = make_task(scored(), text_to_text.spec, tokenizer)
    results = run(task, text_to_text.whole, tokenizer, rows)
    for row, result in zip(rows, results, strict=True):
        labels = tokenizer(row.target, return_tensors="pt").input_ids
        with torch.inference_mode():
            loss = text_to_text.whole(**tokenizer(row.text, return_tensors="pt"), labels=labels).loss
        assert result["tokens"] == labels.numel()
        assert result["logprob"] == pytest.approx(-loss.item() * labels.numel(), rel=1e-4)
    tokens = sum(result["tokens"] for result in results)
    total = sum(result["logprob"] for result in results)
    assert task.quality(rows, results) == {"perplexity": pytest.approx(math.exp(-total / tokens))}


def test_the_decoder_reads_the_start_and_then_the_target_without_its_last_token(text_to_text, tokenizer):
    task = make_task(scored(), text_to_text.spec, tokenizer)
    (encoded,), _ = task.encode(tokenizer, [Row("a film", target="too long")], 512)
    target = tokenizer("too long").input_ids
    assert encoded.streams[ENCODER].tolist() == tokenizer("a film").input_ids
    assert encoded.streams[DECODER].tolist() == [text_to_text.spec.config["decoder_start_token_id"], *target[:-1]]
    assert encoded.target.tolist() == target
    assert target[-1] == tokenizer.eos_token_id  # the end is scored too


def test_scoring_asks_for_a_target_and_a_model_that_can(text_to_text, head, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.target"):
        make_task(config(task="score"), text_to_text.spec, tokenizer)
    with pytest.raises(ConfigError, match="needs a model that writes text"):
        make_task(scored(), head.spec, tokenizer)


# token ids


def test_rows_that_are_too_long_are_cut_and_counted(text_to_text, tokenizer):
    task = make_task(config(), text_to_text.spec, tokenizer)
    lengths = [len(tokenizer(sentence).input_ids) for sentence in SENTENCES]
    longest = sorted(lengths)[3]
    encoded, truncated = task.encode(tokenizer, rows_of(), longest)
    assert truncated == sum(length > longest for length in lengths) == 3
    for sentence, row in zip(SENTENCES, encoded, strict=True):
        assert row.streams[ENCODER].tolist() == tokenizer(sentence, truncation=True, max_length=longest).input_ids
    assert task.encode(tokenizer, rows_of(), 512)[1] == 0


def test_cut_targets_are_counted_too(text_to_text, tokenizer):
    task = make_task(scored(), text_to_text.spec, tokenizer)
    encoded, truncated = task.encode(tokenizer, [Row("good", target=SENTENCES[4]), Row(SENTENCES[4], target="good")], 6)
    assert truncated == 2
    assert all(len(stream) <= 6 for row in encoded for stream in row.streams)


def test_pairs_are_joined_as_the_tokenizer_joins_them(text_to_text, head, tokenizer):
    rows = [Row(a, pair=b) for a, b in zip(SENTENCES, reversed(SENTENCES), strict=True)]
    for task in (
        make_task(config(), text_to_text.spec, tokenizer),
        make_task(config(labels={"0": "a", "1": "b", "2": "c"}), head.spec, tokenizer),
    ):
        encoded, _ = task.encode(tokenizer, rows, 512)
        for row, ids in zip(rows, encoded, strict=True):
            assert ids.streams[ENCODER].tolist() == tokenizer(row.text, row.pair).input_ids
        cut, truncated = task.encode(tokenizer, rows, 12)
        assert truncated > 0
        for row, ids in zip(rows, cut, strict=True):
            assert ids.streams[ENCODER].tolist() == tokenizer(row.text, row.pair, truncation=True, max_length=12).input_ids


# quality


def labelled(task, true: list[str], said: list) -> dict[str, float]:
    return task.quality([Row("x", label=label) for label in true], [{"label": label} for label in said])


def test_quality_is_accuracy_and_the_f1_of_the_second_of_two_labels(text_to_text, tokenizer):
    task = make_task(config(), text_to_text.spec, tokenizer)
    quality = labelled(task, ["1", "1", "1", "0", "0", "0"], [1, 1, 0, 1, 0, 0])
    precision, recall = 2 / 3, 2 / 3
    assert quality == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(2 * precision * recall / (precision + recall))}
    assert labelled(task, ["0", "0"], [0, 0]) == {"accuracy": 1, "f1": 0}
    assert labelled(task, ["1", "0", "0"], [1, 1, 1]) == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(0.5)}


def test_without_labels_in_the_data_there_is_no_quality_and_with_three_no_f1(text_to_text, head, tokenizer):
    task = make_task(config(), text_to_text.spec, tokenizer)
    assert task.quality([Row("x")], [{"label": 1}]) == {}
    three = make_task(config(labels={"0": "a", "1": "b", "2": "c"}), head.spec, tokenizer)
    assert labelled(three, ["0", "1", "2"], [0, 1, 1]) == {"accuracy": pytest.approx(2 / 3)}
