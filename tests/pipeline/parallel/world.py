"""Processes that are ranks: functions are sent to all of them by name, and run at the same time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class World:
    """Use as a context: leaving it ends the processes."""

    def __init__(self, ranks: int):
        spawn = multiprocessing.get_context("spawn")
        self._processes = [ProcessPoolExecutor(1, spawn, initializer=_one_thread) for _ in range(ranks)]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.shutdown()

    def __call__(self, function: Callable, arguments: list[tuple]) -> list[Any]:
        """Calls a function in the first processes, rank r's with `arguments[r]`; raises here what one of them raises."""
        asked = [process.submit(function, *given) for process, given in zip(self._processes, arguments, strict=False)]
        return [answer.result(timeout=120) for answer in asked]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
