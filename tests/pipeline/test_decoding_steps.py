"""Writing with a GPU's code: tokens are those of transformers' `generate`, however steps run; all of them are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.executor import Executor
from pipeline.predicting.next_layer import NextLayer
from pipeline.tasks.generate import Generate
from pipeline.tasks.sampling import Sampling
from predictor.actor import timed
from predictor.nobody import Nobody
from predictor.registry import PredictorSpec
from predictor.tokens import TokenBatch
from tests.pipeline.test_families import Served
from tests.pipeline.tiny_families import save_tiny

NEW = 7
STOPS = (1,)


class Written(Generate):
    """Without a tokenizer."""

    def text(self, ids: list[int]) -> str:
        return ""


def task(stop: tuple[int, ...] = STOPS, **sampling) -> Written:
    return Written(Sampling(max_new_tokens=NEW, **sampling), 0, stop, None, None, None, Path("unused"), 0)


def batches(count: int = 3) -> list[Batch]:
    """Of three rows of unequal lengths."""
    rng = np.random.default_rng(0)
    lengths = [(9, 5, 3), (7, 8, 2), (4, 6, 8)][:count]
    return [Batch(i, np.arange(3), TokenBatch((tuple(rng.integers(3, 100, n) for n in many),))) for i, many in enumerate(lengths)]


def run_on_host(directory: str, arenas: str, share: float, kind: str | None, demand: bool, written: Written, **how) -> list[dict]:
    """All batches through a GPU's Executor, on the host; per batch what it wrote and what it counted."""
    from pipeline.gpu import replays  # needs Triton
    from tests.pipeline.host_gpu import HostGraphs, host_gpu

    replays.ASKED_ABOVE = how.get("asked_above", 0)
    HostGraphs.refused = how.get("refused")
    served = Served(Path(directory), Path(arenas))
    slots = int(share * served.layout.expert_bytes) // served.layout.slot_bytes
    with served.store(), host_gpu():
        spec = ExecutorSpec(served.spec, written, served.arena, slots, "lookahead", "cpu", 1, demand=demand)
        shape = served.spec.shape
        if kind is not None:
            spec = replace(spec, stepping=PredictorSpec(kind, None, shape.top_k, shape, "any"))
        executor = Executor(spec)
        executor.ready()
        if share < 1:  # else they are being filled
            executor._device.engine.slots.memory.fill_(255)  # NaN
        try:
            nobody = Nobody(shape)
            done = [executor.execute(batch, timed(nobody, batch.tokens)) for batch in batches()]
        finally:
            executor.close()
    return [
        {"ids": [row["token_ids"] for row in d.results], "how": d.stats.how, "hits": d.stats.hits, "misses": d.stats.misses,
         "copied": d.stats.prefetch_bytes + d.stats.demand_bytes, "read": d.stats.read_in_place_bytes,
         "steps": len(d.stats.token_ms)}
        for d in done
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen") / "model"
    cls = save_tiny("qwen3_moe", directory)
    return directory, cls.from_pretrained(directory, dtype=torch.float32).eval()


def expected(whole, written: Written) -> list[list[list[int]]]:
    """Each row alone, as transformers writes it."""
    said = []
    for batch in batches():
        rows = []
        for ids in batch.tokens.streams[0]:
            with torch.inference_mode():
                out = whole.generate(
                    torch.from_numpy(ids)[None], max_new_tokens=NEW, do_sample=False, eos_token_id=list(written.stop)
                )
            rows.append(out[0, len(ids) :].tolist())
        said.append(rows)
    return said


WAYS = {
    "pieces": (0.3, "recent", False, {}, "pieces"),
    "whole, in place": (0.3, "recent", False, {"asked_above": 2**40}, "whole"),
    "whole, nothing predicted": (0.3, None, False, {}, "whole"),
    "whole, no slots": (0.0, None, False, {}, "whole"),
    "complete": (1.0, None, False, {}, "whole"),
    "on demand": (0.3, None, True, {}, "pieces"),
    "refused": (0.3, "recent", False, {"refused": "no capture\nof this"}, "eager: not recordable: no capture"),
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_write_what_transformers_does(tmp_path, model, way):
    directory, whole = model
    share, kind, demand, how, ran = WAYS[way]
    (tmp_path / "arenas").mkdir()
    done = run_on_host(str(directory), str(tmp_path / "arenas"), share, kind, demand, task(), **how)
    assert [d["ids"] for d in done] == expected(whole, task())
    ways = {name for d in done for name in d["how"]}
    assert ran in ways
    assert ways <= {ran, "eager: a prompt", "eager: first of its shape"}


def test_recorded_steps_are_kept_as_far_as_there_is_room_for_their_caches(tmp_path, model, monkeypatch):
    """The step under way in any case; and each is counted before its cache is there."""
    from pipeline.gpu import replays
    from pipeline.gpu.replays import Recording
    from tests.pipeline.host_gpu import HostGraphs, host_gpu

    monkeypatch.setattr(HostGraphs, "refused", None)
    (tmp_path / "arenas").mkdir()
    served = Served(model[0], tmp_path / "arenas")
    with served.store(), host_gpu():
        executor = Executor(ExecutorSpec(served.spec, task(), served.arena, 0, "lookahead", "cpu", 1))
        try:
            executor.execute(batches()[0], timed(Nobody(served.spec.shape), batches()[0].tokens))
            kept = executor._device.replays
            ((rows, most),) = kept._fixed
            one, layers = kept.cache_bytes, kept._fixed[rows, most].step.cache.layers
            assert one == sum(tensor.numel() * 4 for layer in layers for tensor in (layer.keys, layer.values)) > 0
            kept.fixed(rows, 2 * most)
            assert len(kept._fixed) == 2 and kept.cache_bytes == 3 * one
            monkeypatch.setattr(replays, "KEPT_BYTES", 5 * one)
            kept.fixed(rows, 3 * most)
            assert [*kept._fixed] == [(rows, 2 * most), (rows, 3 * most)]
            kept.fixed(rows, 6 * most)
            assert [*kept._fixed] == [(rows, 6 * most)] and kept.cache_bytes == 6 * one
            pools = [kept.recorded(Recording(kept._fixed[rows, 6 * most].step, None, None)).pool for _ in range(2)]
            assert pools[0] is not pools[1], "torch refuses a pool for good once all that was recorded in it is gone"
        finally:
            executor.close()


def test_all_steps_are_counted(tmp_path, model):
    """Without slots every use is a miss, and every miss is an expert's bytes."""
    directory, _ = model
    (tmp_path / "arenas").mkdir()
    done = run_on_host(str(directory), str(tmp_path / "arenas"), 0.0, None, False, task(stop=()))
    for d in done:
        assert d["steps"] == NEW - 1
        assert sum(d["hits"]) == 0
        assert min(d["misses"]) > NEW * 2, "a step of three rows uses more than two experts"
        assert d["copied"] == 0
        assert d["read"] > 0


def test_rows_that_are_done_use_no_experts(tmp_path, model):
    directory, whole = model
    free = expected(whole, task(stop=()))
    stop = tuple({row[0] for rows in free for row in rows[1:]})
    early, late = (task(stop=stop), task(stop=()))
    used = []
    for number, written in enumerate((early, late)):
        (tmp_path / f"arenas{number}").mkdir()
        done = run_on_host(str(directory), str(tmp_path / f"arenas{number}"), 0.0, None, False, written)
        assert [d["ids"] for d in done] == expected(whole, written)
        used.append(sum(sum(d["misses"]) for d in done))
    assert used[0] < used[1]


def test_on_a_cpu_what_is_said_ahead_is_copied_ahead(tmp_path):
    """By the rows' past for the first two layers, by the layer before for the others."""
    directory = tmp_path / "model"
    whole = save_tiny("qwen3_moe", directory, num_hidden_layers=4).from_pretrained(directory, dtype=torch.float32).eval()
    said = {}
    for kind in ("recent", None):
        arenas = tmp_path / f"arenas-{kind}"
        arenas.mkdir()
        served = Served(directory, arenas)
        shape = served.spec.shape
        spec = ExecutorSpec(served.spec, task(), served.arena, 12, "lookahead", "cpu", 1, background=False)
        if kind is not None:
            spec = replace(spec, stepping=PredictorSpec(kind, None, shape.top_k, shape, "any"))
        with served.store():
            executor = Executor(spec)
            done = [executor.execute(batch, timed(Nobody(shape), batch.tokens)) for batch in batches()]
            executor.close()
        assert [[row["token_ids"] for row in d.results] for d in done] == expected(whole, task())
        said[kind] = sum(d.stats.prefetch_bytes for d in done)
    assert said["recent"] > said[None] == 0


def test_wrong_words_ahead_change_no_token(tmp_path, model, monkeypatch):
    """The predictor and the next layer's router name what is least likely."""
    from predictor.stepping import Foresight

    directory, whole = model
    monkeypatch.setattr(NextLayer, "scores", lambda self, layer, hidden, right=NextLayer.scores: -right(self, layer, hidden))
    likely = Foresight.likely
    monkeypatch.setattr(Foresight, "likely", lambda self, tokens: [1 - layer for layer in likely(self, tokens)])
    (tmp_path / "arenas").mkdir()
    done = run_on_host(str(directory), str(tmp_path / "arenas"), 0.3, "recent", False, task())
    assert [d["ids"] for d in done] == expected(whole, task())


def test_the_next_layers_router_is_asked_of_the_second_layer_and_later(tmp_path):
    """What it names are the best of its own scores, and padding names nobody."""
    cls = save_tiny("qwen3_moe", tmp_path / "model", num_hidden_layers=4)
    (tmp_path / "arenas").mkdir()
    served = Served(tmp_path / "model", tmp_path / "arenas")
    whole = cls.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with served.store():
        executor = Executor(ExecutorSpec(served.spec, task(), served.arena, 0, "lru", "cpu", 1, background=False))
        executor.ready()
        ahead = NextLayer(executor._device.model, served.spec.shape.experts, 4)
        executor.close()
    assert ahead.reaches_all
    assert [ahead.reaches(layer) for layer in range(4)] == [False, True, True, False]
    hidden, real = torch.randn(5, 32), torch.tensor([True, True, False, True, False])
    best = (hidden[real] @ whole.model.layers[3].mlp.gate.weight.T).topk(2, dim=-1).indices
    assert ahead.named(2, hidden, real).tolist() == [*torch.bincount(best.reshape(-1), minlength=8).tolist(), 2 * 2]
