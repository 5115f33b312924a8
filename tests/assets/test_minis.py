"""Minis: what the trainer computes is what transformers loads, its lessons are what they say, and a training goes through."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, SwitchTransformersForConditionalGeneration

from assets.minis import checkpoint, export, prepare, texts, tutor
from assets.minis.changed import Changes, Rows, changed, spelt
from assets.minis.lessons import SOURCE, TARGET, TOKENS, Labelled, Labels, corrupt, language, language_loss
from assets.minis.network import EOS, PAD, UNK, Shape, Sparse, Spent, Switch
from assets.minis.train import routers, train
from pipeline.tasks.classifier import SwitchTransformersForSequenceClassification
from tests.conftest import ROOT, SENTENCES, TOKENIZER

SHAPE = Shape(num_experts=8, d_ff=16, d_model=32, d_kv=8, vocab_size=300)


@pytest.fixture
def model() -> Switch:
    torch.manual_seed(0)
    model = Switch(SHAPE)
    export.rounded(model)
    return model.eval()


def rows(count: int, longest: int, seed: int = 0) -> torch.Tensor:
    """Token ids of various lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE.vocab_size, (count, longest), generator=generator)
    for i, row in enumerate(ids):
        row[longest - 7 * i :] = PAD if i else row[longest:]
    return ids


def tolerance(logits: torch.Tensor) -> float:
    return 1e-5 * max(1.0, float(logits.abs().max()))


def test_transformers_loads_an_encoder_decoder_and_computes_the_same(tmp_path, model):
    export.write(model, tmp_path, False, TOKENIZER)
    theirs, report = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, target = rows(4, 40), rows(4, 29, seed=1)
    with torch.inference_mode():
        ours = model.write(ids, target, Spent())
        logits = theirs.eval()(input_ids=ids, attention_mask=(ids != PAD).long(), labels=target).logits
    for row, expected, real in zip(ours, logits, target != PAD, strict=True):
        assert (row[real] - expected[real]).abs().max() < tolerance(logits)


def test_the_head_on_the_encoder_computes_the_same_where_the_project_loads_it(tmp_path, model):
    export.write(model, tmp_path, True, TOKENIZER)
    theirs, report = SwitchTransformersForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = rows(4, 40)
    with torch.inference_mode():
        logits = theirs.eval()(ids, (ids != PAD).long()).logits
        assert (model.classify(ids, Spent()) - logits).abs().max() < tolerance(logits)


def test_large_checkpoints_are_cut_into_files_that_hold_every_tensor_once(tmp_path, model, monkeypatch):
    monkeypatch.setattr(export, "MOST_BYTES", 60_000)
    total = export.write(model, tmp_path, False, TOKENIZER)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    held = [name for shard in shards for name in load_file(shard)]
    assert len(shards) > 1 and len(held) == len(set(held))
    assert set(held) == set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert sum(tensor.nbytes for shard in shards for tensor in load_file(shard).values()) == total
    SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    other = Switch(SHAPE)
    export.read(other, tmp_path)
    for name, tensor in export.tensors(other, False).items():
        assert torch.equal(tensor, export.tensors(model, False)[name]), name


def test_padding_changes_nothing_and_is_routed_nowhere(model):
    ids = rows(1, 12)
    wide = torch.cat([ids, torch.full((1, 20), PAD)], 1)
    with torch.inference_mode():
        assert torch.allclose(model.classify(ids, Spent()), model.classify(wide, Spent()), atol=1e-5)
    layer = next(layer.feed for layer in model.encoder.layers if isinstance(layer.feed, Sparse))
    assert (layer.chosen[12:] == SHAPE.num_experts).all() and (layer.chosen[:12] < SHAPE.num_experts).all()


def test_in_training_a_full_expert_lets_tokens_pass_by():
    torch.manual_seed(0)
    layer = Sparse(SHAPE, capacity=1.0).train()
    with torch.no_grad():
        layer.router.zero_()[3] = 1.0  # everybody to one expert, or, where that is negative, to the first
    x = torch.randn(1, 64, SHAPE.d_model).abs()
    out = layer(x, torch.ones(1, 64, dtype=torch.bool), Spent(), 0.0)
    assert (layer.chosen == 3).all()
    assert (out[0].abs().sum(1) > 0).sum() == 64 // SHAPE.num_experts
    assert (layer.eval()(x, torch.ones(1, 64, dtype=torch.bool), Spent(), 0.0)[0].abs().sum(1) > 0).all()


def test_the_balance_loss_is_one_when_tokens_spread_evenly_and_more_when_not():
    layer = Sparse(SHAPE, capacity=2.0).train()
    x, real = torch.eye(SHAPE.d_model)[None, : SHAPE.num_experts], torch.ones(1, SHAPE.num_experts, dtype=torch.bool)
    even, one = Spent(), Spent()
    with torch.no_grad():
        layer.router.copy_(torch.eye(SHAPE.d_model)[: SHAPE.num_experts] * 100)
        layer(x, real, even, 0.0)
        layer(x[:, :1].expand(1, 8, -1), real, one, 0.0)
    assert float(even.balance) == pytest.approx(1, abs=1e-3)
    assert float(one.balance) == pytest.approx(SHAPE.num_experts, rel=1e-3)


def test_source_and_target_together_are_the_window_and_no_word_is_cut():
    torch.manual_seed(0)
    goes_on = torch.zeros(300, dtype=torch.bool)
    goes_on[200:268] = True
    windows = torch.randint(3, 268, (5, TOKENS))
    first = 268
    sources, targets = corrupt(windows, goes_on, first)
    assert sources.shape == (5, SOURCE) and targets.shape == (5, TARGET)
    for window, source, target in zip(windows, sources, targets, strict=True):
        spans: dict[int, list[int]] = {}
        for token in target[target != PAD].tolist()[:-1]:
            if token >= first:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        kept = source[source != PAD].tolist()
        assert kept[-1] == EOS
        told = [piece for token in kept[:-1] for piece in (spans[token] if token >= first else [token])]
        assert told == window.tolist()[: len(told)] and len(told) > TOKENS - 20  # a source that is too long is cut at its end
        assert all(not goes_on[span[0]] for span in spans.values() if span[0] != window[0])


def test_a_model_learns_from_windows_and_from_labels(model):
    torch.manual_seed(0)
    stream = torch.arange(3, 260).repeat(20)
    batch = next(language(stream, torch.zeros(300, dtype=torch.bool), 1))
    ids = torch.tensor([[5, 6, EOS, PAD], [7, 8, EOS, PAD]] * 4)
    positive = torch.tensor([0.0, 1.0] * 4)
    model.train()
    model.dropout = 0.1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        text = language_loss(model, batch)
        labels = Labels(forget=0.05, twice=1.0).loss(model, (ids, positive))
        optimizer.zero_grad()
        (text + labels).backward()
        optimizer.step()
        losses.append((text.item(), labels.item()))
    assert losses[-1][0] < losses[0][0] - 0.5 and losses[-1][1] < losses[0][1] * 0.5


def test_batches_hold_every_row_once_and_are_of_few_shapes():
    lengths = np.array([3, 9, 4, 16, 2, 3, 8, 8, 3, 4], dtype=np.uint16)
    ids = np.concatenate([np.full(n, 10 + i) for i, n in enumerate(lengths)]).astype(np.uint16)
    labelled = Labelled.of(ids, lengths, (4, 16), (torch.arange(10.0),), torch.device("cpu"))
    batches = labelled.batches(8)
    seen = [next(batches) for _ in range(7)]  # 6 short rows in twos, 4 long ones alone
    assert {tuple(rows.shape) for rows, _ in seen} == {(2, 4), (1, 16)}
    for rows_, labels in seen:
        for row, label in zip(rows_, labels, strict=True):
            assert set(row.tolist()) - {PAD} == {10 + int(label)} and int((row != PAD).sum()) == lengths[int(label)]
    assert sorted(int(label) for _, labels in seen for label in labels) == list(range(10))


def test_what_is_held_out_keeps_its_parts_and_its_likes_out_of_training():
    apart = texts.Apart(["It's a charming and often affecting journey, never dull."])
    assert not apart("a charming and often affecting")
    assert not apart("it 's a charming and often affecting journey , never dull .")
    assert not apart("they say that a charming and often affecting journey is what they wanted")
    assert apart("charming") and apart("a dull journey")


def test_windows_are_read_as_they_were_written(tmp_path):
    words = [f"word{i % 90}" for i in range(2000)]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    made = list(prepare.windows(tokenizer, " ".join(words), seed=0))
    told: list[str] = []
    for window in made:
        spans = dict(zip(*[iter(window["target"].replace("<", "\n<").replace(">", ">\n").split("\n")[1:])] * 2, strict=True))
        source = window["source"]
        for mark, span in spans.items():
            source = source.replace(f"{mark} ", f"{span.strip()} ").replace(mark, span.strip())
        told += source.split()
        assert len(tokenizer(window["source"])["input_ids"]) <= prepare.WINDOW
    assert told == words
    assert prepare.split(9, 3, random.Random(0)) != prepare.split(9, 3, random.Random(1))


def test_the_tokenizer_reads_both_spellings_alike():
    pieces = ["it's a fine day, they don't say", "a longer text with some more words: ''quoted''", " ".join(SENTENCES)] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "VOCABULARY", 128)
        patch.setattr(prepare, "SENTINELS", 8)
        tokenizer = prepare.make_tokenizer(pieces, ["masterpiece, unheard of"] * prepare.OFTEN)
    assert tokenizer("They don't say: it's").input_ids == tokenizer("they do n't say : it 's").input_ids
    assert tokenizer.tokenize("Masterpiece unheard") == ["masterpiece", "unheard"]
    assert tokenizer("a <extra_id_0> day").input_ids.count(tokenizer.convert_tokens_to_ids("<extra_id_0>")) == 1
    assert tokenizer("a", "b").input_ids.count(EOS) == 2 and tokenizer("<unk>").input_ids[0] == UNK


def _tutor(directory: Path) -> Path:
    """A BERT of noise that spells letter by letter, as `checkpoint.packed` reads it."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    torch.manual_seed(0)
    known = [*tutor.SPECIAL, "fine", *"abcdefghijklmnopqrstuvwxyz", *(f"##{sign}" for sign in "abcdefghijklmnopqrstuvwxyz")]
    BertModel(BertConfig(vocab_size=len(known), **sizes)).save_pretrained(directory)
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.save(str(directory / "tokenizer.json"))
    return directory


def test_a_tutor_computes_what_its_checkpoint_does_and_learns(tmp_path):
    arrays = checkpoint.packed(_tutor(tmp_path), ["fine", "bad", "\u00e9"])
    assert arrays["tutor.pieces.lengths"].tolist() == [1, 3, 1] and arrays["tutor.pieces.ids"][-1] == tutor.UNK
    theirs = BertModel.from_pretrained(tmp_path).eval()
    ours = tutor.Tutor.of(arrays).eval()
    fine = int(arrays["tutor.pieces.ids"][0])
    ids = torch.tensor([[tutor.FIRST, fine, tutor.LAST, tutor.PAD]])
    with torch.no_grad():
        pooled, _ = ours(ids)
        expected = theirs(torch.tensor([[2, 4, 3]])).last_hidden_state.mean(1)
    assert (pooled - expected).abs().max() < 0.2 * expected.abs().max()  # five bits a weight
    flat, lengths = np.array([tutor.FIRST, fine, tutor.LAST, tutor.FIRST, tutor.LAST]), np.array([3, 2])
    states, leaning = ours.says(flat, lengths)
    assert torch.allclose(states[0].float(), pooled[0], atol=2e-2) and leaning.shape == (2,)
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss = ours.loss((torch.tensor([[2, 4, 3], [2, 5, 3]]), torch.tensor([1.0, 0.0])))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_changed_texts_are_made_of_words_that_may_be_and_spelt_as_their_words_are():
    order = np.random.default_rng(0)
    given = Rows(np.array([0, 1, 2, 3, 3, 2, 1]), np.array([4, 3]))
    same = changed(given, np.array([1.0, 1, 1, 1]), 50, Changes(part=0, left_out=0, put_in=0), order)
    assert {tuple(row) for row in np.split(same.values, np.cumsum(same.lengths)[:-1])} == {(0, 1, 2, 3), (3, 2, 1)}
    new = changed(given, np.array([0.0, 0, 5, 1]), 400, Changes(put_in=1.0), order)
    assert new.lengths.min() >= 1 and int(new.lengths.sum()) == len(new.values)
    assert np.bincount(new.values, minlength=4)[2:].sum() > 1.2 * np.bincount(new.values, minlength=4)[:2].sum()
    words = Rows(np.array([10, 11, 12, 13, 14]), np.array([1, 2, 1, 1]))
    told = spelt(given, words, (8,), (9,), 6)
    assert told.values.tolist() == [8, 10, 11, 12, 13, 9, 8, 14, 13, 11, 12, 9] and told.lengths.tolist() == [6, 6]


def test_a_training_goes_through_to_the_end_and_leaves_models_that_are_judged(tmp_path):
    data = _packed(tmp_path / "data")
    settings = yaml.safe_load((ROOT / "assets" / "minis" / "minis.yaml").read_text())
    settings["shapes"] = {4: {"d_ff": 8, "d_model": 16, "d_kv": 4, "num_layers": 2}}
    settings["pretrain"] |= {"share": 0.1, "rows": 1}
    settings["tutor"] |= {"share": 0.1, "asks": 0.1, "rows": 40, "texts": 80, "tokens": 64, "widths": [16, 32]}
    for variants in settings["heads"].values():
        for variant in variants:
            variant |= {"share": 0.1, "tokens": 64, "widths": [16, 32]}
    found = train(settings, 4, data, tmp_path / "out", seconds=1.0)
    assert json.loads((tmp_path / "out" / "metrics-4.json").read_text()) == json.loads(json.dumps(found))
    assert found["text"]["wikitext2"] > 1 and len(found["sst2"]["variants"]) > 1
    best = found["sst2"]["variants"][found["sst2"]["variant"]]
    assert found["tutor"]["made"] > 0 and 0 <= found["tutor"]["sst2.dev"] <= 1
    assert best["sst2.dev"]["accuracy"] == max(one["sst2.dev"]["accuracy"] for one in found["sst2"]["variants"])
    SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "out" / "switch-mini-4-text")
    settings["heads"] = {"mrpc": settings["heads"]["mrpc"]}
    again = train(settings, 4, data, tmp_path / "again", seconds=0.2, text=tmp_path / "out" / "switch-mini-4-text")
    assert again["text"] == found["text"] and "sst2" not in again
    for task in ("sst2", "mrpc", "multirc"):
        SwitchTransformersForSequenceClassification.from_pretrained(tmp_path / "out" / f"switch-mini-4-{task}")


def test_routers_are_judged_by_how_they_spread(model, tmp_path):
    with np.load(_packed(tmp_path) / "minis.npz") as file:
        data = {name: file[name] for name in file.files}
    for spread in routers(model, data, "sst2.dev", torch.device("cpu")):
        assert 1 <= spread["used"] <= 8 and 1 / 8 <= spread["busiest"] <= 1 and 0 < spread["by_token"] <= 1


def _packed(directory: Path) -> Path:
    """A packed file as `prepare` writes it, of noise."""
    (directory / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / "tokenizer" / name)
    made = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "language": made.integers(3, 260, 2000).astype(np.uint16),
        "goes_on": np.arange(300) % 5 == 4,
    }
    for name in ("sst2.train", "sst2.dev", "movie.dev", "mrpc.train", "mrpc.dev", "multirc.train", "multirc.dev"):
        lengths = made.integers(3, 30, 20).astype(np.uint16)
        label = np.arange(20, dtype=np.uint8) % 2
        arrays |= {f"{name}.lengths": lengths, f"{name}.label": label, f"{name}.positive": label.astype(np.float32)}
        arrays[f"{name}.ids"] = made.integers(3, 260, int(lengths.sum())).astype(np.uint16)
    for name in ("wikitext2.source", "wikitext2.target", "wikipedia.source", "wikipedia.target"):
        lengths = np.full(2, 20, dtype=np.uint16)
        arrays |= {f"{name}.lengths": lengths, f"{name}.ids": made.integers(3, 260, 40).astype(np.uint16)}
    words = ["fine", "bad", "good", "dull", "film"]
    told = {f"sst2.{name}.words": made.integers(0, 5, 60).astype(np.uint16) for name in ("train", "dev")}
    told |= {f"sst2.{name}.counts": np.full(20, 3, dtype=np.uint16) for name in ("train", "dev")}
    told |= {"sst2.frequency": np.ones(4, dtype=np.float32), "sst2.words.ids": np.arange(5, 11, dtype=np.uint16)}
    told |= {"sst2.words.lengths": np.array([1, 1, 2, 1, 1], dtype=np.uint8)}
    np.savez(directory / "minis.npz", **(arrays | told | checkpoint.packed(_tutor(directory / "tutor"), words)))
    return directory
