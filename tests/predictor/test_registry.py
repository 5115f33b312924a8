"""Predictors by name: made from the files that training wrote, and refused in one line when the file is not the right one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from predictor import traces
from predictor.baselines import Oracle, Random
from predictor.calibration import Calibration
from predictor.errors import PredictorError
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import Width
from predictor.matrices import LowRank
from predictor.registry import KINDS, PredictorSpec, calibration_of, make, save_lstm, save_token_table
from predictor.rehearsal import Rehearsal, Rehearsed
from predictor.stand_ins import StandIns
from predictor.stand_ins import save as save_stand_ins
from predictor.token_table import TokenTable
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from tests.predictor.made_traces import OnlyEmbedding, ragged, random_trace

VOCAB = 30
SHAPE = RoutingShape(experts=(8, 4), streams=(ENCODER, DECODER), top_k=1, vocab_size=VOCAB)
EMBEDDING = torch.randn(VOCAB, 12, generator=torch.Generator().manual_seed(0))
FILES = ("lstm", "token_table", "rehearsal", "oracle")
"""Kinds that read a file."""


def make_trace():
    rng = np.random.default_rng(0)
    return random_trace(rng, ragged(rng, rows=8, vocab=VOCAB, streams=2), SHAPE)


def write(kind: str, path: Path, identity: str = "id"):
    """Writes the file of a kind; returns the predictor that was in memory."""
    trace = make_trace()
    if kind == "rehearsal":
        made = StandIns("svd", ({"wi": LowRank({"up": torch.ones(8, 3, 1).half(), "down": torch.ones(8, 1, 5).half()})}, {}))
        save_stand_ins(made, path, identity)
        return Rehearsal(MODEL.rehearser(made, "cpu"), None, SHAPE, Width(3))
    if kind == "lstm":
        torch.manual_seed(0)
        network = HashFunction(SHAPE, 12, 16)
        save_lstm(network, path, SHAPE, identity, None)
        return LSTMPredictor(network, SHAPE, EMBEDDING, Width(3))
    if kind == "token_table":
        table = TokenTable.fit(trace, SHAPE, Width(3))
        save_token_table(table, path, identity, None)
        return table
    traces.save(trace, path, SHAPE, identity)
    return Oracle(trace, SHAPE, 3)


def spec(kind: str, path: Path | None, **changes) -> PredictorSpec:
    return replace(PredictorSpec(kind, path, 3, SHAPE, "id"), **changes)


class Model:
    """A model whose rehearsal says of every token what its id decides."""

    def embedding(self) -> torch.Tensor:
        return EMBEDDING

    def rehearser(self, stand_ins: StandIns, device: str):
        def rehearse(tokens: TokenBatch) -> list[Rehearsed]:
            said = []
            for experts, stream in zip(SHAPE.experts, SHAPE.streams, strict=True):
                logits = np.random.default_rng(0).normal(0, 2, (VOCAB, experts)).astype(np.float32)[tokens.flat(stream)]
                logits += sum(
                    matrices.tensors["up"].float().sum().item() for parts in stand_ins.layers for matrices in parts.values()
                )
                chosen = logits.argmax(axis=1)[:, None]
                said.append(Rehearsed(logits, chosen, np.full(chosen.shape, 0.5, np.float32)))
            return said

        return rehearse


MODEL = Model()


def refused(wanted: PredictorSpec) -> str:
    with pytest.raises(PredictorError) as error:
        make(wanted, MODEL)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", FILES)
def test_a_predictor_from_its_file_predicts_as_the_one_that_was_saved(tmp_path, kind):
    path = tmp_path / "predictor.safetensors"
    saved = write(kind, path)
    tokens = make_trace().tokens
    mine, theirs = make(spec(kind, path), MODEL).predict(tokens), saved.predict(tokens)
    for layer in range(SHAPE.layers):
        # float16 on disk
        np.testing.assert_allclose(mine.probability[layer], theirs.probability[layer], atol=2e-3)
        np.testing.assert_allclose(mine.scaling[layer], theirs.scaling[layer], atol=2e-3)
        assert (mine.experts[layer][:, 0] == theirs.experts[layer][:, 0]).mean() > 0.95


def test_every_kind_makes_tables_of_top_k_experts_for_every_token(tmp_path):
    tokens = make_trace().tokens
    for kind in KINDS:
        path = None
        if kind in FILES:
            path = tmp_path / f"{kind}.safetensors"
            write(kind, path)
        table = make(spec(kind, path, top_k=2), MODEL).predict(tokens)
        width = 0 if kind in ("none", "recent") else 2
        for layer, stream in enumerate(SHAPE.streams):
            for array in (table.experts[layer], table.probability[layer], table.scaling[layer]):
                assert array.shape == (len(tokens.flat(stream)), width), kind


def test_kinds_that_need_no_file_and_no_embeddings_ask_for_none():
    assert isinstance(make(spec("random", None), OnlyEmbedding()), Random)


def test_an_unknown_kind_is_refused_with_the_known_ones_named():
    message = refused(spec("lstn", None))
    assert "'lstn'" in message
    assert all(kind in message for kind in KINDS)


@pytest.mark.parametrize("kind", FILES)
def test_a_kind_without_its_file_is_refused_with_the_command_that_makes_it(tmp_path, kind):
    assert "predictor.path" in refused(spec(kind, None))
    message = refused(spec(kind, tmp_path / "nothing.safetensors"))
    assert str(tmp_path / "nothing.safetensors") in message
    assert "runner.py train" in message


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused_and_named(tmp_path, kind):
    path = tmp_path / "predictor.safetensors"
    write(kind, path)
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}: truncated" in refused(spec(kind, path))


@pytest.mark.parametrize("kind", FILES)
def test_a_predictor_of_another_model_is_refused(tmp_path, kind):
    path = tmp_path / "predictor.safetensors"
    write(kind, path, identity="another")
    message = refused(spec(kind, path))
    assert f"{path}: made for another model" in message
    assert "another" in message


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_refused(tmp_path, kind):
    path = tmp_path / "predictor.safetensors"
    other = FILES[FILES.index(kind) - 1]
    write(other, path)
    message = refused(spec(kind, path))
    assert str(path) in message
    assert {"oracle": "trace", "rehearsal": "stand_ins"}.get(other, other) in message


@pytest.mark.parametrize("kind", FILES)
def test_a_failed_save_leaves_the_old_predictor(tmp_path, monkeypatch, kind):
    path = tmp_path / "predictor.safetensors"
    write(kind, path)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(traces, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        write(kind, path, identity="new")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["lstm", "token_table", "rehearsal"])
def test_what_was_found_on_held_out_rows_is_in_the_file(tmp_path, kind):
    path = tmp_path / "predictor.safetensors"
    found = Calibration((0.5, 2.0), (0.9, 0.8), (1.0, 0.9))
    if kind == "lstm":
        save_lstm(HashFunction(SHAPE, 12, 16), path, SHAPE, "id", found)
    elif kind == "token_table":
        save_token_table(TokenTable.fit(make_trace(), SHAPE, Width(3)), path, "id", found)
    else:
        save_stand_ins(StandIns("none", ({}, {}), found), path, "id")
    assert calibration_of(spec(kind, path)) == found
    write(kind, path)
    assert calibration_of(spec(kind, path)) is None  # made, and judged by nobody


def test_an_lstm_is_as_sure_as_its_file_says(tmp_path):
    torch.manual_seed(0)
    network, tokens = HashFunction(SHAPE, 12, 16), make_trace().tokens
    sure = {}
    for temperature in (0.1, 10.0):
        path = tmp_path / f"{temperature}.safetensors"
        save_lstm(network, path, SHAPE, "id", Calibration((temperature,) * 2, (1.0, 1.0), (1.0, 1.0)))
        sure[temperature] = make(spec("lstm", path), MODEL).predict(tokens)
    for layer in range(SHAPE.layers):
        np.testing.assert_array_equal(sure[0.1].experts[layer][:, 0], sure[10.0].experts[layer][:, 0])
        assert (sure[0.1].probability[layer][:, 0] > sure[10.0].probability[layer][:, 0]).all()
