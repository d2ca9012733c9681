"""The settings of the process while a capture runs, and its random states."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize

# The settings belong to the process; captures in several threads share them.
_lock = threading.Lock()
_running = 0
_before = (True, 0)


@contextmanager
def reproducible() -> Iterator[None]:
    """Numerics as a graph can reproduce them.

    Without the attention fast path, which computes in another order, and without the cache of `parametrize.cached()`,
    in which a second run would find what the first one computed.
    """
    global _before, _running
    with _lock:
        if not _running:
            _before = torch.backends.mha.get_fastpath_enabled(), parametrize._cache_enabled
            torch.backends.mha.set_fastpath_enabled(False)
            parametrize._cache_enabled = 0
        _running += 1
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                torch.backends.mha.set_fastpath_enabled(_before[0])
                parametrize._cache_enabled = _before[1]


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Puts the states of all random generators back, so that a capture draws nothing from the user's sequences."""
    restore: list[Callable[[], object]] = []
    python, cpu = random.getstate(), torch.get_rng_state()
    restore += [lambda: random.setstate(python), lambda: torch.set_rng_state(cpu)]
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(cuda))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        legacy = numpy.random.get_state()
        restore.append(lambda: numpy.random.set_state(legacy))
    try:
        yield
    finally:
        for action in restore:
            action()
