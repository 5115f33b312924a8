"""Scoring and writing with decoders: token ids, stop tokens, sampling, streaming, against transformers on each row by itself."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.config import Config, load_config, parse
from pipeline.data import Batch, Row
from pipeline.errors import USER_ERRORS, ConfigError, DataError, ModelError
from pipeline.executor import Executor
from pipeline.predicting.train import train
from pipeline.prepare import Prepared, prepare
from pipeline.reports.metrics import batch_metrics
from pipeline.tasks.generate import Generate
from pipeline.tasks.speaker import Speaker
from pipeline.tasks.writing import DONE
from predictor.actor import timed
from predictor.nobody import Nobody
from store.actor import ExpertStore
from tests.conftest import SENTENCES, TOKENIZER, VOCABULARY
from tests.pipeline.tiny_families import save_tiny

CONTEXT = 48
STOP = 1
"""The tokenizer's </s>, which it puts behind every text."""


def save_decoder(directory: Path, family: str = "qwen3_moe", **changes):
    cls = save_tiny(family, directory, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory)
    return cls.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decoder") / "model"
    return directory, save_decoder(directory)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def config(tmp_path: Path, directory: Path, **changes) -> Config:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    rows = tmp_path / "rows.txt"
    if not rows.exists():
        rows.write_text("\n".join(SENTENCES) + "\n")
    plain = {
        "task": "generate",
        "model": {"path": str(directory), "dtype": "float32"},
        "data": {"path": str(rows)},
        "generate": {"max_new_tokens": 8},
        "batch": {"size": 3},
        "predictor": {"kind": "none"},
        "store": {"budget": "30%", "directory": str(tmp_path / "arenas")},
        "output_dir": str(tmp_path / "out"),
    }
    return parse(plain | changes, "test")


class Run:
    """All batches of a config through one Executor, in one process."""

    def __init__(self, settings: Config):
        self.prepared: Prepared = prepare(settings)
        store = ExpertStore(self.prepared.arena, self.prepared.model.source, self.prepared.model.placement)
        store.open()
        executor = Executor(self.prepared.executor_spec(background=False))
        self.heard: dict[int, list[list[int]]] = {}
        nobody = Nobody(self.prepared.model.shape)
        try:
            self.batches = [self.run(executor, batch, nobody) for batch in self.prepared.batches]
        finally:
            executor.close()
            store.close(keep=False)
        self.rows = sorted((row for batch in self.batches for row in batch.results), key=lambda row: row["index"])

    def run(self, executor: Executor, batch: Batch, predictor: Nobody):
        heard = self.heard[batch.index] = []

        def hear(tokens: np.ndarray, awake: np.ndarray) -> None:
            heard.append(tokens.tolist())
            assert executor.spoken(batch.index) == heard  # what another process would be told now

        done = executor.execute(batch, timed(predictor, batch.tokens), hear=hear)
        assert executor.spoken(batch.index) == []
        return done


def prompt(tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text).input_ids
    assert ids[-1] == STOP
    return torch.tensor([ids[:-1]])


# scoring


def test_a_decoder_scores_all_tokens_but_the_first(tmp_path, model, tokenizer):
    directory, whole = model
    for row, text in zip(Run(config(tmp_path, directory, task="score")).rows, SENTENCES, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            scores = whole(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert row["tokens"] == ids.shape[1] - 1
        assert row["logprob"] == pytest.approx(scores.double().sum().item(), rel=1e-5)


def test_scoring_says_the_perplexity(tmp_path, model):
    run = Run(config(tmp_path, model[0], task="score"))
    quality = run.prepared.task.quality(run.prepared.rows, run.rows)
    tokens = sum(row["tokens"] for row in run.rows)
    assert quality == {"perplexity": pytest.approx(np.exp(-sum(row["logprob"] for row in run.rows) / tokens))}


# writing


def test_rows_of_a_batch_are_written_as_each_would_be_alone(tmp_path, model, tokenizer):
    directory, whole = model
    for row, text in zip(Run(config(tmp_path, directory)).rows, SENTENCES, strict=True):
        ids = prompt(tokenizer, text)
        with torch.inference_mode():
            alone = whole.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert row["token_ids"] == alone
        assert row["text"] == tokenizer.decode(alone, skip_special_tokens=True)


def test_a_stop_token_ends_its_row_and_no_other(tmp_path, model, tokenizer):
    before = Run(config(tmp_path, model[0])).rows
    stop = before[2]["token_ids"][3]
    word = tokenizer.convert_ids_to_tokens(stop)
    after = Run(config(tmp_path, model[0], generate={"max_new_tokens": 8, "stop": [word]})).rows
    for old, new in zip(before, after, strict=True):
        ids = old["token_ids"]
        assert new["token_ids"] == (ids[: ids.index(stop) + 1] if stop in ids else ids)
    assert len(after[2]["token_ids"]) <= 4


def test_rows_that_are_done_use_no_experts(tmp_path, model, tokenizer):
    every = Run(config(tmp_path, model[0], batch={"size": 7}))
    stops = [tokenizer.convert_ids_to_tokens(row["token_ids"][0]) for row in every.rows[1:]]
    changes = {"generate": {"max_new_tokens": 8, "stop": stops}, "batch": {"size": 7}}
    one = Run(config(tmp_path, model[0], **changes))
    assert len(one.rows[0]["token_ids"]) == 8, "the first row goes on alone"
    uses = [sum(run.batches[0].stats.hits) + sum(run.batches[0].stats.misses) for run in (one, every)]
    assert uses[0] < uses[1]


def test_samples_are_those_of_transformers_with_the_same_seed(tmp_path, model):
    directory, whole = model
    choice = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    run = Run(config(tmp_path, directory, generate={"max_new_tokens": 8, "sample": True} | choice))
    for batch in run.prepared.batches:
        inputs = run.prepared.task.inputs(batch, lambda longest: longest)
        torch.manual_seed(int(inputs["seed"]))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            out = whole.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, pad_token_id=0, **choice)
        for row, tokens in zip(batch.rows, out[:, ids.shape[1] :].tolist(), strict=True):
            assert run.rows[row]["token_ids"] == (tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens)


def test_a_seed_and_rows_give_the_same_samples_and_another_seed_others(tmp_path, model):
    sample = {"generate": {"max_new_tokens": 8, "sample": True}}
    first, again, other = (Run(config(tmp_path, model[0], seed=seed, **sample)).rows for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != Run(config(tmp_path, model[0])).rows


def test_sampling_leaves_the_callers_random_numbers_alone(tmp_path, model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Run(config(tmp_path, model[0], generate={"max_new_tokens": 2, "sample": True}))
    assert torch.equal(torch.rand(3), expected)


def test_every_token_is_heard_as_it_is_written(tmp_path, model):
    run = Run(config(tmp_path, model[0]))
    for batch, done in zip(run.prepared.batches, run.batches, strict=True):
        steps = np.array(run.heard[batch.index])  # (steps, rows)
        for row, result in zip(steps.T, done.results, strict=True):
            assert [token for token in row.tolist() if token != DONE] == result["token_ids"]


def test_time_to_the_first_token_and_per_token_are_measured(tmp_path, model):
    run = Run(config(tmp_path, model[0]))
    metrics = batch_metrics([batch.stats for batch in run.batches], len(run.rows), 1.0)
    assert metrics["new_tokens"] == sum(len(row["token_ids"]) for row in run.rows)
    for key in ("ms_to_first_token", "ms_per_token"):
        assert 0 < metrics[key]["p50"] <= metrics[key]["p95"] <= metrics[key]["p99"]
    for batch in run.batches:
        whole = (batch.stats.end - batch.stats.start) / 1e6
        assert batch.stats.first_token_ms + sum(batch.stats.token_ms) <= whole
    score = Run(config(tmp_path, model[0], task="score"))
    assert "ms_per_token" not in batch_metrics([batch.stats for batch in score.batches], 1, 1.0)


def test_a_fixed_first_token_is_written(tmp_path, tokenizer):
    from tests.conftest import save_switch

    whole = save_switch(tmp_path / "switch")
    rows = Run(config(tmp_path, tmp_path / "switch", generate={"max_new_tokens": 5, "first": "good"})).rows
    (first,) = tokenizer("good", add_special_tokens=False).input_ids
    for row, text in zip(rows, SENTENCES, strict=True):
        assert row["token_ids"][0] == first
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            alone = whole.generate(ids, max_new_tokens=5, do_sample=False, forced_bos_token_id=first)[0, 1:].tolist()
        assert row["token_ids"] == (alone[: alone.index(STOP) + 1] if STOP in alone else alone)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Words:
    """A task whose text is its ids."""

    def text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def a_batch() -> Batch:
    return Batch(0, np.array([4, 2]), None)


def test_a_terminal_sees_the_first_row_grow_and_then_the_others():
    out = Terminal()
    speaker = Speaker(Words(), out)
    speaker.listen(a_batch(), [[7, 8]])
    assert out.getvalue() == "row 5: 7"
    speaker.listen(a_batch(), [[7, 8], [9, DONE]])
    speaker.listen(a_batch(), [[7, 8], [9, DONE]])
    assert out.getvalue() == "row 5: 7 9"
    speaker.finish([{"index": 4, "text": "7 9 3"}, {"index": 2, "text": "8"}])
    assert out.getvalue() == "row 5: 7 9 3\nrow 3: 8\n"


def test_a_file_sees_whole_rows_only():
    out = io.StringIO()
    speaker = Speaker(Words(), out)
    speaker.listen(a_batch(), [[7, 8]])
    assert out.getvalue() == ""
    speaker.finish([{"index": 4, "text": "7 9"}])
    assert out.getvalue() == "row 5: 7 9\n"


# what is refused


def refused(tmp_path: Path, directory: Path, error: type[Exception], **changes) -> str:
    with pytest.raises(error) as raised:
        prepare(config(tmp_path, directory, **changes))
    assert isinstance(raised.value, USER_ERRORS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_prompt_longer_than_the_context_is_refused_with_its_row(tmp_path, model):
    (tmp_path / "rows.txt").write_text("short\n" + "one two three four " * 15 + "\n")
    message = refused(tmp_path, model[0], DataError)
    assert message.startswith("row 2: ")
    assert f"8 new ones are more than the model's context of {CONTEXT}" in message
    assert f"context of {CONTEXT}" in refused(tmp_path, model[0], DataError, task="score")


def test_more_new_tokens_than_the_context_are_refused(tmp_path, model):
    message = refused(tmp_path, model[0], ConfigError, generate={"max_new_tokens": CONTEXT})
    assert message.startswith(f"generate.max_new_tokens: {CONTEXT} leaves no room")


def test_a_stop_that_is_not_one_token_is_refused(tmp_path, model):
    message = refused(tmp_path, model[0], ConfigError, generate={"max_new_tokens": 8, "stop": ["it is not one token"]})
    assert message.startswith("generate.stop: 'it is not one token' is not one token")


def test_settings_of_sampling_without_sampling_are_refused(tmp_path, model):
    assert "generate.sample=true" in refused(tmp_path, model[0], ConfigError, generate={"max_new_tokens": 8, "temperature": 0.5})


def test_a_decoder_has_no_target(tmp_path, model):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "target": "b"}) + "\n")
    data = {"path": str(tmp_path / "rows.jsonl"), "target": "target"}
    assert "leave data.target out" in refused(tmp_path, model[0], ConfigError, task="score", data=data)


def test_a_model_that_does_not_write_is_refused(tmp_path):
    from tests.conftest import save_switch

    save_switch(tmp_path / "head", head=True, num_labels=2)
    for task in ("generate", "score"):
        assert f"task: {task} needs a model that writes" in refused(tmp_path, tmp_path / "head", ConfigError, task=task)


def test_a_missing_tokenizer_is_named(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    assert f"{tmp_path / 'model'}: no usable tokenizer" in refused(tmp_path, tmp_path / "model", ModelError)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_new_tokens=0", "'generate.max_new_tokens' is 0; it must be more than 0"),
        ("max_new_tokens=many", "'generate.max_new_tokens' is 'many'; it must be a whole number"),
        ("temperature=0", "'generate.temperature' is 0.0; it must be more than 0"),
        ("temperature=.nan", "'generate.temperature' is nan"),
        ("top_p=1.5", "'generate.top_p' is 1.5; it must be more than 0 and at most 1"),
        ("top_k=0", "'generate.top_k' is 0; it must be more than 0, or null for all"),
        ("temprature=0.5", "unknown key 'generate.temprature'; did you mean 'generate.temperature'?"),
        ("repetition_penalty=1.1", "unknown key 'generate.repetition_penalty'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path, setting, said):
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d.txt}\ntask: generate\n")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "c.yaml", [f"generate.{setting}"])
    assert said in str(raised.value)


def test_a_text_of_one_token_cannot_be_scored(tmp_path, model, tokenizer):
    task = prepare(config(tmp_path, model[0], task="score")).task
    bare = partial(tokenizer, add_special_tokens=False)

    def without_stop(texts, pairs=None, add_special_tokens=True, **more):
        return bare(texts, pairs, **more)

    with pytest.raises(DataError, match="row 2: one token"):
        task.encode(without_stop, [Row("a quiet film"), Row("good")], 100)


def test_hash_routing_without_tables_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d.txt}\ntask: generate\n")
    with pytest.raises(ConfigError, match="'routing: hash' needs tables"):
        load_config(tmp_path / "c.yaml", ["predictor.kind=none", "routing=hash"])


def test_a_command_that_traces_one_forward_refuses_to_write(tmp_path, model):
    settings = config(tmp_path, model[0], predictor={"kind": "token_table", "path": str(tmp_path / "p.safetensors")})
    with pytest.raises(ConfigError, match="write `task: score`"):
        train(settings)


def test_a_task_travels_without_its_tokenizer(model):
    """Ray sends it to the Executor, which reads the tokenizer for itself."""
    import pickle

    from pipeline.tasks.sampling import Sampling

    task = Generate(Sampling(), 0, (STOP,), None, None, None, model[0], 0)
    assert len(pickle.dumps(task)) < 2000
    assert task.text([867]) == pickle.loads(pickle.dumps(task)).text([867])


def test_to_other_machines_a_task_takes_its_tokenizer_along(tmp_path, model):
    import pickle

    directory = tmp_path / "model"
    shutil.copytree(model[0], directory)
    task = prepare(config(tmp_path, directory, cluster={"nodes": "all"})).task
    travelled = pickle.dumps(task)
    said = task.text([867])
    shutil.rmtree(directory)
    assert pickle.loads(travelled).text([867]) == said
