"""Models of random weights: from a config and a seed to the answers of plain transformers with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from pipeline.cluster import cluster
from pipeline.config import Config, ModelConfig, RandomConfig, load_config, parse
from pipeline.errors import USER_ERRORS, ModelError
from pipeline.executor import Executor
from pipeline.models import ModelSpec, describe
from pipeline.prepare import Prepared, prepare
from pipeline.run import run
from pipeline.tasks.classifier import SwitchTransformersForSequenceClassification
from pipeline.weights.recipes import RECIPES
from pipeline.weights.reference import named_tensors
from store.actor import ExpertStore
from store.random_weights import RandomTensor
from tests.conftest import ROOT, SENTENCES, TOKENIZER, answers, config_data, read_jsonl, switch_config, write_tsv

CPU = torch.device("cpu")
HEAD, TEXT_TO_TEXT = "SwitchTransformersForSequenceClassification", "SwitchTransformersForConditionalGeneration"


def model_json(path: Path, architecture: str = HEAD, **changes) -> Path:
    """The config of a tiny Switch Transformer, and nothing beside it."""
    settings = switch_config(expert_capacity=6, num_labels=2, **changes).to_dict() | {"architectures": [architecture]}
    path.write_text(json.dumps(settings))
    return path


def random_model(file: Path, seed: int = 0, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(config=str(file), dtype=dtype, random=RandomConfig("switch", seed), tokenizer=str(TOKENIZER))


def config(tmp_path: Path, file: Path, seed: int = 0, **changes) -> Config:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    data = config_data(file, write_tsv(tmp_path / "rows.tsv"), tmp_path / "arenas", tmp_path / "out", **changes)
    model = {"config": str(file), "dtype": "float32", "random": {"recipe": "switch", "seed": seed}, "tokenizer": str(TOKENIZER)}
    return parse(data | {"model": model}, "test")


def placed(prepared: Prepared) -> ExpertStore:
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    return store


def reference(spec: ModelSpec) -> transformers.PreTrainedModel:
    """The same model as transformers would be used by hand: built whole, then given every tensor by its name."""
    cls = SwitchTransformersForSequenceClassification if spec.architecture == HEAD else getattr(transformers, spec.architecture)
    whole = cls(spec.pretrained_config()).to(getattr(torch, spec.dtype))
    missing, unexpected = whole.load_state_dict(dict(named_tensors(spec)), strict=False)
    assert not unexpected
    assert set(missing) <= set(whole.all_tied_weights_keys)
    return whole.eval()


# the weights


@pytest.mark.parametrize("architecture", [HEAD, TEXT_TO_TEXT])
def test_the_switch_recipe_is_wide_in_embeddings_less_so_in_attention_and_narrow_elsewhere(tmp_path, architecture):
    spec, _ = describe(random_model(model_json(tmp_path / "m.json", architecture, router_bias=True)), CPU)
    seen = set()
    for name, tensor in named_tensors(spec):
        if tensor.dim() < 2:
            assert tensor.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
            continue
        wanted = 1.0 if name == "shared.weight" else 0.03 if "Attention" in name else 0.02
        assert tensor.std().item() == pytest.approx(wanted, rel=5 / (2 * tensor.numel()) ** 0.5), name
        assert abs(tensor.mean().item()) < 5 * wanted / tensor.numel() ** 0.5, name
        seen |= {part for part in name.split(".") if not part.isdigit()}
    parts = {"shared", "SelfAttention", "relative_attention_bias", "router", "experts", "wi", "wo"}
    assert parts | ({"classifier"} if architecture == HEAD else {"EncDecAttention"}) <= seen


def test_every_recipe_spreads_every_tensor_with_its_own_shape():
    for recipe in RECIPES.values():
        for name, shape in (("a.weight", (3, 4)), ("a.bias", (3,)), ("decoder.embed_tokens.weight", (5, 6))):
            spread = recipe(name, shape)
            assert isinstance(spread, RandomTensor)
            assert spread.shape == shape


@pytest.mark.parametrize("stored", ["float32", "bfloat16", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "tied"), [(HEAD, True), (TEXT_TO_TEXT, True), (TEXT_TO_TEXT, False)])
def test_the_arena_holds_what_transformers_is_given(tmp_path, arena_dir, architecture, tied, dtype, stored):
    file = model_json(tmp_path / "m.json", architecture, tie_word_embeddings=tied, dtype=stored)
    spec, weights = describe(random_model(file, dtype=dtype), CPU)
    store = ExpertStore(spec.placement.arena_path(weights, arena_dir), spec.source, spec.placement)
    store.open()
    by_hand = reference(spec).state_dict()
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in by_hand.values())
    assert by_hand["encoder.final_layer_norm.weight"].unique().tolist() == [1.0]
    arena = store._arena
    assert arena is not None
    compared = 0
    for name, tensor in arena.backbone().items():
        assert torch.equal(tensor, by_hand[name]), name
        compared += 1
    for i, layer in enumerate(spec.placement.experts):
        for e, names in enumerate(layer):
            views = arena.layout.layers[i].block.views(arena.block(i, e))
            assert all(torch.equal(views[part], by_hand[name]) for part, name in names.items())
            compared += len(names)
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} if tied else set()
    assert compared == len(by_hand.keys() - tied)
    assert store.close(keep=False)


def test_auto_is_the_configs_dtype_on_a_gpu_and_float32_on_a_cpu(tmp_path):
    file = model_json(tmp_path / "m.json", dtype="bfloat16")
    assert describe(random_model(file, dtype="auto"), CPU)[0].dtype == "float32"
    assert describe(random_model(file, dtype="auto"), torch.device("cuda"))[0].dtype == "bfloat16"


def test_seed_recipe_and_config_name_the_arena(tmp_path, arena_dir, monkeypatch):
    def path(file: Path, **changes) -> Path:
        spec, weights = describe(random_model(file, **changes), CPU)
        return spec.placement.arena_path(weights, arena_dir)

    file = model_json(tmp_path / "m.json")
    paths = [path(file), path(file, seed=1), path(file, dtype="bfloat16")]
    paths += [path(model_json(tmp_path / "d.json", dtype="bfloat16")), path(model_json(tmp_path / "e.json", num_experts=9))]
    assert path(file) == path(model_json(tmp_path / "copy.json")) == paths[0]
    monkeypatch.setitem(RECIPES, "switch", lambda name, shape: RandomTensor(shape, 0.0, 0.5))
    paths.append(path(file))
    assert len(set(paths)) == len(paths)


# the answers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [HEAD, TEXT_TO_TEXT])
@pytest.mark.parametrize("budget", ["0", "40%"])
def test_equals_transformers_with_the_same_weights(tmp_path, architecture, budget, dtype):
    file = model_json(tmp_path / "m.json", architecture, dtype=dtype)
    prepared = prepare(config(tmp_path, file, store={"budget": budget, "directory": str(tmp_path / "arenas")}))
    store, whole, rows = placed(prepared), reference(prepared.model), 0
    executor = Executor(prepared.executor_spec())
    for batch in prepared.batches:
        theirs = answers(prepared.task, whole, batch)
        for mine, other in zip(executor.execute(batch, None).results, theirs, strict=True):
            assert mine["index"] == other["index"]
            assert mine["scores"] == pytest.approx(other["scores"], abs=1e-5 * max(1, *map(abs, other["scores"])))
            rows += 1
    assert rows == len(SENTENCES)
    executor.close()
    assert store.close(keep=False)


def test_tokens_spread_over_many_experts(tmp_path):
    """Which is what the recipe is for."""
    prepared = prepare(config(tmp_path, model_json(tmp_path / "m.json", d_model=64, num_experts=32), batch={"size": 7}))
    whole, chosen = reference(prepared.model), []
    for module in whole.modules():
        if isinstance(module, SwitchTransformersSparseMLP):
            module.router.register_forward_hook(lambda m, i, o: chosen.append(o[0].sum(dim=(0, 1)).count_nonzero().item()))
    answers(prepared.task, whole, prepared.batches[0])
    assert len(chosen) == 2
    assert min(chosen) > 10


@pytest.mark.slow
def test_runs_through_ray_starts_warm_and_is_another_model_with_another_seed(tmp_path):
    file, keep = model_json(tmp_path / "m.json"), {"budget": "40%", "directory": str(tmp_path / "arenas"), "keep": True}
    with cluster(None):
        metrics = [run(config(tmp_path, file, store=keep, output_dir=str(tmp_path / name))) for name in ("cold", "warm")]
    assert [m["arena"]["warm_start"] for m in metrics] == [False, True]
    cold, warm = (read_jsonl(tmp_path / name / "predictions.jsonl") for name in ("cold", "warm"))
    assert [row["scores"] for row in cold] == [row["scores"] for row in warm]
    one, other = (prepare(config(tmp_path, file, seed, store=keep)) for seed in (0, 1))
    assert one.arena.exists() and not other.arena.exists(), "another seed would be another model"
    whole = reference(one.model)
    for row in (row for batch in one.batches for row in answers(one.task, whole, batch)):
        assert cold[row["index"]]["scores"] == pytest.approx(row["scores"], abs=1e-5)


def test_an_unfinished_run_is_of_other_inputs_once_its_config_is_changed(tmp_path):
    file = model_json(tmp_path / "m.json")
    first = prepare(config(tmp_path, file)).identity
    copy = Path(tmp_path / "copy.json")
    copy.write_text(file.read_text())
    assert prepare(config(tmp_path, copy)).identity == first
    file.write_text(json.dumps(json.loads(file.read_text()) | {"expert_capacity": 1}))
    changed = prepare(config(tmp_path, file))
    assert changed.identity != first  # fewer tokens reach their expert
    assert changed.arena == prepare(config(tmp_path, copy)).arena  # of the same weights


# what is refused


def refused(file: Path, tokenizer: Path = TOKENIZER) -> str:
    with pytest.raises(ModelError) as error:
        describe(ModelConfig(config=str(file), random=RandomConfig("switch"), tokenizer=str(tokenizer)), CPU)
    assert isinstance(error.value, USER_ERRORS)
    message = str(error.value)
    assert str(file) in message or str(tokenizer) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a model config"),
        ("[]", "not a model config"),
        ("{}", "not a model config"),
        ('{"model_type": "nothing-known"}', "not a model config"),
        ('{"model_type": "switch_transformers", "num_experts": "many"}', "not a model config"),
        ('{"model_type": "switch_transformers", "dtype": "nonsense"}', "not a model config"),
        ('{"model_type": "switch_transformers", "dtype": "int8"}', "dtype is torch.int8; it must be float32, bfloat16 or float16"),
        ('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}', "no experts that are served (model type 'gpt2', GPT2LM"),
        ('{"model_type": "switch_transformers"}', "architectures names 'none'"),
        ('{"model_type": "switch_transformers", "architectures": ["GPT2Model"]}', "architectures names 'GPT2Model'"),
    ],
)
def test_a_file_that_is_no_model_config_is_refused(tmp_path, content, said):
    file = tmp_path / "m.json"
    file.write_text(content)
    if "dtype" in content:
        file.write_text(json.dumps(json.loads(content) | {"architectures": [HEAD]}))
    assert said in refused(file)


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    assert "no such file; model.config names" in refused(tmp_path / "nothing.json")
    assert "no such file" in refused(tmp_path)
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\x00")
    assert "not a model config" in refused(tmp_path / "m.json")


def test_a_model_without_experts_or_of_another_activation_is_refused(tmp_path):
    no_experts = model_json(tmp_path / "m.json", num_sparse_encoder_layers=5, num_layers=4)  # transformers then makes none
    assert "no experts" in refused(no_experts)
    assert "dense_act_fn is 'gelu_new'" in refused(model_json(tmp_path / "m.json", dense_act_fn="gelu_new"))


def test_a_tokenizer_that_is_not_there_or_does_not_fit_is_refused(tmp_path):
    file = model_json(tmp_path / "m.json")
    assert "no such directory" in refused(file, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    settings = config(tmp_path, file).to_dict()
    with pytest.raises(ModelError, match="empty: no usable tokenizer"):
        prepare(parse(settings | {"model": settings["model"] | {"tokenizer": str(tmp_path / "empty")}}, "test"))
    small = model_json(tmp_path / "small.json", vocab_size=50)
    with pytest.raises(ModelError, match=r"the tokenizer gives token id \d+, .*small.json has a vocabulary of 50"):
        prepare(config(tmp_path, small))


def test_labels_that_are_not_the_heads_are_refused_by_the_configs_name(tmp_path):
    labels = {"0": "bad", "1": "good", "2": "so so"}
    with pytest.raises(USER_ERRORS, match=r"names 3 labels, the classification head of .*m\.json has 2"):
        prepare(config(tmp_path, model_json(tmp_path / "m.json"), labels=labels))


def test_an_arena_that_does_not_fit_is_refused_before_a_number_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.prepare.free_bytes", lambda directory: 100)
    monkeypatch.setattr("store.random_weights.RandomWeights.read_into", lambda *_: pytest.fail("made"))
    with pytest.raises(USER_ERRORS, match="bytes short"):
        prepare(config(tmp_path, model_json(tmp_path / "m.json")))


def test_a_stored_model_may_be_given_another_tokenizer(tmp_path, switch):
    directory, _ = switch()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert describe(ModelConfig(str(directory), tokenizer=str(TOKENIZER)), CPU)[0].tokenizer == TOKENIZER


# what is shipped


@pytest.mark.parametrize("experts", [8, 64, 128, 256])
def test_the_shipped_models_have_the_published_sizes(experts):
    model = random_model(ROOT / "configs" / "models" / f"switch-base-{experts}.json", dtype="bfloat16")
    spec, weights = describe(model, CPU)
    layout = spec.placement.layout(weights)
    assert spec.architecture == HEAD
    assert spec.pretrained_config().num_labels == 2
    assert spec.shape.experts == (experts,) * 6
    assert [layer[0]["wi"].split(".")[2] for layer in spec.placement.experts] == ["1", "3", "5", "7", "9", "11"]
    assert layout.slot_bytes == 2 * 768 * 3072 * 2
    assert layout.expert_bytes == 6 * experts * layout.slot_bytes  # 14.5 GB for 256


def test_the_shipped_run_of_a_random_model_wants_nothing_from_a_hub():
    config = load_config(ROOT / "configs" / "switch-base-8.yaml", [])
    assert (ROOT / (config.model.tokenizer or "")).is_dir()
    assert (ROOT / (config.model.config or "")).is_file()
    assert (ROOT / (config.data.path or "")).is_file()
