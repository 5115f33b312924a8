"""What this machine has: cores, and GPUs with their memory, asked without touching them.

A question to CUDA would cost the asking process a context on the GPU, half a gigabyte of it; NVIDIA's management library answers
without. It is part of the driver, and read through ctypes: one structure of three numbers is no reason for a package.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def hardware(device: str) -> str:
    """A line for reports."""
    text = f"{platform.machine()}, {cores()} cores, {processor()}"
    return f"{torch.cuda.get_device_name(device)}; {text}" if device != "cpu" else text


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def free_device_memory() -> int | None:
    """Bytes free on the first GPU that CUDA_VISIBLE_DEVICES leaves; None: there is no GPU."""
    memory = _memory()
    return memory.free if memory is not None else None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _memory() -> _Memory | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if library.nvmlInit_v2():
        return None
    try:
        if visible.isdigit():
            failed = library.nvmlDeviceGetHandleByIndex_v2(int(visible), ctypes.byref(handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(handle))
        if failed or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return memory
    finally:
        library.nvmlShutdown()
