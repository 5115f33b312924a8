"""What Python's garbage collector looks through while a process serves: not what is there for good.

A full collection looks at every object that there is. Importing torch and transformers makes some 380,000, and to look at them
takes 0.2 to 0.4 s, in which no other thread of the process runs Python: a batch of 9 ms that it falls into takes that much longer.
It comes seldom: up to Python 3.13 when a quarter as many new objects have lived for a while.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def spare_imports() -> None:
    """What is there is never looked at again. For a process that has not begun to work: what is garbage by now stays."""
    gc.freeze()


def spare_what_stands() -> None:
    """The same after what served for building has been thrown away. Quick, if imports are spared already."""
    gc.collect()
    gc.freeze()


@contextmanager
def spared() -> Iterator[None]:
    """What is there is not looked at for as long as this lasts: for a process that others use, too.

    Not within another, nor beside an Executor that is alone: the end of the first ends all.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
