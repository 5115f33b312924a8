"""Bad input, from the command line to the exit code: 2, one line on stderr that says what and where, and nothing left behind.

No case here reaches Ray: all is refused before a weight is read or an actor started.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

import runner
from pipeline.config import parse
from pipeline.reports.output import OutputDir
from predictor.tokens import RoutingShape, TokenBatch
from predictor.traces import LayerTrace, Trace, save
from store.checkpoint import INDEX, SINGLE
from tests.conftest import ROOT, config_data, save_switch, write_tsv


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A good checkpoint, in shards and in one file; nobody changes it."""
    root = tmp_path_factory.mktemp("published")
    save_switch(root / "one")
    save_switch(root / "sharded", max_shard_size="500KB")
    return root


@pytest.fixture(autouse=True)
def _no_actors(monkeypatch):
    def reached(address):
        raise AssertionError("bad input reached Ray")

    monkeypatch.setattr("pipeline.run.cluster", reached)


class Case:
    """A config with good model and data in a directory of its own, to be spoilt."""

    def __init__(self, root: Path, published: Path):
        self.root, self.published = root, published
        self.model, self.rows, self.output = root / "model", root / "rows.tsv", root / "out" / "deep"
        (root / "arenas").mkdir()
        self.use("one")
        write_tsv(self.rows)
        self.data = config_data(self.model, self.rows, root / "arenas", self.output)
        self.path = root / "config.yaml"

    def use(self, name: str) -> None:
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self.published / name, self.model)

    def change_model_config(self, **changes) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}


@pytest.fixture
def case(tmp_path, published) -> Case:
    return Case(tmp_path, published)


@pytest.fixture
def refused(case, capfd):
    """Runs the command; returns its line. Checks code, form, and that nothing was written."""

    def run(*overrides: str, command: str = "run", config: Path | None = None) -> str:
        if config is None:
            config = case.path
            config.write_text(yaml.safe_dump(case.data))
        before = case.files()
        capfd.readouterr()
        assert runner.main([command, str(config), *overrides]) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        assert case.files() == before, "something was written"
        return lines[0].removeprefix("error: ")

    return run


# the config


def test_a_config_file_that_is_not_there(refused, tmp_path):
    missing = tmp_path / "nothing.yaml"
    assert refused(config=missing) == f"{missing}: no such file"


def test_a_misspelt_key(refused, case):
    case.data["batches"] = {"size": 2}
    assert "unknown key 'batches'; did you mean 'batch'?" in refused()
    del case.data["batches"]
    assert "unknown key 'store.bugdet'; did you mean 'store.budget'?" in refused("store.bugdet=10%")


def test_a_wrong_type(refused, case):
    case.data["batch"]["size"] = "many"
    assert f"{case.path}: 'batch.size' is 'many'; it must be a whole number" in refused()


def test_an_unknown_kind_and_an_impossible_value(refused):
    assert "did you mean 'lstm'?" in refused("predictor.kind=lsmt")
    assert "'batch.size' is 0" in refused("batch.size=0")
    assert "'seed' is -1" in refused("seed=-1")


# the data


def test_a_data_file_that_is_not_there_or_of_an_unknown_format(refused, case, tmp_path):
    assert f"{tmp_path}/nothing.tsv: no such file" in refused(f"data.path={tmp_path}/nothing.tsv")
    assert "unknown format '.yaml'" in refused(f"data.path={case.path}")


def test_a_missing_column(refused, case):
    assert f"{case.rows}: row 1 has no column 'text'; it has: sentence, label" in refused("data.text=text")


def test_a_label_outside_the_labels(refused, case):
    write_tsv(case.rows, labels=(0, 7))
    message = refused()
    assert f"{case.rows}: row 2 has label '7'; `labels` knows 0, 1" in message
    assert "leave data.label out to answer without judging" in message


def test_an_empty_file_and_one_with_a_header_only(refused, case):
    for content in ("", "sentence\tlabel\n"):
        case.rows.write_text(content)
        assert refused() == f"{case.rows}: holds no rows"


def test_an_empty_text(refused, case):
    case.rows.write_text("sentence\tlabel\nfine\t1\n  \t0\n")
    assert f"{case.rows}: row 2: 'sentence' is empty" in refused()


def test_a_broken_encoding(refused, case):
    case.rows.write_bytes("sentence\tlabel\ncafé\t1\n".encode("latin-1"))
    assert f"{case.rows}: line 2 is not UTF-8" in refused()


def test_a_row_that_is_not_a_row(refused, case):
    case.rows.write_text("sentence\tlabel\na\tb\tc\n")
    assert f"{case.rows}: row 1 has 3 columns" in refused()


# the model


def test_a_model_that_is_not_there(refused, tmp_path):
    assert f"{tmp_path}/nothing: no such directory" in refused(f"model.path={tmp_path}/nothing")


def test_a_hub_id_without_a_hub(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "nobody-at-all/no-such-model: neither" in refused("model.path=nobody-at-all/no-such-model")


def test_truncated_weights(refused, case):
    weights = case.model / SINGLE
    whole = weights.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 8, 0):
        weights.write_bytes(whole[:kept])
        message = refused()
        assert str(weights) in message
        assert "truncated" in message


def test_an_index_that_names_a_missing_shard(refused, case):
    case.use("sharded")
    shard = sorted(case.model.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert f"{case.model / INDEX}: names the shard {shard.name}, which is not there" in refused()


@pytest.mark.parametrize("name", ["encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight", "encoder.final_layer_norm.weight"])
def test_a_weight_of_a_wrong_shape(refused, case, name):
    tensors = load_file(case.model / SINGLE)
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, case.model / SINGLE)
    message = refused()
    assert f"tensor {name} has shape {list(tensors[name].shape)}" in message
    assert "config.json asks for" in message


def test_a_missing_weight(refused, case):
    tensors = load_file(case.model / SINGLE)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, case.model / SINGLE)
    assert "encoder.final_layer_norm.weight" in refused()


def test_a_model_without_experts(refused, case):
    shutil.rmtree(case.model)
    save_switch(case.model, encoder_sparse_step=0, decoder_sparse_step=0)
    assert f"{case.model}: the model has no experts" in refused()


def test_a_model_of_another_family(refused, case):
    case.change_model_config(model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "model type 't5'" in refused()


def test_a_damaged_model_config(refused, case):
    (case.model / "config.json").write_text('{"model_type": ')
    assert str(case.model / "config.json") in refused()


def test_a_model_without_a_tokenizer(refused, case):
    """transformers makes one up, to which every word is unknown."""
    (case.model / "tokenizer.json").unlink()
    (case.model / "tokenizer_config.json").unlink()
    assert f"{case.model}: no usable tokenizer" in refused()


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}'])
def test_a_damaged_tokenizer(refused, case, content):
    (case.model / "tokenizer.json").write_text(content)
    assert f"{case.model}: no usable tokenizer" in refused()


def test_a_tokenizer_of_a_larger_vocabulary_than_the_models(refused, case):
    """Its token ids would be looked up beyond the end of the embeddings."""
    shutil.rmtree(case.model)
    save_switch(case.model, vocab_size=100)
    message = refused()
    assert str(case.model) in message
    assert "100" in message


def test_a_pickle_that_would_run_code(refused, case, tmp_path, monkeypatch):
    import torch

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-here",)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    (case.model / SINGLE).unlink()
    torch.save({"shared.weight": Attack()}, case.model / "pytorch_model.bin")
    assert f"{case.model / 'pytorch_model.bin'}: damaged, or holds more than tensors" in refused()
    assert not (tmp_path / "was-here").exists()


# the task


def test_labels_that_the_model_cannot_tell_apart(refused):
    assert "begin with the same token" in refused("labels={0: positive, 1: positive}")


def test_a_task_that_the_data_or_the_model_cannot_do(refused, case):
    assert "data.target" in refused("task=score")
    shutil.rmtree(case.model)
    save_switch(case.model, head=True, num_labels=3)
    assert "names 2 labels, the classification head" in refused()


# space


@pytest.mark.parametrize("budget", ["lots", "20 percent", "2TiBs", "nan", "", "%"])
def test_a_budget_that_is_none(refused, budget):
    message = refused(f"store.budget='{budget}'")
    assert f"store.budget: '{budget}'" in message
    assert '"20%"' in message or "between 0% and 100%" in message


@pytest.mark.parametrize("budget", ["-1", "-2GiB", "-5%", "101%"])
def test_a_budget_below_nothing_or_above_all(refused, budget):
    message = refused(f"store.budget={budget}")
    assert f"store.budget: '{budget}'" in message


def test_a_budget_larger_than_what_is_free(refused, monkeypatch):
    monkeypatch.setattr("pipeline.prepare.available_memory", lambda: 1000)
    message = refused("store.budget=50%")
    assert "store.budget: '50%' is " in message
    assert "bytes short" in message


def test_an_arena_larger_than_what_is_free(refused, case, monkeypatch):
    monkeypatch.setattr("pipeline.prepare.free_bytes", lambda directory: 1000)
    message = refused()
    assert str(case.root / "arenas") in message
    assert "1000 are free" in message
    assert "bytes short" in message


def test_a_store_directory_that_is_not_there(refused, tmp_path):
    assert f"store.directory: {tmp_path}/nowhere: no such directory" in refused(f"store.directory={tmp_path}/nowhere")


def test_a_file_that_would_lie_in_ram(refused):
    message = refused("store.backing=file", "store.directory=/dev/shm")
    assert "store.backing: file, but store.directory is /dev/shm, which is RAM; name a directory on a disk" in message


# the output directory


def test_an_output_directory_of_another_config(refused, case):
    run = OutputDir(parse(case.data | {"seed": 5}, "test"))
    run.start_anew("inputs")
    run.add({"batch": 0, "results": []})
    run.close()
    assert f"output_dir: {case.output} holds a run with seed = 5, this config has 0" in refused()


def test_an_output_directory_with_foreign_files(refused, case):
    case.output.mkdir(parents=True)
    (case.output / "thesis.txt").write_text("all of it")
    assert f"output_dir: {case.output} holds files that are not a run's" in refused()


def test_an_output_directory_in_use(refused, case):
    run = OutputDir(parse(case.data, "test"))
    assert "is being written by another run" in refused()
    run.close()


def test_a_relative_output_directory_in_a_submitted_job(refused, tmp_path, monkeypatch):
    (tmp_path / "_ray_pkg_0123").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_0123")
    assert "output_dir=/absolute/path" in refused("output_dir=runs/x")


# train


def test_training_what_is_not_trained_or_has_nowhere_to_go(refused):
    assert "predictor.kind: random is not trained" in refused(command="train")
    assert "predictor.path" in refused("predictor.kind=lstm", command="train")


def test_training_on_bad_data(refused, tmp_path):
    overrides = ["predictor.kind=lstm", f"predictor.path={tmp_path}/new.safetensors", "data.text=text"]
    assert "no column 'text'" in refused(*overrides, command="train")


@pytest.mark.parametrize("kind", ["lstm", "token_table"])
def test_training_on_one_row_which_cannot_be_split(refused, case, tmp_path, kind):
    write_tsv(case.rows, ["only one"])
    message = refused(f"predictor.kind={kind}", f"predictor.path={tmp_path}/new.safetensors", command="train")
    assert str(case.rows) in message


# bench


def test_a_bench_of_batches_that_need_tables_first(refused):
    assert "batch.order: 'overlap' needs tables before there are batches" in refused("batch.order=overlap", command="bench")


# plan


def test_planning_with_a_trace_that_is_none(refused, case, tmp_path):
    missing = tmp_path / "nothing.safetensors"
    assert f"{missing}: no such file" in refused(f"plan.trace={missing}", command="plan")
    weights = case.model / SINGLE
    assert f"{weights}: not a trace: `python runner.py train CONFIG` did not write it" in refused(
        f"plan.trace={weights}", command="plan"
    )


def test_planning_with_a_trace_of_another_model(refused, case, tmp_path):
    other, shape = tmp_path / "other.safetensors", RoutingShape((4, 4), (0, 0), 1, 100)
    layer = LayerTrace(np.zeros((2, 4), np.int16), np.zeros((2, 4), np.float16), np.zeros(2, np.float16))
    save(Trace(TokenBatch(((np.arange(2),),)), (layer, layer)), other, shape, "identity")
    message = refused(f"plan.trace={other}", command="plan")
    assert f"{other}: recorded from another model: its experts is [4, 4], this model's is [8, 8, 8]" in message


def test_planning_budgets_and_policies_that_are_none(refused):
    assert "plan.budgets: 'much' is not a budget" in refused("plan.budgets=[much]", command="plan")
    assert "plan.policies: there is no 'lur'; did you mean 'lru'?" in refused("plan.policies=[lur]", command="plan")


def test_planning_into_a_file(refused, case):
    assert f"output_dir: {case.rows}: File exists" in refused(f"output_dir={case.rows}", command="plan")


def test_planning_pickled_weights(refused, case, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (case.model / SINGLE).rename(case.model / "pytorch_model.bin")
    assert "its weights are pickled, and have no headers to plan with; `run` converts them once" in refused(command="plan")


# the command line itself


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "COMMAND"), (["rum", "x.yaml"], "'rum'"), (["run"], "are required: CONFIG.yaml\n")]
)
def test_a_command_line_that_is_none_exits_with_2(arguments, said, capfd):
    with pytest.raises(SystemExit) as stopped:
        runner.main(arguments)
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert "usage: runner.py" in err and said in err


def test_a_process_of_its_own_says_the_same_one_line(case):
    """In process, warnings and logging handlers could have gone elsewhere."""
    weights = case.model / SINGLE
    weights.write_bytes(weights.read_bytes()[:-1])
    case.path.write_text(yaml.safe_dump(case.data))
    before = case.files()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "runner.py", "run", str(case.path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {weights}: truncated")
    assert case.files() == before
