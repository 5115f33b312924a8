"""How well each word about the next token names its experts: `python -m pipeline.predicting.step_quality CONFIG`, of task score.

Every row of the second half is read as it would be written, token by token. What is compared: a token table counted on the first
half; what a row's earlier tokens were routed to (`recent`); both together, as `Foresight` joins them; a trained hash function, if
there is one; and the next layer's router, asked a layer early. A guess is the most probable so many experts.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.config import load_config
from pipeline.data import Batch
from pipeline.on_cpu import OnCPU
from pipeline.predicting.next_layer import NextLayer
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.prepare import prepare
from pipeline.stopping import stoppable
from predictor.hash_table import Width
from predictor.registry import make
from predictor.stepping import Foresight, TokenSource, source_of
from predictor.token_table import TokenTable
from predictor.tokens import ENCODER, TokenBatch
from predictor.traces import Trace, join
from store.actor import ExpertStore
from store.arena import Arena
from store.load import routers_identity

BEGIN = 32
"""Tokens of a row that are its prompt."""


class Recall:
    """Of one predictor: true experts among the first so many guessed, per MoE layer."""

    def __init__(self, layers: int, widths: tuple[int, ...]):
        self._widths = widths
        self._found = np.zeros((layers, len(widths)))
        self._all = np.zeros(layers)

    def add(self, layer: int, scores: np.ndarray, chosen: np.ndarray) -> None:
        """scores: (tokens, experts); chosen: (tokens, top_k)."""
        order = np.argsort(-scores, axis=1, kind="stable")
        for at, width in enumerate(self._widths):
            self._found[layer, at] += (order[:, :width, None] == chosen[:, None, :]).sum()
        self._all[layer] += chosen.size

    def line(self, name: str) -> str:
        shares = 100 * self._found / np.maximum(self._all, 1)[:, None]
        said = ["-" if not all_ else " / ".join(f"{x:.0f}" for x in row) for row, all_ in zip(shares, self._all, strict=True)]
        return f"| {name} | " + " | ".join(said) + " |"


def main(arguments: list[str]) -> None:
    config = load_config(Path(arguments[0]), arguments[1:])
    prepared = prepare(config)
    shape = prepared.model.shape
    store = ExpertStore(prepared.arena, prepared.model.source, prepared.model.placement)
    store.open()
    arena = Arena.attach(prepared.arena)
    assert arena is not None
    device = OnCPU(replace(prepared.executor_spec(background=False), slots=0), arena)
    ahead = NextLayer(device.model, shape.experts, shape.top_k)
    said: dict[int, np.ndarray] = {}

    def hear(layer: int, hidden: torch.Tensor) -> None:
        if layer + 1 < shape.layers:
            said[layer + 1] = ahead.scores(layer, hidden).float().numpy()

    device.current.ahead = hear
    rows = [Batch(i, np.array([i]), TokenBatch(((ids,),)), b.targets and (b.targets[at],)) for i, (b, at, ids) in enumerate(
        (b, at, ids) for b in prepared.batches for at, ids in enumerate(b.tokens.streams[ENCODER]) if len(ids) > BEGIN + 1
    )]  # fmt: skip
    traces: list[Trace] = []
    early: list[dict[int, np.ndarray]] = []
    with torch.inference_mode():
        for row in rows:
            said = {}
            work = device.prepare(row, None, shape.top_k)
            work.start()
            traces.append(Trace(row.tokens, tuple(work.answer().decisions)))
            early.append(said)
    half = len(rows) // 2
    table = TokenTable.fit(join(traces[:half]), shape, Width(shape.top_k))
    sources: dict[str, TokenSource | None] = {
        "token table": source_of(table),
        "recent": None,
        "token table and recent": source_of(table),
    }
    if config.predictor.kind == "lstm" and config.predictor.path is not None:
        spec = prepared.predictor_spec(routers_identity(prepared.weights, prepared.model.placement))
        trained = make(spec, ArenaModel(prepared.model, prepared.arena))
        sources |= {"hash function": source_of(trained), "hash function and recent": source_of(trained)}
    widths = (max(1, shape.top_k // 2), shape.top_k, shape.top_k * 3 // 2, shape.top_k * 2)
    recalls = {name: Recall(shape.layers, widths) for name in (*sources, "next layer's router")}
    for row, trace, heard in zip(rows[half:], traces[half:], early[half:], strict=True):
        _judge(row.tokens.streams[ENCODER][0], trace, heard, sources, recalls, shape)
    names = " | ".join(f"layer {layer + 1}" for layer in range(shape.layers))
    print(f"recall of the true {shape.top_k} among {', '.join(map(str, widths))} guessed, %; {len(rows) - half} rows")
    print(f"| | {names} |\n|" + "---|" * (shape.layers + 1))
    for name, recall in recalls.items():
        print(recall.line(name))
    device.close()
    arena.close()
    store.close(keep=False)


def _judge(ids: np.ndarray, trace: Trace, heard: dict, sources: dict, recalls: dict[str, Recall], shape) -> None:
    """One row, token by token behind its prompt."""
    chosen = [layer.top[:, : shape.top_k].astype(np.int64) for layer in trace.layers]
    prompt = TokenBatch(((ids[:BEGIN],),))
    everybody = np.ones(1, dtype=bool)
    for name, source in sources.items():
        alone = source is not None and "recent" not in name
        foresight = Foresight(shape, None if alone else source)
        foresight.begin(prompt, [layer[:BEGIN] for layer in chosen])
        if alone:
            source.begin(prompt)
        for at in range(BEGIN, len(ids)):
            token = ids[at : at + 1]
            likely = source.step(token, shape.layers) if alone else foresight.likely(token)
            for layer, scores in enumerate(likely):
                recalls[name].add(layer, scores, chosen[layer][at : at + 1])
            foresight.learn([layer[at : at + 1] for layer in chosen], everybody)
    for layer, scores in heard.items():
        recalls["next layer's router"].add(layer, scores[BEGIN:], chosen[layer][BEGIN:])


if __name__ == "__main__":
    sys.exit(stoppable(lambda: main(sys.argv[1:])))
