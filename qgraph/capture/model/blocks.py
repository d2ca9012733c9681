"""`Tracer.dynamic_block`: marks code whose call count varies, such as the body of a loop over cameras.

    for camera in cameras:
        with Tracer.dynamic_block(self, "camera"):
            fused = self.conv(camera) + fused

Outside of a capture a block does nothing. During one it is a scope: a call is known by the lines that lead to it from
the block, so that the same call of another iteration is the same site with another call number, and shares its
parameters, configuration and scale.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType

from torch import nn

from qgraph.capture.model.names import SiteNames
from qgraph.capture.model.source import is_user_code, user_line
from qgraph.errors import CaptureError, UserError

_RIGHT = 'with Tracer.dynamic_block(self, "name"):'


@dataclass(frozen=True)
class _Listener:
    """A running capture."""

    names: SiteNames
    paths: dict[int, str]
    owner: Callable[[], str]


class _Local(threading.local):
    """The capture that runs in this thread, if one does."""

    listener: _Listener | None = None
    refused: str | None = None


_LOCAL = _Local()


@contextmanager
def listening_blocks(names: SiteNames, paths: dict[int, str], owner: Callable[[], str]) -> Iterator[None]:
    """Blocks that this thread enters become scopes of `names`.

    Args:
        paths: identity to path of the model's modules.
        owner: path of the running module.
    """
    before, _LOCAL.listener = _LOCAL.listener, _Listener(names, paths, owner)
    try:
        yield
    finally:
        _LOCAL.listener = before


@contextmanager
def refusing_blocks(method: str) -> Iterator[None]:
    """Blocks that this thread enters are refused: a capture by `method` cannot tell which call is which."""
    before, _LOCAL.refused = _LOCAL.refused, method
    try:
        yield
    finally:
        _LOCAL.refused = before


class DynamicBlock:
    """One use of `Tracer.dynamic_block` as a context manager."""

    def __init__(self, module: nn.Module | None, name: str | None) -> None:
        self.module = module
        self.name = name
        self._entered: list[SiteNames] = []

    def __enter__(self) -> None:
        listener, refused = _LOCAL.listener, _LOCAL.refused
        if refused is not None:
            raise CaptureError(
                f"the capture method {refused} does not support dynamic blocks",
                where=str(user_line() or ""),
                why="its graph does not say which call of which line an operator comes from",
                fix='use method="jit" or "symbolic"',
            )
        if listener is None:
            return
        listener.names.enter_block(self._owner(listener), self.name, _calling_frame())
        self._entered.append(listener.names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:
            self._entered.pop().leave_block()

    def _owner(self, listener: _Listener) -> str:
        running = listener.owner()
        if self.module is None:
            return running
        path = listener.paths.get(id(self.module))
        if path is None or path != running:
            given = f"a {type(self.module).__name__} that is no part of the model" if path is None else _named(path)
            raise UserError(
                f"dynamic_block was given {given} in the forward of {_named(running)}",
                where=str(user_line() or ""),
                why="its first argument is the module whose forward is running",
                fix=f"write {_RIGHT}",
            )
        return path


class Tracer:
    """What a model's forward tells the capture about itself."""

    @staticmethod
    def dynamic_block(module: nn.Module | None = None, name: str | None = None) -> DynamicBlock:
        """A context manager around code that may run another number of times, or not at all, with other inputs.

        The `with` goes inside the loop. Calls in it are named `<module path>.<name>._generated_add_0`, the next
        iterations' `..._0(1)`, `..._0(2)`; the same line that calls the same function is the same site. Sites of one
        block share their scale over iterations. Give example inputs that run the block more than once.

        Args:
            module: the module whose forward is running: `self`.
            name: a constant name, unique per meaning in this module. Without it, a number that follows from the line.

        Raises:
            UserError: the arguments are something else, or blocks of one name are nested.
        """
        given: object = module
        if given is not None and not isinstance(given, nn.Module):
            what = f"the text {given!r}" if isinstance(given, str) else f"a {type(given).__name__}"
            raise UserError(
                f"the first argument of dynamic_block is {what}",
                where=str(user_line() or ""),
                why="a block belongs to the module whose forward is running",
                fix=f"write {_RIGHT}",
            )
        if name is not None and (not isinstance(name, str) or not name.isidentifier()):
            raise UserError(
                f"the name of a dynamic block is {name!r}",
                where=str(user_line() or ""),
                why="it becomes a part of site names",
                fix='give a constant name like "camera", made of letters, digits and underscores',
            )
        return DynamicBlock(module, name)


def _named(path: str) -> str:
    return f"the module {path}" if path else "the model itself"


def _calling_frame() -> FrameType:
    """The user's frame that runs the `with`."""
    frame: FrameType | None = sys._getframe(2)
    first = frame
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    found = frame or first
    assert found is not None
    return found
