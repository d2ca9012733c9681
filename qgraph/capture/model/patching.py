"""Replacing a method of `nn.Module` while a capture runs, in its own thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Method = Callable[..., Any]


class ThreadPatch:
    """One method of `nn.Module` that running captures listen to.

    The class gets one replacement for all threads, and its own method back when the last capture ends, in whatever
    order they do.

    Args:
        name: the method.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._running = 0
        self._local = threading.local()
        self._original: Method = getattr(nn.Module, name)

    @contextmanager
    def listening(self, listener: Callable[[Method], Method]) -> Iterator[None]:
        """Calls of this thread go to `listener(original)`; one listener at a time."""
        with self._lock:
            if not self._running:
                self._original = getattr(nn.Module, self.name)
                setattr(nn.Module, self.name, self._dispatching(self._original))
            self._running += 1
        before = getattr(self._local, "method", None)
        self._local.method = listener(self._original)
        try:
            yield
        finally:
            self._local.method = before
            with self._lock:
                self._running -= 1
                if not self._running:
                    setattr(nn.Module, self.name, self._original)

    def _dispatching(self, original: Method) -> Method:
        local = self._local

        def method(*args: Any, **kwargs: Any) -> Any:
            return (getattr(local, "method", None) or original)(*args, **kwargs)

        return method
