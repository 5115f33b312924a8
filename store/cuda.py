"""The few calls of CUDA's driver that torch has no name for, or too slow a one: registration, copies and stores by address, events.

The driver and not the runtime: a call that fails here, as registration may, leaves no error behind for torch's next call to find.
What returns at once is called without giving up Python's lock: the copy thread makes half a dozen such calls for every expert,
and to get the lock back from a thread that computes takes it longer than a copy. All addresses are plain integers. A context must
be current: torch has made one by `torch.cuda.init()` and a first allocation.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from ctypes import c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any, ClassVar

READ_ONLY = 0x08
PORTABLE = 0x01
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_READ_ONLY_SUPPORTED = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED


class CudaError(RuntimeError):
    """A call that CUDA's driver refused, by its own name for the reason."""


def context() -> int:
    """This thread's context, for `use` in another."""
    current = c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(current))
    return current.value or 0


def use(context: int) -> None:
    """Makes a context this thread's own: a new thread has none."""
    _call("cuCtxSetCurrent", context)


def register(address: int, nbytes: int, device: int, read_only: bool = True) -> int:
    """Makes host memory readable for the GPU, at the link's full speed; returns its address on the device.

    Args:
        read_only: the mapping cannot be written (an arena's never can).

    Raises:
        CudaError: no such memory, not supported, too much of it.
    """
    flags = PORTABLE
    if read_only:
        supported = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(supported), _READ_ONLY_SUPPORTED, device)
        if not supported.value:
            raise CudaError("this GPU cannot register read-only memory")
        flags |= READ_ONLY
    _check("cuMemHostRegister_v2", _driver().cuMemHostRegister_v2(c_void_p(address), c_size_t(nbytes), flags))
    there = c_uint64()
    try:
        _call("cuMemHostGetDevicePointer_v2", ctypes.byref(there), c_void_p(address), 0)
    except CudaError:
        unregister(address)
        raise
    return there.value


def unregister(address: int) -> None:
    """Before the memory is unmapped."""
    _check("cuMemHostUnregister", _driver().cuMemHostUnregister(c_void_p(address)))


def copy_to_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """From host memory, in the stream's order. Returns at once if the memory is registered or pinned."""
    _call("cuMemcpyHtoDAsync_v2", target, source, nbytes, stream)


def store(target: int, value: int, stream: int) -> None:
    """One aligned 8-byte store to device memory, in the stream's order and after all that came before it in the stream."""
    _call("cuStreamWriteValue64_v2", stream, target, value, 0)


def launch(graph: int, stream: int) -> None:
    """An instantiated graph (torch.cuda.CUDAGraph.raw_cuda_graph_exec): torch's `replay` without the state of random numbers."""
    _call("cuGraphLaunch", graph, stream)


def wait(stream: int, event: Event) -> None:
    """What is given to the stream from now on waits for the event."""
    _call("cuStreamWaitEvent", stream, event.handle, 0)


class Event:
    """A point in a stream, recorded when it is made."""

    _spare: ClassVar[defaultdict[int, list[c_void_p]]] = defaultdict(list)
    """By stream, what was made for events that are gone: to make one and to destroy it takes longer than all else with it."""

    def __init__(self, stream: int):
        self._stream = stream
        spare = self._spare[stream]
        if spare:
            self.handle = spare.pop()
        else:
            self.handle = c_void_p()
            _call("cuEventCreate", ctypes.byref(self.handle), 0)
        _call("cuEventRecord", self.handle, stream)

    def synchronize(self) -> None:
        """Blocks this thread, and no other, until the point is reached."""
        _check("cuEventSynchronize", _driver().cuEventSynchronize(self.handle))

    @property
    def is_reached(self) -> bool:
        status = _function("cuEventQuery")(self.handle)
        if status != _NOT_READY:
            _check("cuEventQuery", status)
        return not status

    def ms_until(self, later: Event) -> float:
        """Between two points that have been reached; negative if the other was first."""
        elapsed = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(elapsed), self.handle, later.handle)
        return elapsed.value

    def __del__(self) -> None:
        if self.handle:
            self._spare[self._stream].append(self.handle)


_ARGUMENTS = {
    "cuCtxSetCurrent": (c_void_p,),
    "cuEventQuery": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamWriteValue64_v2": (c_void_p, c_uint64, c_uint64, c_uint),
}
"""Of the calls that are made for every expert or layer: once these are known, plain integers need no wrapping."""


@cache
def _driver() -> ctypes.CDLL:
    """For calls that take their time: they give up Python's lock."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"no CUDA driver: {error}") from None


@cache
def _quick() -> ctypes.PyDLL:
    """The same for calls that return at once: they keep it."""
    _driver()
    return ctypes.PyDLL("libcuda.so.1")


@cache
def _function(name: str) -> Any:
    function = getattr(_quick(), name)
    function.argtypes = _ARGUMENTS.get(name)
    return function


def _call(name: str, *arguments: object) -> None:
    _check(name, _function(name)(*arguments))


def _check(name: str, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _quick().cuGetErrorName(status, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")
