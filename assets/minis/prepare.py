"""What the GPU is given: a tokenizer and one packed file of token ids. `python -m assets.minis.prepare DATA TUTOR OUT`, on a CPU.

DATA holds the folders that `texts.py` names, TUTOR the checkpoint that `checkpoint.py` cuts. The tokenizer is a WordPiece of 12,288
pieces in lower case that splits a text as SST-2 is split ("do n't"), so that both spellings give the same pieces; it is made of
the texts trained on, and words that reviews use are whole in it. OUT also gets what the tables of docs/paper.md are measured on:
labelled rows as .tsv, and windows of held-out text as .jsonl, source and target. It takes some minutes.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from assets.minis import checkpoint, texts
from assets.minis.network import EOS
from assets.minis.texts import Example

VOCABULARY = 12288
WHOLE, OFTEN = 8000, 4
"""At most so many words of the sentiment texts are whole pieces, the most frequent first, each there at least so often."""
BORROWED, KNOWN = 5000, 30
"""So many other words, each at least so often in the rest of the texts, may be put into a review that is made for the tutor."""
SENTINELS = 32
SPECIAL = ["<pad>", "</s>", "<unk>"]
NOISE, SPAN = 0.15, 3
"""Of the words of a window, how many are left out, and in a row on average: T5's."""
WINDOW = 512
MOST_ROWS = 5000
REPLACED = {"-lrb-": "(", "-rrb-": ")", "``": '"', "''": '"', "’": "'", " @-@ ": "-", " @ - @ ": "-", " @,@ ": ",", " @.@ ": "."}


def make_tokenizer(pieces: list[str], reviews: list[str]) -> PreTrainedTokenizerFast:
    """Of both, with the reviews' words whole."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=40))
    plain = [normalizers.Replace(old, new) for old, new in REPLACED.items()]
    apart = normalizers.Replace(Regex(r"(?<=[a-z])n't\b"), " n't")
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=True), *plain, apart])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    size = VOCABULARY - SENTINELS
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(pieces + reviews, trainer)
    assert tokenizer.get_vocab_size() == size, "too little text for the vocabulary"
    vocabulary = tokenizer.get_vocab()
    learnt = sorted(vocabulary, key=vocabulary.__getitem__)
    counts = Counter(word for text in reviews for word in split_words(tokenizer, text))
    signs = [piece for piece in learnt if len(piece.removeprefix("##")) == 1]
    words = [word for word, count in counts.most_common(WHOLE) if count >= OFTEN]
    kept = list(dict.fromkeys([*SPECIAL, *signs, *words, *learnt]))[:size]
    tokenizer.model = models.WordPiece({piece: i for i, piece in enumerate(kept)}, unk_token="<unk>", max_input_chars_per_word=40)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
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


def split_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that a text is cut into before it is pieces."""
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def worded(
    tokenizer: Tokenizer, training: list[Example], judged: list[Example], other: list[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The sentiment texts as numbers of words, the words' pieces, and how often each is in them: what `taught.py` reads.

    Words of the held-out texts are known so that a tutor can be judged; their frequency is 0, and none is put into a text.
    """
    told = [split_words(tokenizer, example.text) for example in training]
    counts = Counter(word for text in told for word in text)
    own = [word for word, _ in counts.most_common()]
    borrowed = Counter(word for text in other for word in split_words(tokenizer, text) if word.isalpha())
    more = [word for word, count in borrowed.most_common() if count >= KNOWN and word not in counts][:BORROWED]
    asked = [split_words(tokenizer, example.text) for example in judged]
    words = list(dict.fromkeys([*own, *more, *(word for text in asked for word in text)]))
    assert len(words) < 2**16
    number = {word: i for i, word in enumerate(words)}
    ids = [encoded.ids for encoded in tokenizer.encode_batch(words, add_special_tokens=False)]
    arrays: dict[str, np.ndarray] = {
        "sst2.frequency": np.array([counts[word] or 1 for word in own + more], dtype=np.float32),
        "sst2.words.ids": np.concatenate(ids).astype(np.uint16),
        "sst2.words.lengths": np.array([len(pieces) for pieces in ids], dtype=np.uint8),
        "sst2.train.positive": np.array([example.positive for example in training], dtype=np.float32),
    }
    for name, found in (("train", told), ("dev", asked)):
        arrays[f"sst2.{name}.words"] = np.array([number[word] for text in found for word in text], dtype=np.uint16)
        arrays[f"sst2.{name}.counts"] = np.array([len(text) for text in found], dtype=np.uint16)
    return words, arrays


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


def main(data: Path, tutor: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pieces, held_out = texts.documents(data)
    training, judged = texts.sentiment(data)
    tokenizer = make_tokenizer(pieces, [example.text for example in training])
    tokenizer.save_pretrained(out / "tokenizer")
    words, arrays = worded(tokenizer.backend_tokenizer, training, judged["sst2"], pieces)
    arrays |= checkpoint.packed(tutor, words)
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
    main(*map(Path, sys.argv[1:4]))
