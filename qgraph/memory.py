"""Help for code that builds large object graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keeps Python's cyclic garbage collector from running.

    A graph of thousands of nodes is hundreds of thousands of objects that stay alive; each full collection on the way
    walks them all, which makes building a graph cost more per node the larger it grows.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
