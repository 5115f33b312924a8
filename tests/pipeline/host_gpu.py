"""A GPU's device (pipeline.gpu.on_gpu) on the host: all of its code but CUDA's own, lanes in step with the caller.

The kernels' place is taken by plain torch that follows the same table of addresses (test_kernels.py has the kernels themselves). A
graph is stood in for by running the forward again: whole, or in a thread that stops at every boundary until the next piece or
part is replayed.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from pipeline.gpu.graphs import MASKS, Outputs, Recorded
from pipeline.gpu.layers import DeviceForward


class HostEvent:
    def __init__(self, stream: int):
        self.at = time.perf_counter()

    is_reached = True

    def synchronize(self) -> None:
        pass

    def ms_until(self, later: HostEvent) -> float:
        return (later.at - self.at) * 1e3


class HostGraphs:
    """Stands for pipeline.gpu.graphs.GraphedForward; see above."""

    refused: str | None = None

    def __init__(self, forward: Callable, inputs: dict, tables: Any, current: Any, pool: Any, stream: Any):
        self.inputs, self._tables, self._forward, self._current, self.pool = inputs, tables, forward, current, pool
        self.whole: Recorded | None = None
        self.pieces: Recorded | None = None

    def record(self, whole: bool, pieces: bool) -> bool:
        if HostGraphs.refused and (whole or pieces):
            raise RuntimeError(HostGraphs.refused)
        ahead = self._current.ahead
        if whole and self.whole is None:
            all_of = Outputs(torch.zeros(0), None, [], [])
            self.whole = Recorded([lambda: self._run(all_of, ahead, lambda layer: False)], [], all_of, [])
        if pieces and self.pieces is None:
            outputs = Outputs(torch.zeros(0), None, [], [])
            cut = Cut(lambda boundary: self._run(outputs, ahead, boundary))
            layers = len(self._layers())
            rest = [lambda: cut.go(False)] * layers
            parts = [lambda: cut.go(True)] * layers
            self.pieces = Recorded([cut.begin, *rest], parts, outputs, [])
        return False

    def _layers(self) -> list[int]:
        seen: list[int] = []
        self._run(Outputs(torch.zeros(0), None, [], []), None, lambda layer: bool(seen.append(layer)), dry=True)
        return seen

    def _run(self, outputs: Outputs, ahead: Any, boundary: Callable[[int], bool], dry: bool = False) -> None:
        kept = [(layer.cumulative_length.clone(), layer.keys.clone(), layer.values.clone()) for layer in self._cache()]
        outputs.counts.clear()
        inputs, tables = self.inputs, self._tables
        if dry:  # what is recorded reads nothing, and nothing may be there yet
            inputs, tables = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}, None
        masks = [inputs[name] for name in MASKS if name in inputs]
        now = DeviceForward(masks, tables, lambda layer, c: outputs.counts.append(c), boundary, lambda layer, in_part: None)
        self._current.forward, self._current.ahead = now, ahead
        with torch.inference_mode():
            new = Outputs.of(self._forward(inputs), now, outputs.counts)
            outputs.results, outputs.chosen = new.results, new.chosen
            if dry:
                for layer, (length, keys, values) in zip(self._cache(), kept, strict=True):
                    layer.cumulative_length.copy_(length), layer.keys.copy_(keys), layer.values.copy_(values)

    def _cache(self) -> list:
        step = getattr(self._forward, "__self__", None)  # else it is no step of a text that is written
        return step.cache.layers if step is not None else []


class HostKernels:
    """What layers.py asks of grouping.py and kernels.py, for experts whose gate and up are one part, with silu."""

    @staticmethod
    def group(experts: torch.Tensor, shape: Any) -> Any:
        known = torch.where((experts >= 0) & (experts < shape.experts), experts, shape.experts).reshape(-1)
        counts = torch.bincount(known, minlength=shape.experts + 1).to(torch.int32)
        served = torch.zeros(shape.experts, dtype=torch.bool)
        return SimpleNamespace(shape=shape, experts=known, counts=counts, served=served, address=[])

    @staticmethod
    def snapshot(groups, table, begin, end, routed, hits, last=True) -> None:
        in_slot = (table >= begin) & (table < end)
        before = groups.served.clone()
        now = ~before if last else ~before & in_slot
        groups.address = torch.where(now, table, 0).tolist()
        groups.served |= now
        routed.copy_(groups.counts[:-1])
        hits.copy_((groups.counts[:-1] > 0) & (before | in_slot))

    @staticmethod
    def room(hidden: torch.Tensor, groups: Any) -> torch.Tensor:
        return hidden.new_full((len(groups.experts), hidden.shape[1]), float("nan"))

    @staticmethod
    def run(hidden: torch.Tensor, weights: torch.Tensor, groups: Any, output: torch.Tensor) -> None:
        shape, top_k = groups.shape, weights.shape[1]
        output[groups.experts == shape.experts] = 0
        for expert, address in enumerate(groups.address):
            pairs = (groups.experts == expert).nonzero()[:, 0]
            if not address or not len(pairs):
                continue
            up = HostKernels.at(address + shape.up, (2 * shape.d_ff, shape.d_model), shape.dtype)
            down = HostKernels.at(address + shape.down, (shape.d_model, shape.d_ff), shape.dtype)
            gate, rest = (hidden[pairs // top_k] @ up.T).chunk(2, dim=1)
            output[pairs] = (torch.nn.functional.silu(gate) * rest) @ down.T * weights.reshape(-1)[pairs, None]

    @staticmethod
    def combine(output: torch.Tensor, top_k: int) -> torch.Tensor:
        return output.view(-1, top_k, output.shape[-1]).sum(dim=1)

    @staticmethod
    def at(address: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        count = shape[0] * shape[1]
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)


class Cut:
    """A forward in a thread of its own that goes on when it is told."""

    def __init__(self, run: Callable):
        self._run = run
        self._told, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._in_part = False
        self._broke: BaseException | None = None

    def begin(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()
        self._wait()

    def go(self, in_part: bool) -> None:
        self._in_part = in_part
        self._told.release()
        self._wait()

    def _wait(self) -> None:
        self._stopped.acquire()
        if self._broke:
            raise self._broke

    def _boundary(self, layer: int) -> bool:
        self._stopped.release()
        self._told.acquire()
        return self._in_part

    def _work(self) -> None:
        try:
            self._run(self._boundary)
        except BaseException as error:
            self._broke = error
        self._stopped.release()


@contextmanager
def host_gpu() -> Iterator[None]:
    """While it is entered, an Executor whose device is "cpu" has the code of a GPU under it."""
    import pipeline.executor
    from pipeline.gpu import layers, on_gpu, packed, replays
    from store import cuda

    lanes = threading.RLock()  # a copy waits for the kernels under way, as the copy lane does for a withdrawal behind them

    def store(address: int, value: int, stream: int) -> None:
        with lanes:
            ctypes.c_int64.from_address(address).value = value

    def copy(to: int, source: int, nbytes: int, stream: int) -> None:
        with lanes:
            ctypes.memmove(to, source, nbytes)

    def launch(graph: Callable[[], None], stream: int) -> None:
        with lanes:
            graph()

    host = {
        "context": lambda: 0, "use": lambda context: None, "register": lambda address, nbytes, device: address,
        "unregister": lambda address: None, "copy_to_device": copy, "store": store, "wait": lambda stream, event: None,
        "Event": HostEvent, "launch": launch,
    }  # fmt: skip
    torchs = {
        "set_device": lambda device: None, "init": lambda: None, "Stream": lambda *a: SimpleNamespace(cuda_stream=0, device=None),
        "stream": lambda stream: nullcontext(), "synchronize": lambda *a: None, "graph_pool_handle": object,
        "max_memory_allocated": lambda device: 0,
    }  # fmt: skip
    with (
        mock.patch.multiple(cuda, **host),
        mock.patch.multiple(torch.cuda, **torchs),
        mock.patch.object(packed, "pinned", lambda nbytes: torch.full((nbytes,), 255, dtype=torch.uint8)),
        mock.patch.object(replays, "GraphedForward", HostGraphs),
        mock.patch.object(on_gpu, "GraphedForward", HostGraphs),
        mock.patch.multiple(layers, grouping=HostKernels, kernels=HostKernels),
        mock.patch.object(pipeline.executor, "_make_device", on_gpu.OnGPU),
    ):
        yield
