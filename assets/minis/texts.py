"""The texts that minis are trained on and judged by, and what keeps the two apart.

Reads the folders that their README names (`lm_public_domain`, `lm_wikipedia_sample`, `sst2_like_movie`, `paper`); knows nothing of
tokens. A text is kept out of training if, letters and digits alone and in lower case, it is a part of a held-out text (from 10
characters on: "a gem" belongs to nobody) or shares 28 characters in a row with one. That is stricter than equality, because SST-2's
training set holds phrases of sentences.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

SHARED, WHOLE = 28, 10
WIKIPEDIA_HELD_OUT = 8
"""Of the articles, the last ones: judged by, never trained on."""
OLD = ("shakespeare", "bible_kjv")
"""Books that are not read: a quarter of the text, and nothing that minis are judged by is written so."""


@dataclass(frozen=True)
class Example:
    """Attributes:
    text, pair: what is read; a pair follows the tokenizer's separator.
    label: 0 or 1.
    positive: how probable label 1 is held to be; the label itself where nobody rated.
    """

    text: str
    pair: str | None
    label: int
    positive: float


def rows(path: Path) -> list[dict[str, str]]:
    """Of a .tsv without quoting, whose first line names the columns."""
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def folded(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower().replace("-lrb-", "").replace("-rrb-", ""))


class Apart:
    """Says whether a text may be trained on."""

    def __init__(self, held_out: list[str]):
        texts = [folded(text) for text in held_out]
        self.whole = "|".join(texts)
        self.runs = {text[i : i + SHARED] for text in texts for i in range(max(len(text) - SHARED + 1, 1))}

    def __call__(self, text: str) -> bool:
        text = folded(text)
        if len(text) >= WHOLE and text in self.whole:
            return False
        return not any(text[i : i + SHARED] in self.runs for i in range(len(text) - SHARED + 1))


def sst2(data: Path, part: str) -> list[Example]:
    found = rows(data / "paper" / "sst2" / f"{part}.tsv")
    return [Example(row["sentence"], None, int(row["label"]), float(row["label"])) for row in found]


def movie(path: Path, least: float = 0.0) -> list[Example]:
    """Sentences with a score from -4 to 4; a score of 1 is held to be 80 % sure."""
    found = []
    for row in rows(path):
        score = float(row["score"])
        if abs(score) >= least:
            found.append(Example(row["sentence"], None, int(score > 0), 1 / (1 + 4.0**-score)))
    return found


def mrpc(data: Path, part: str) -> list[Example]:
    found = rows(data / "paper" / "mrpc" / f"{part}.tsv")
    return [Example(row["sentence1"], row["sentence2"], int(row["label"]), float(row["label"])) for row in found]


def multirc(data: Path, part: str) -> list[Example]:
    """A row of the paper: paragraph, and question with answer."""
    folder = data / "paper" / "multirc"
    paragraphs = {row["pid"]: row["paragraph"] for row in rows(folder / f"{part}_paragraphs.tsv")}
    return [
        Example(paragraphs[row["pid"]], f"{row['question']} {row['answer']}", int(row["label"]), float(row["label"]))
        for row in rows(folder / f"{part}_questions.tsv")
    ]


def sentiment(data: Path) -> tuple[list[Example], dict[str, list[Example]]]:
    """What sentiment is trained on, and the two sets that it is judged by; nothing of either is in the first."""
    held_out = {"sst2": sst2(data, "dev"), "movie": movie(data / "sst2_like_movie" / "dev.tsv")}
    apart = Apart([example.text for examples in held_out.values() for example in examples])
    snippets = data / "sst2_like_movie"
    all_of_it = sst2(data, "train") + sst2(data, "train_rest") + movie(snippets / "all_scored.tsv")
    all_of_it += movie(snippets / "amazonReviewSnippets.tsv", least=0.5)
    return [example for example in all_of_it if apart(example.text)], held_out


def documents(data: Path) -> tuple[list[str], list[str]]:
    """What language is learnt from, in pieces of some hundred words in a fixed random order; and the held-out articles' lines."""
    titles = [line.strip() for line in (data / "lm_wikipedia_sample" / "titles.txt").read_text().splitlines()]
    wiki = (data / "lm_wikipedia_sample" / "wiki.txt").read_text().split("\n")
    held_back = len(wiki) * WIKIPEDIA_HELD_OUT // len(titles)
    test = (data / "paper" / "wikitext2" / "test.txt").read_text()
    apart = Apart(
        [*re.findall(r"[^.]{60,}\.", test.replace("<unk>", "|")), *(line for line in wiki[-held_back:] if len(line) > 60)]
    )
    pieces = []
    books = [
        path for path in sorted((data / "lm_public_domain").glob("*.txt")) if path.stem not in OLD and "LICENSE" not in path.name
    ]
    sources = [path.read_text() for path in books]
    sources += ["\n".join(line for line in wiki[:-held_back] if apart(line))]
    sources += [(data / "paper" / "wikitext2" / "valid.txt").read_text()]
    for text in sources:
        words = text.split()
        pieces += [" ".join(words[i : i + 400]) for i in range(0, len(words), 400)]
    sentences = [example.text for example in sentiment(data)[0] if example.text.count(" ") >= 9]
    order = random.Random(0)
    order.shuffle(sentences)
    pieces += [" ".join(sentences[i : i + 20]) for i in range(0, len(sentences), 20)]
    order.shuffle(pieces)
    return pieces, wiki[-held_back:]
