"""A rehearsal on a GPU that is asked nothing until it has ended: from padded tokens to the few experts that a table names.

Shapes are few, and what comes again is a CUDA graph: launched piece by piece, a rehearsal would hold Python's lock for
longer than the Executor beside it takes for a small batch. It computes padding too, and says nothing of it.

For routers that choose one expert, and stand-ins whose products need no grouping by expert (`predictor.matrices.LowRank.each`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data import pad
from pipeline.gpu.recording import TRIES, closed, undisturbed
from pipeline.routing import Routing
from predictor.tokens import TokenBatch

FEW = 4
"""Tokens per row that are not padded further: a decoder that only begins."""
SHAPES = 32
"""Kept as graphs, the last used: each has memory of its own."""
Inputs = dict[str, torch.Tensor]
Key = tuple[Any, ...]


class NamedExperts:
    """Names the likeliest experts of every token (predictor.rehearsal.Name)."""

    def __init__(
        self,
        everywhere: Callable[[Inputs], list[Routing]],
        streams: Sequence[int],
        padding: int,
        stream: torch.cuda.Stream | None,
        device: torch.device,
    ):
        """
        Args:
            everywhere: a rehearsal of a padded batch, Routing.logits being logits.
            streams: of each MoE layer.
            stream: to run on; None: a CPU, where nothing is recorded.
        """
        self._everywhere, self._streams, self._padding = everywhere, streams, padding
        self._stream, self._device = stream, device
        self._seen: OrderedDict[Key, tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor] | None] = OrderedDict()
        """By shape, the last used at the end. None: it has been seen, and may be recorded when it comes again."""
        self._is_refused, self._failed = stream is None, 0

    @torch.inference_mode()
    def __call__(
        self, tokens: TokenBatch, temperatures: tuple[float, ...], top_k: int
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per MoE layer, of real tokens: experts, int16 (tokens, top_k), their probability and their weights, float32."""
        inputs = self._padded(tokens)
        with torch.cuda.stream(self._stream):
            said = self._run(inputs, temperatures, top_k).cpu().numpy()
        masks = [mask.numpy().reshape(-1) > 0 for name, mask in inputs.items() if name.endswith("attention_mask")]
        for stream, mask in enumerate(masks):  # rows that only fill up have a token each
            mask.reshape(-1, mask.size // len(inputs["input_ids"]))[len(tokens.streams[stream]) :] = False
        named, at = [], 0
        for stream in self._streams:
            part = said[:, at : at + masks[stream].size][:, masks[stream]]
            at += masks[stream].size
            named.append((part[0].astype(np.int16), part[1], part[2]))
        return named

    def _padded(self, tokens: TokenBatch) -> Inputs:
        """On the host."""
        inputs: Inputs = {}
        rows = more_rows(tokens.size)
        for stream, prefix in zip(range(len(tokens.streams)), ("", "decoder_"), strict=False):
            for name, tensor in zip(("input_ids", "attention_mask"), pad(tokens, stream, self._padding, wider), strict=True):
                filled = tensor.new_zeros(rows, tensor.shape[1])
                if name == "attention_mask":
                    filled[:, 0] = 1  # a row without any token would attend to nothing
                filled[: len(tensor)] = tensor
                inputs[prefix + name] = filled
        return inputs

    def _run(self, host: Inputs, temperatures: tuple[float, ...], top_k: int) -> torch.Tensor:
        shape = (*(tuple(tensor.shape) for tensor in host.values()), temperatures, top_k)
        again = shape in self._seen
        known = self._seen[shape] = self._seen.pop(shape, None)
        if len(self._seen) > SHAPES:
            self._seen.popitem(last=False)
        if known is None:
            inputs = {name: tensor.to(self._device) for name, tensor in host.items()}
            if self._is_refused or not again:
                return self._name(inputs, temperatures, top_k)
            known = self._seen[shape] = self._record(inputs, temperatures, top_k)
            if known is None:
                return self._name(inputs, temperatures, top_k)
        graph, inputs, said = known
        for name, tensor in host.items():
            inputs[name].copy_(tensor)
        graph.replay()
        return said

    def _record(
        self, inputs: Inputs, temperatures: tuple[float, ...], top_k: int
    ) -> tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor] | None:
        """None: this model asks the GPU something while it runs."""
        graph = torch.cuda.CUDAGraph()
        try:
            with undisturbed():
                torch.cuda.current_stream(self._device).synchronize()
                pool = torch.cuda.graph_pool_handle()  # its own: torch refuses one whose graphs are all gone
                graph.capture_begin(pool, capture_error_mode="thread_local")
                with closed([graph]):
                    said = self._name(inputs, temperatures, top_k)
        except RuntimeError as error:
            print(f"rehearsal without a CUDA graph: {str(error).splitlines()[0]}", flush=True)
            self._failed += 1
            self._is_refused = self._failed == TRIES  # other shapes would be, too
            return None
        self._failed = 0
        return graph, inputs, said

    def _name(self, inputs: Inputs, temperatures: tuple[float, ...], top_k: int) -> torch.Tensor:
        """float32 (3, positions of all MoE layers, top_k): experts, their probability, their weights."""
        said = []
        for routing, temperature in zip(self._everywhere(inputs), temperatures, strict=True):
            assert routing.logits is not None, "what has none is not said"
            p = (routing.logits / temperature).softmax(dim=-1)
            order = p.scatter(1, routing.chosen, p.gather(1, routing.chosen) + 2)
            best = order.topk(min(top_k, p.shape[1]), dim=1).indices
            weights = (best == routing.chosen) * routing.weights.float()
            layer = torch.stack([best.float(), p.gather(1, best), weights])
            if layer.shape[2] < top_k:  # a layer of few experts
                filled = layer.new_zeros(3, layer.shape[1], top_k)
                filled[0] = -1
                filled[:, :, : layer.shape[2]] = layer
                layer = filled
            said.append(layer)
        return torch.cat(said, dim=1)


def more_rows(rows: int) -> int:
    """To how many rows a rehearsal is filled up."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def wider(longest: int) -> int:
    """To how many tokens its rows are."""
    if longest <= FEW:
        return longest
    step = max(16, 2 ** ((longest - 1).bit_length() - 3))
    return -(-longest // step) * step
