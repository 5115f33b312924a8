"""What the GPU is given: a tokenizer and one packed file of token ids. `python -m assets.minis.prepare DATA OUT`, minutes on a CPU.

DATA holds the folders that `texts.py` names. The tokenizer is a WordPiece of 8,192 pieces in lower case that splits a text as SST-2
is split ("do n't"), so that both spellings give the same pieces; it is made of the texts trained on. OUT also gets what the
tables of docs/paper.md are measured on: labelled rows as .tsv, and windows of held-out text as .jsonl, source and target.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from assets.minis import teacher, texts
from assets.minis.network import EOS
from assets.minis.texts import Example

VOCABULARY = 8192
SENTINELS = 32
SPECIAL = ["<pad>", "</s>", "<unk>"]
NOISE, SPAN = 0.15, 3
"""Of the words of a window, how many are left out, and in a row on average: T5's."""
WINDOW = 512
MOST_ROWS = 5000
REPLACED = {"-lrb-": "(", "-rrb-": ")", "``": '"', "''": '"', "’": "'", " @-@ ": "-", " @ - @ ": "-", " @,@ ": ",", " @.@ ": "."}


def make_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=40))
    plain = [normalizers.Replace(old, new) for old, new in REPLACED.items()]
    apart = normalizers.Replace(Regex(r"(?<=[a-z])n't\b"), " n't")
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=True), *plain, apart])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        pieces, trainers.WordPieceTrainer(vocab_size=VOCABULARY - SENTINELS, special_tokens=SPECIAL, show_progress=False)
    )
    assert tokenizer.get_vocab_size() == VOCABULARY - SENTINELS, "too little text for the vocabulary"
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in range(SENTINELS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def packed(tokenizer: PreTrainedTokenizerFast, name: str, examples: list[Example]) -> dict[str, np.ndarray]:
    """Token ids of all rows in a row, uint16; how long each is; its label and how sure it is."""
    pairs = None if examples[0].pair is None else [example.pair for example in examples]
    ids = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=WINDOW)["input_ids"]
    return {
        f"{name}.ids": np.concatenate(ids).astype(np.uint16),
        f"{name}.lengths": np.array([len(row) for row in ids], dtype=np.uint16),
        f"{name}.label": np.array([example.label for example in examples], dtype=np.uint8),
        f"{name}.positive": np.array([example.positive for example in examples], dtype=np.float32),
    }


def write_rows(path: Path, examples: list[Example]) -> None:
    """The first so many rows for tracing and judging: text, pair where there is one, label."""
    columns = ["text", "label"] if examples[0].pair is None else ["text", "pair", "label"]
    lines = ["\t".join(columns)]
    lines += ["\t".join(str(getattr(example, column)) for column in columns) for example in examples[:MOST_ROWS]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def windows(tokenizer: PreTrainedTokenizerFast, text: str, seed: int) -> Iterator[dict[str, str]]:
    """Windows of at most WINDOW tokens, spans of words left out of the source and asked for in the target, as T5 is judged."""
    order = random.Random(seed)
    words = text.split()
    sizes = [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]
    start = 0
    while start < len(words):
        end, tokens = start, 0
        while end < len(words) and tokens + sizes[end] <= WINDOW - 2 - SENTINELS:
            tokens, end = tokens + sizes[end], end + 1
        window = words[start:end]
        spans = min(round(len(window) * NOISE / SPAN), SENTINELS)
        if spans:
            yield corrupted(window, spans, order)
        start = max(end, start + 1)


def corrupted(words: list[str], spans: int, order: random.Random) -> dict[str, str]:
    """`spans` spans of SPAN words on average become sentinels."""
    left_out = split(spans * SPAN, spans, order)
    kept = split(len(words) - sum(left_out), spans, order)
    source, target, at = [], [], 0
    for i, (keep, drop) in enumerate(zip(kept, left_out, strict=True)):
        source += [*words[at : at + keep], f"<extra_id_{i}>"]
        target += [f"<extra_id_{i}>", *words[at + keep : at + keep + drop]]
        at += keep + drop
    return {"source": " ".join(source), "target": " ".join(target)}


def split(total: int, parts: int, order: random.Random) -> list[int]:
    """`parts` positive numbers that sum to `total`."""
    cuts = [0, *sorted(order.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in pairwise(cuts)]


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pieces, held_out = texts.documents(data)
    training, judged = texts.sentiment(data)
    tokenizer = make_tokenizer(pieces + [example.text for example in training])
    tokenizer.save_pretrained(out / "tokenizer")
    arrays = packed(tokenizer, "sst2.train", training)
    sentences = [example.text for example in texts.movie(data / "sst2_like_movie" / "all_scored.tsv")]
    arrays["sst2.train.teacher"] = teacher.judged(training, sentences).astype(np.float16)
    arrays |= packed(tokenizer, "movie.dev", judged["movie"])
    parts = {"sst2.dev": judged["sst2"]}
    parts |= {f"mrpc.{name}": texts.mrpc(data, part) for name, part in (("train", "train"), ("dev", "test"))}
    parts |= {f"multirc.{name}": texts.multirc(data, part) for name, part in (("train", "train"), ("dev", "val"))}
    for name, examples in parts.items():
        arrays |= packed(tokenizer, name, examples)
    for name, examples in (parts | {"sst2.train": texts.sst2(data, "train")}).items():
        write_rows(out / f"{name.replace('.', '-')}.tsv", examples)
    wikitext = (data / "paper" / "wikitext2" / "test.txt").read_text()
    for name, text in (("wikitext2", wikitext), ("wikipedia", "\n".join(held_out))):
        made = list(windows(tokenizer, text, seed=0))
        (out / f"{name}.jsonl").write_text("".join(json.dumps(window) + "\n" for window in made))
        for side in ("source", "target"):
            ids = tokenizer([window[side] for window in made])["input_ids"]
            assert max(map(len, ids)) <= WINDOW
            arrays[f"{name}.{side}.ids"] = np.concatenate(ids).astype(np.uint16)
            arrays[f"{name}.{side}.lengths"] = np.array([len(row) for row in ids], dtype=np.uint16)
    ids = tokenizer(pieces)["input_ids"]
    arrays["language"] = np.concatenate(ids).astype(np.uint16)
    vocabulary = tokenizer.get_vocab()
    arrays["goes_on"] = np.array([piece.startswith("##") for piece in sorted(vocabulary, key=vocabulary.__getitem__)])
    np.savez_compressed(out / "minis.npz", **arrays)  # type: ignore[arg-type]  # numpy 2.3 takes a name for its flag
    for name, array in arrays.items():
        print(f"{name}: {array.shape} {array.dtype}")
    print(f"{(out / 'minis.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
