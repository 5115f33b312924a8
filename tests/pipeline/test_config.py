"""The config: every key can be set, in the file and on the command line; the rest is refused in one line that names it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, PredictorConfig, load_config, parse
from pipeline.errors import ConfigError
from tests.conftest import ROOT

MINIMAL = {"model": {"path": "somewhere"}, "data": {"path": "rows.tsv"}, "labels": {"0": "bad", "1": "good"}}
SPECIAL = {
    "plan.policies": ["fifo", "lru"],
    "bench.placements": ["greedy", "round_robin"],
    "model.path": "another",
    "data.path": "another.tsv",
    "predictor.kind": "token_table",
    "store.policy": "fifo",
    "store.budget": "30%",
    "labels": {"no": "bad", "yes": "good", "unsure": "so so"},
    "train.holdout": 0.25,
}
"""Keys whose values are checked beyond their type."""

NOT_ALONE = ("model.config", "model.random.recipe", "parallel.placement", "parallel.replicas", "parallel.trace")
"""Keys of a model of random weights, and of experts that are shared out, which have tests of their own."""


def leaves(cls: type = Config, at: str = "") -> list[tuple[str, typing.Any]]:
    """(dotted key, type) of everything that can be set."""
    found = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{at}{field.name}"
        found += leaves(hints[field.name], f"{key}.") if dataclasses.is_dataclass(hints[field.name]) else [(key, hints[field.name])]
    return found


LEAVES = dict(leaves())


def members(hint: typing.Any) -> list:
    """The types that a hint allows."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def other_values(key: str, now: typing.Any) -> list:
    """A legal value of every type that a key allows, none of them the one that it has."""
    if key in SPECIAL:
        return [SPECIAL[key]]
    values = []
    for hint in members(LEAVES[key]):
        if typing.get_origin(hint) is typing.Literal:
            values += typing.get_args(hint)
        elif typing.get_origin(hint) is list:
            values.append(["one", "two"] if hint == list[str] else [3, 1])
        else:
            values.append({str: "another", int: 7, float: 0.75, bool: not now, type(None): None}[hint])
    return [value for value in values if value != now]


def write(tmp_path: Path, data: dict | str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def with_value(key: str, value: typing.Any) -> dict:
    data = json.loads(json.dumps(MINIMAL))
    *parents, last = key.split(".")
    inner = data
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return data


def value_at(config: Config, key: str) -> typing.Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def refused(tmp_path: Path, data: dict | str, *overrides: str) -> str:
    path = write(tmp_path, data)
    with pytest.raises(ConfigError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", [key for key in LEAVES if key not in NOT_ALONE])
def test_every_key_can_be_set_in_the_file_and_on_the_command_line(tmp_path, key):
    values = other_values(key, value_at(parse(MINIMAL, "test"), key))
    assert values
    for value in values:
        from_file = load_config(write(tmp_path, with_value(key, value)), [])
        assert value_at(from_file, key) == value
        from_override = load_config(write(tmp_path, MINIMAL), [f"{key}={json.dumps(value)}"])
        assert value_at(from_override, key) == value
        assert from_file == from_override


@pytest.mark.parametrize("key", LEAVES)
def test_a_value_of_a_wrong_type_is_refused_with_the_key_the_value_and_what_it_must_be(tmp_path, key):
    kinds = members(LEAVES[key])
    wrong: list = [["a", 5], 2.5, {"a": {"b": 1}}, True, 3, "nonsense", None]
    if str in kinds:
        wrong.remove("nonsense")
    if int in kinds or key in ("store.budget", "predictor.stand_ins.budget"):
        wrong.remove(3)
    if float in kinds:
        wrong.remove(2.5)
        wrong.remove(3)
    if bool in kinds:
        wrong.remove(True)
    if type(None) in kinds:
        wrong.remove(None)
    if key == "labels":
        wrong = [value for value in wrong if not isinstance(value, dict)]
    for value in wrong:
        message = refused(tmp_path, with_value(key, value))
        assert str(tmp_path / "config.yaml") in message
        assert f"{key!r} is {value!r}; it must be " in message


def test_a_section_that_is_no_section_is_refused(tmp_path):
    for value in (3, "x", [1], None):
        assert "store must hold keys" in refused(tmp_path, MINIMAL | {"store": value})


def test_what_a_key_must_be_is_said_in_words(tmp_path):
    assert "it must be one of classify, score" in refused(tmp_path, with_value("task", "clasify"))
    assert "it must be a whole number or null" in refused(tmp_path, with_value("data.limit", "ten"))
    assert "it must be a whole number or 'auto'" in refused(tmp_path, with_value("predictor.lookahead", "some"))
    assert "it must be text or a list of text" in refused(tmp_path, with_value("data.text", 4))
    assert "it must be a list of whole numbers" in refused(tmp_path, with_value("bench.batch_sizes", ["8"]))
    assert "it must be true or false" in refused(tmp_path, with_value("store.keep", "perhaps"))
    assert "it must be a number" in refused(tmp_path, with_value("train.lr", "fast"))


@pytest.mark.parametrize(
    ("key", "near"),
    [("modle", "model"), ("bacth", "batch"), ("output_dirs", "output_dir"), ("predictor.knd", "predictor.kind"),
     ("store.bugdet", "store.budget"), ("train.epoch", "train.epochs"), ("data.txt", "data.text"),
     ("batch.max_token", "batch.max_tokens")],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, key, near):
    for message in (refused(tmp_path, with_value(key, 1)), refused(tmp_path, MINIMAL, f"{key}=1")):
        assert f"unknown key {key!r}; did you mean {near!r}?" in message


def test_an_unknown_key_that_is_near_nothing_is_refused_with_all_known_ones(tmp_path):
    message = refused(tmp_path, with_value("batch.xyzzy", 1))
    assert "known: size, max_tokens, order" in message
    assert "unknown key '5'" in refused(tmp_path, MINIMAL | {5: 1})


def test_an_unknown_key_is_told_before_what_takes_seconds_is_imported():
    script = (
        "import sys\n"
        "for heavy in ('torch', 'ray', 'transformers'): sys.modules[heavy] = None  # an import of it fails\n"
        "import runner\n"
        "sys.exit(runner.main(['run', 'configs/quickstart.yaml', 'stroe.budget=1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: configs/quickstart.yaml: unknown key 'stroe'; did you mean 'store'?\n"


@pytest.mark.parametrize("key", ["model", "data", "model.path", "data.path"])
def test_a_key_without_which_nothing_runs_is_missed_by_its_name(tmp_path, key):
    data = json.loads(json.dumps(MINIMAL))
    *parents, last = key.split(".")
    inner = data[parents[0]] if parents else data
    del inner[last]
    message = refused(tmp_path, data)
    assert f"{key!r} is missing" in message or "must hold keys" in message


def test_what_is_not_set_has_its_default(tmp_path):
    assert load_config(write(tmp_path, MINIMAL), []) == parse(MINIMAL, "test")


def test_overrides_reach_into_sections_and_the_last_one_wins(tmp_path):
    path = write(tmp_path, with_value("store.budget", "5%"))
    config = load_config(path, ["store.budget=10%", "store.keep=true", "batch.size=3", "store.budget=15%"])
    assert (config.store.budget, config.store.keep, config.batch.size) == ("15%", True, 3)
    assert path.read_text() == yaml.safe_dump(with_value("store.budget", "5%"))


def test_an_override_creates_the_section_that_the_file_lacks_or_leaves_empty(tmp_path):
    assert "predictor" not in MINIMAL
    assert load_config(write(tmp_path, MINIMAL), ["predictor.top_k=9"]).predictor.top_k == 9
    empty = yaml.safe_dump(MINIMAL) + "predictor:\n"
    assert load_config(write(tmp_path, empty), ["predictor.top_k=9"]).predictor.top_k == 9


@pytest.mark.parametrize(("given", "chosen", "named"), [(None, 1, 3), (None, 8, 8), (2, 4, 2)])
def test_tables_name_no_fewer_experts_than_a_router_chooses_unless_told_to(given, chosen, named):
    assert PredictorConfig(top_k=given).named(chosen) == named


def test_values_of_overrides_are_yaml(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL),
        ["data.text=[a, b]", "data.limit=null", "data.prefix='x = y: '", "labels={0: bad, 1: good, 2: mixed}", "store.budget=0"],
    )
    assert config.data.text == ["a", "b"]
    assert config.data.limit is None
    assert config.data.prefix == "x = y: "
    assert list(config.labels) == ["0", "1", "2"]
    assert config.store.budget == "0"


@pytest.mark.parametrize("override", ["store.budget", "", "=5", "store"])
def test_an_override_without_key_or_value_is_refused_with_an_example(tmp_path, override):
    assert "an override is written key.path=value" in refused(tmp_path, MINIMAL, override)


def test_an_override_that_goes_through_a_value_is_refused(tmp_path):
    assert "path holds a value, not keys" in refused(tmp_path, MINIMAL, "model.path.deep=1")
    assert "'x={': the value is not YAML" in refused(tmp_path, MINIMAL, "x={")
    assert "unknown key 'store.'" in refused(tmp_path, MINIMAL, "store..budget=1")


@pytest.mark.parametrize(("written", "read"), [("0", "0"), ("1048576", "1048576"), ("20%", "20%"), ("2GiB", "2GiB"), ("'0'", "0")])
def test_a_budget_may_be_a_number_of_bytes(tmp_path, written, read):
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + f"store: {{budget: {written}}}\n")
    assert load_config(path, []).store.budget == read
    assert load_config(write(tmp_path, MINIMAL), [f"store.budget={written}"]).store.budget == read


def test_labels_may_be_written_as_numbers_and_keep_their_order(tmp_path):
    data = "model: {path: m}\ndata: {path: d.tsv}\nlabels: {2: two, 0: nought, -1: less, x: text}\n"
    assert list(load_config(write(tmp_path, data), []).labels.items()) == [
        ("2", "two"), ("0", "nought"), ("-1", "less"), ("x", "text"),
    ]  # fmt: skip
    assert load_config(write(tmp_path, data), ["labels.0=zero"]).labels["0"] == "zero"


def test_labels_that_yaml_takes_for_true_and_false_are_refused_rather_than_renamed(tmp_path):
    """`labels: {0: no, 1: yes}` is {0: False, 1: True} to YAML: the model would be asked for other words."""
    head = "model: {path: m}\ndata: {path: d.tsv}\n"
    for labels in ("{0: no, 1: yes}", "{no: negative, yes: positive}"):
        assert "quote" in refused(tmp_path, head + f"labels: {labels}\n")
    quoted = load_config(write(tmp_path, head + "labels: {0: 'no', 1: 'yes'}\n"), [])
    assert quoted.labels == {"0": "no", "1": "yes"}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("batch.size", "batch.max_tokens", "predictor.top_k", "predictor.lookahead", "data.limit",
                              "train.epochs", "train.batch_size", "train.hidden", "train.top_t", "train.lr",
                              "bench.rounds", "bench.batches") for value in (0, -3)]
    + [("train.holdout", 0), ("train.holdout", 1), ("train.holdout", -0.1), ("train.holdout", float("nan")),
       ("train.ce_weight", -1), ("train.ce_weight", float("nan")), ("train.lr", float("nan")), ("train.lr", float("inf")),
       ("data.text", []), ("data.text", ["a"] * 4), ("model.random.seed", -1),
       ("bench.batch_sizes", [4, 0]), ("bench.recall", 1.5), ("bench.recall", -0.1),
       ("parallel.replicas", -1), ("parallel.timeout_s", 0), ("parallel.timeout_s", float("inf")),
       ("labels", {}), ("labels", {"0": "only"}), ("seed", -1), ("seed", 2**70)],
)  # fmt: skip
def test_an_impossible_value_is_refused_with_its_key(tmp_path, key, value):
    message = refused(tmp_path, with_value(key, value))
    assert f"{key!r}" in message


RANDOM = MINIMAL | {"model": {"config": "model.json", "random": {"recipe": "switch", "seed": 3}, "tokenizer": "words"}}


def test_a_model_of_random_weights_has_a_config_a_recipe_and_a_tokenizer(tmp_path):
    config = load_config(write(tmp_path, RANDOM), ["model.random.seed=4"]).model
    assert (config.path, config.config, config.tokenizer) == (None, "model.json", "words")
    assert (config.random.recipe, config.random.seed) == ("switch", 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.path=somewhere", "'model' has a path and a config"),
        ("model.config=null", "'model.path' is missing; or, for random weights, 'model.config'"),
        ("model.random={}", "'model.random.recipe' is missing; known: switch"),
        ("model.random.recipe=swich", "model.random.recipe: there is no 'swich'; did you mean 'switch'?"),
        ("model.tokenizer=null", "'model.tokenizer' is missing"),
        ("model.random=null", "model.random must hold keys"),
    ],
)
def test_a_model_that_is_neither_stored_nor_random_is_refused(tmp_path, override, said):
    assert said in refused(tmp_path, RANDOM, override)


def test_a_stored_model_is_given_no_recipe(tmp_path):
    assert "'model.random' goes with 'model.config'" in refused(tmp_path, MINIMAL, "model.random.recipe=switch")


def test_a_config_may_name_data_that_it_does_not_have(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["data.path=null", "data.hub=nyu-mll/glue sst2 validation"])
    assert (config.data.path, config.data.hub) == (None, "nyu-mll/glue sst2 validation")


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [("predictor.kind", "lsmt", "lstm"), ("store.policy", "lfru", "lru"), ("parallel.placement", "greed", "greedy")],
)
def test_an_unknown_kind_or_policy_is_refused_with_the_nearest_known_one(tmp_path, key, value, near):
    assert f"{key}: there is no {value!r}; did you mean {near!r}?" in refused(tmp_path, with_value(key, value))
    assert "known: " in refused(tmp_path, with_value(key, "zzzzzz"))


@pytest.mark.parametrize(("key", "value", "near"), [("plan.policies", "lfru", "lru"), ("bench.placements", "greed", "greedy")])
def test_so_is_one_in_a_list(tmp_path, key, value, near):
    assert f"{key}: there is no {value!r}; did you mean {near!r}?" in refused(tmp_path, with_value(key, [value]))


SHARED = MINIMAL | {"executors": 2, "parallel": {"placement": "greedy", "replicas": 1, "trace": "trace.safetensors"}}


def test_experts_can_be_shared_out_over_executors(tmp_path):
    config = load_config(write(tmp_path, SHARED), ["parallel.placement=anti_correlation"])
    assert (config.executors, config.parallel.placement, config.parallel.replicas) == (2, "anti_correlation", 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["executors=1"], "'parallel.placement' shares experts out, and 'executors' is 1"),
        (
            ["parallel.placement=null"],
            "'parallel.replicas' is about experts that are shared out; it goes with 'parallel.placement'",
        ),
        (["parallel.placement=null", "parallel.replicas=0"], "'parallel.trace' is about experts that are shared out"),
    ],
)
def test_what_goes_with_shared_experts_is_refused_without(tmp_path, overrides, said):
    assert said in refused(tmp_path, SHARED, *overrides)


def test_scoring_needs_no_labels(tmp_path):
    data = {key: value for key, value in MINIMAL.items() if key != "labels"} | {"task": "score"}
    assert load_config(write(tmp_path, data), []).labels == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "NoneType"), ("[1, 2]", "list"), ("just text", "str"), ("model: {path: m\n", "not YAML"), ("a: b: c", "not YAML"),
     ("model: !!python/object/apply:os.getcwd []", "not YAML")],
)  # fmt: skip
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_bytes(b"model: {path: \xff\xfe}\n")
    inside = tmp_path / "broken.yaml" / "config.yaml"  # a file where a directory should be
    for path in (tmp_path / "nothing.yaml", tmp_path, tmp_path / "broken.yaml", inside):
        with pytest.raises(ConfigError) as error:
            load_config(path, [])
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    load_config(path, [])
    assert path.read_text().startswith("#"), "a shipped config opens with what it is for"


def test_there_are_shipped_configs():
    assert ROOT / "configs" / "quickstart.yaml" in SHIPPED


def test_a_config_goes_to_json_and_back():
    config = parse(MINIMAL | {"batch": {"size": 7}, "data": {"path": "d.tsv", "text": ["a", "b"]}}, "test")
    assert parse(json.loads(json.dumps(config.to_dict())), "test") == config
