"""A tutor's checkpoint as it travels: word pieces that the texts need, and some 5 bits a weight. For `tutor.py` to read.

Knows a BERT's files in Hugging Face's format; nothing of what a tutor does. Needed where texts are prepared alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from assets.minis.tutor import SPECIAL, UNK

LEVELS = 31
"""A weight of a matrix is one of 2 x LEVELS + 1 multiples of its row's largest."""
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "wi": "intermediate.dense",
    "wo": "output.dense",
    "last": "output.LayerNorm",
}


def packed(directory: Path, words: list[str], longest: int = 256) -> dict[str, np.ndarray]:
    """What `Tutor.of` reads: every word's pieces, numbered anew, and the weights; `tutor.` before every name.

    Args:
        directory: config.json, tokenizer.json and model.safetensors of a BERT.
        words: as the mini's tokenizer splits texts, in order of their numbers.
        longest: so many positions are kept.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pieces = [encoded.ids for encoded in tokenizer.encode_batch(words, add_special_tokens=False)]
    special = [i for token in SPECIAL if (i := tokenizer.token_to_id(token)) is not None]
    assert len(special) == len(SPECIAL), f"{directory}/tokenizer.json: not all of {', '.join(SPECIAL)} are there"
    pieces = [ids or [special[UNK]] for ids in pieces]
    used = special + sorted({i for ids in pieces for i in ids} - set(special))
    number = {old: new for new, old in enumerate(used)}
    stored = {name.removeprefix("bert."): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    config = json.loads((directory / "config.json").read_text())
    weights = {
        "words": stored["embeddings.word_embeddings.weight"][used],
        "places": stored["embeddings.position_embeddings.weight"][:longest] + stored["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": stored["embeddings.LayerNorm.weight"],
        "norm.bias": stored["embeddings.LayerNorm.bias"],
    }
    for i in range(config["num_hidden_layers"]):
        for ours, theirs in LAYER.items():
            for part in ("weight", "bias"):
                weights[f"layers.{i}.{ours}.{part}"] = stored[f"encoder.layer.{i}.{theirs}.{part}"]
    arrays = {
        "tutor.heads": np.array(config["num_attention_heads"]),
        "tutor.pieces.ids": np.array([number[i] for ids in pieces for i in ids], dtype=np.uint16),
        "tutor.pieces.lengths": np.array([len(ids) for ids in pieces], dtype=np.uint16),
    }
    for name, weight in weights.items():
        if weight.ndim == 1:
            arrays[f"tutor.vector.{name}"] = weight.astype(np.float16)
            continue
        scale = np.abs(weight).max(1, keepdims=True) / LEVELS + 1e-12
        arrays[f"tutor.scale.{name}"] = scale.astype(np.float32)
        arrays[f"tutor.matrix.{name}"] = np.round(weight / scale).astype(np.int8)
    return arrays
