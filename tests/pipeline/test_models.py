"""Models without their experts: which checkpoints are served, which are refused and how, and that no expert is ever made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.config import ModelConfig, parse
from pipeline.errors import USER_ERRORS, ModelError
from pipeline.executor import Executor
from pipeline.experts import Current, SlotExperts
from pipeline.models import build, describe, load_embedding
from pipeline.prepare import Prepared, prepare
from predictor.tokens import DECODER, ENCODER
from store.actor import ExpertStore
from store.arena import Arena
from store.checkpoint import INDEX, SINGLE
from store.copies import CopyEngine
from store.errors import CheckpointError
from store.eviction import POLICIES
from store.slots import Slots
from tests.conftest import VOCABULARY, answers, config_data, save_switch, write_tsv

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are tiny; two threads on busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint that nobody changes."""
    directory = tmp_path_factory.mktemp("models") / "switch"
    save_switch(directory)
    return directory


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """A copy of it to be changed."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


def refused(directory: Path, error: type[Exception] | tuple[type[Exception], ...] = ModelError) -> str:
    with pytest.raises(error) as raised:
        describe(ModelConfig(str(directory)), CPU)
    assert isinstance(raised.value, USER_ERRORS)
    message = str(raised.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


@contextmanager
def served(tmp_path: Path, directory: Path, **changes) -> Iterator[tuple[Prepared, Executor]]:
    (tmp_path / "arenas").mkdir(exist_ok=True)
    data = write_tsv(tmp_path / "data.tsv")
    prepared = prepare(parse(config_data(directory, data, tmp_path / "arenas", tmp_path / "out", **changes), "test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    executor = Executor(prepared.executor_spec(background=False))
    try:
        yield prepared, executor
    finally:
        executor.close()
        assert store.close(keep=False)


def assert_answers_as_transformers(tmp_path: Path, directory: Path) -> None:
    """Every batch of a small file, against the whole model as transformers itself loads it."""
    whole = SwitchTransformersForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with served(tmp_path, directory) as (prepared, executor), torch.inference_mode():
        for batch in prepared.batches:
            for mine, theirs in zip(executor.execute(batch, None).results, answers(prepared.task, whole, batch), strict=True):
                scale = max(1, *map(abs, theirs["scores"]))
                assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5 * scale)


# what is said of a model


def test_a_description_says_what_the_actors_must_know(published):
    spec, checkpoint = describe(ModelConfig(str(published)), CPU)
    assert spec.architecture == "SwitchTransformersForConditionalGeneration"
    assert spec.is_encoder_decoder
    assert spec.shape.experts == (8, 8, 8)
    assert spec.shape.streams == (ENCODER, ENCODER, DECODER)
    assert (spec.shape.top_k, spec.shape.vocab_size) == (1, VOCABULARY)
    assert spec.dtype == "float32"
    experts = {name for layer in spec.placement.experts for expert in layer for name in expert.values()}
    assert len(experts) == 3 * 8 * 2
    assert all(".experts." in name for name in experts)
    assert not any(".experts." in name for name in spec.placement.backbone)
    assert experts | set(spec.placement.backbone.values()) == checkpoint.tensors.keys()


@pytest.mark.parametrize("layout", [{}, {"head": True}, {"num_sparse_encoder_layers": 4, "num_experts": 3}])
def test_moe_layers_are_where_the_model_runs_them_and_in_that_order(tmp_path, layout):
    whole = save_switch(tmp_path / "model", **layout)
    spec, _ = describe(ModelConfig(str(tmp_path / "model")), CPU)
    ran = []
    for name, module in whole.named_modules():
        if hasattr(module, "experts") and hasattr(module, "router"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    inputs = {"input_ids": torch.tensor([[5, 6, 1]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    if spec.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0]])
    with torch.inference_mode():
        whole(**inputs)
    described = [layer[0]["wi"].partition(".experts.")[0] for layer in spec.placement.experts]
    assert described == ran
    assert [stream == DECODER for stream in spec.shape.streams] == [name.startswith("decoder") for name in ran]


# what is refused


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_model_of_a_family_without_experts_is_refused_by_its_name(tmp_path, family):
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "model")
    assert repr(family) in message
    assert "docs/models.md" in message


def test_a_switch_without_sparse_layers_is_refused(tmp_path):
    # a count of sparse layers of 0 is not enough: transformers then makes layer 1 sparse
    save_switch(tmp_path / "dense", encoder_sparse_step=0, decoder_sparse_step=0)
    assert "no experts" in refused(tmp_path / "dense")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model_type": "no-such-family"}', '{"model_type": "switch_transformers", "d_model": "wide"}'],
)
def test_a_damaged_config_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    assert "config.json" in refused(copy)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["logging"], ["T5ForConditionalGeneration"]])
def test_an_architecture_that_is_no_model_of_the_family_is_refused(copy, architectures):
    change_config(copy, architectures=architectures)
    refused(copy)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "shared.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "wrong shape"])
def test_a_tensor_that_is_missing_or_of_a_wrong_shape_is_refused_by_its_name(copy, name, damage):
    if damage == "missing":
        change_tensors(copy, lambda tensors: tensors.pop(name))
    else:
        change_tensors(copy, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    message = refused(copy, CheckpointError)
    assert name in message
    if damage == "wrong shape":
        whole = list(load_file(copy / SINGLE)[name].shape)
        assert f"shape {whole}" in message
        assert f"asks for {[whole[0] + 1, *whole[1:]]}" in message


@pytest.mark.parametrize(("key", "value"), [("num_experts", 16), ("num_experts", 4), ("d_ff", 64), ("vocab_size", 100)])
def test_a_config_that_is_not_the_checkpoints_is_refused(copy, key, value):
    change_config(copy, **{key: value})
    refused(copy, CheckpointError)


def test_a_truncated_file_and_an_index_that_names_a_missing_shard_are_refused(copy, tmp_path):
    whole = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(whole[:-5])
    assert "truncated" in refused(copy, CheckpointError)
    save_switch(tmp_path / "sharded", max_shard_size="500KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) >= 2
    shards[0].unlink()
    message = refused(tmp_path / "sharded", CheckpointError)
    assert INDEX in message
    assert shards[0].name in message


def test_a_model_whose_experts_compute_something_else_is_refused_rather_than_answered_wrong(tmp_path):
    """Switch's experts may have another activation than ReLU."""
    save_switch(tmp_path / "gelu", dense_act_fn="gelu_new")
    assert "'gelu_new'" in refused(tmp_path / "gelu")


# unusual checkpoints that are served


def test_embeddings_may_be_stored_under_the_encoders_name(copy, tmp_path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    change_tensors(copy, rename)
    assert "shared.weight" not in load_file(copy / SINGLE)
    assert_answers_as_transformers(tmp_path, copy)


def test_tied_tensors_may_be_stored_more_than_once(copy, tmp_path):
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"].clone()

    change_tensors(copy, repeat)
    assert_answers_as_transformers(tmp_path, copy)
    spec, _ = describe(ModelConfig(str(copy)), CPU)
    stored = [name for name in spec.placement.backbone if "embed_tokens" in name or name in ("shared.weight", "lm_head.weight")]
    assert stored == ["shared.weight"]  # and held once


def test_a_language_head_of_its_own_is_used(tmp_path):
    whole = save_switch(tmp_path / "untied", tie_word_embeddings=False)
    assert not torch.equal(whole.lm_head.weight, whole.shared.weight)
    assert_answers_as_transformers(tmp_path, tmp_path / "untied")
    change_tensors(tmp_path / "untied", lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refused(tmp_path / "untied", CheckpointError)


def test_routers_with_a_bias_are_served(tmp_path):
    save_switch(tmp_path / "biased", router_bias=True)
    assert_answers_as_transformers(tmp_path, tmp_path / "biased")


def test_a_sharded_checkpoint_is_served(tmp_path):
    save_switch(tmp_path / "sharded", max_shard_size="300KB")
    assert (tmp_path / "sharded" / INDEX).exists()
    assert_answers_as_transformers(tmp_path, tmp_path / "sharded")


# building


class Allocations(TorchDispatchMode):
    """The bytes of every storage met on the CPU but an arena's, by address."""

    def __init__(self, arena: Arena):
        super().__init__()
        self._arena = arena.memory.untyped_storage().data_ptr()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() != self._arena:
                    self.storages[storage.data_ptr()] = storage.nbytes()
        return result


def test_building_a_model_makes_neither_experts_nor_copies_of_the_backbone(tmp_path, published):
    with served(tmp_path, published) as (prepared, _):
        arena = Arena.attach(prepared.arena)
        slots = Slots(arena, 2, CPU)
        engine = CopyEngine(arena, slots, POLICIES["lru"](), background=False)
        with Allocations(arena) as allocations:
            model = build(prepared.model, arena, partial(SlotExperts, engine=engine, current=Current(), asks=False), CPU)
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        assert not [name for name in names if "expert" in name]
        assert [name for name in names if "router" in name]
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        block = prepared.layout.layers[0].block.nbytes
        assert sum(allocations.storages.values()) < block  # of 24 blocks and a backbone of 1 MiB
        memory = range(arena.memory.data_ptr(), arena.memory.data_ptr() + arena.memory.numel())
        assert all(parameter.data_ptr() in memory for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        engine.close()
        arena.close()


def test_the_backbone_is_the_checkpoints(tmp_path, published):
    whole = SwitchTransformersForConditionalGeneration.from_pretrained(published).state_dict()
    with served(tmp_path, published) as (_, executor):
        for name, tensor in executor._device.model.state_dict().items():
            assert torch.equal(tensor, whole[name]), name


def test_predictors_get_a_copy_of_the_input_embeddings(tmp_path, published):
    with served(tmp_path, published) as (prepared, _):
        embedding = load_embedding(prepared.arena, prepared.model.embedding)
    assert torch.equal(embedding, load_file(published / SINGLE)["shared.weight"])  # the arena is gone
    embedding.add_(1)


def test_weights_are_held_in_the_dtype_asked_for(tmp_path, published):
    for dtype in ("float32", "bfloat16", "float16"):
        spec, checkpoint = describe(ModelConfig(str(published), dtype), CPU)
        layout = spec.placement.layout(checkpoint)
        assert {part.dtype for part in layout.backbone} == {dtype}
        assert {part.dtype for part in layout.layers[0].block.parts} == {dtype}
    assert describe(ModelConfig(str(published), "auto"), CPU)[0].dtype == "float32"
    assert describe(ModelConfig(str(published), "auto"), torch.device("cuda"))[0].dtype == "float32"  # the checkpoint's own
