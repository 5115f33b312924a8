"""A GPU's MoE layers at two ranks: kernels interpreted on a CPU, tokens through gloo, answers of the whole model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipeline.config import parse
from pipeline.data import Batch
from pipeline.models import ModelSpec, build
from pipeline.parallel.membership import MeetingPlace, Membership, leave
from pipeline.parallel.placement import EVERYWHERE, Assignment
from pipeline.prepare import prepare
from pipeline.routing import Expert
from pipeline.tasks.registry import Result, Task
from store.actor import ExpertStore
from store.arena import Arena
from tests.conftest import SENTENCES, answers, config_data, save_switch, write_tsv
from tests.pipeline.interpreted import Interpreter
from tests.pipeline.test_exactness import assert_equal_results


def answer(spec: ModelSpec, task: Task, path: Path, batch: Batch, membership: Membership) -> tuple[list[Result], list[list[int]]]:
    """A rank's forward, where every expert is read from the arena: its results, and the tokens served per MoE layer and expert."""
    from pipeline.gpu.layers import Counters, CurrentForward, DeviceExperts, DeviceForward

    cpu, arena = torch.device("cpu"), Arena.attach(path)
    assert arena is not None
    layers, begin = arena.layout.layers, arena.memory.data_ptr()
    counters, current, exchange = Counters(layers, cpu), CurrentForward(), membership.join(cpu)

    def experts(layer: int, stream: int, expert: Expert) -> DeviceExperts:
        table = torch.tensor([begin + layers[layer].expert_offset(e) for e in range(layers[layer].experts)])
        shape = expert.shape(layers[layer])
        return DeviceExperts(layer, stream, shape, table, (0, 1), counters, current, exchange=exchange)

    model = build(spec, arena, experts, cpu)
    inputs = task.inputs(batch, lambda longest: longest + 2)
    masks = [inputs["attention_mask"], inputs["decoder_attention_mask"]]
    current.forward = DeviceForward(masks, None, lambda layer, counts: None, lambda layer: False, lambda layer, in_part: None)
    try:
        with torch.inference_mode():
            outputs = task.forward(model, inputs)
            exchange.end()
    finally:
        leave()
        arena.close()
    return task.results(batch, outputs), counters.routed.tolist()


def test_device_layers_send_tokens_to_the_owners_and_count_what_they_serve(tmp_path):
    whole = save_switch(tmp_path / "model")
    (tmp_path / "arenas").mkdir()
    rows = write_tsv(tmp_path / "rows.tsv", SENTENCES[:4])
    prepared = prepare(parse(config_data(tmp_path / "model", rows, tmp_path / "arenas", tmp_path / "out"), "a test"))
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    owner = np.array([0, 1, 0, 1, EVERYWHERE, 1, 0, 1], dtype=np.int16)
    place = MeetingPlace(Assignment((owner,) * prepared.model.shape.layers, 2), timeout_s=120)
    given = [(prepared.model, prepared.task, prepared.arena, prepared.batches[r], place.membership(r)) for r in range(2)]
    with Interpreter() as first, Interpreter() as second, ThreadPoolExecutor(2) as both:
        said = list(both.map(lambda rank, arguments: rank(answer, *arguments), (first, second), given))
    for (results, _), batch in zip(said, prepared.batches, strict=True):
        assert_equal_results(results, answers(prepared.task, whole, batch))
    for rank, (_, routed) in enumerate(said):
        assert sum(map(sum, routed)) > 0
        assert not any(layer[expert] for layer in routed for expert in range(8) if owner[expert] == 1 - rank)
    assert store.close(False, patience_s=5)
