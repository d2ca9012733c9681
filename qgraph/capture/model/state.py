"""What a forward may change besides its result: random generators, and tensors kept on modules."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qgraph.capture.model.names import plain_tensors, walk_modules
from qgraph.capture.model.patching import ThreadPatch
from qgraph.capture.model.source import user_line
from qgraph.ir.node_info import SourceLine

_ASSIGNMENTS = ThreadPatch("__setattr__")
Assigned = Callable[[str, torch.Tensor | None, SourceLine | None], None]


def random_states() -> dict[str, object]:
    """The state of every random generator a forward may use by default."""
    states: dict[str, object] = {"Python": random.getstate()}
    generators = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        generators += torch.cuda.get_rng_state_all()
    states["torch"] = [state.numpy().tobytes() for state in generators]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state(legacy=True)
        states["numpy"] = (kind, keys.tobytes(), *rest)
    return states


@contextmanager
def watched_attributes(root: nn.Module, assigned: Assigned) -> Iterator[None]:
    """Calls `assigned` with path, new tensor and line for every tensor on a module that another has replaced."""
    before = _attributes(root)
    modules = {id(module): module for module in root.modules()}
    lines: dict[tuple[int, str], SourceLine | None] = {}

    def listener(original: Callable[..., None]) -> Callable[..., None]:
        def assign(module: nn.Module, name: str, value: object) -> None:
            if isinstance(value, torch.Tensor):
                lines[(id(module), name)] = user_line()
            original(module, name, value)

        return assign

    with _ASSIGNMENTS.listening(listener):
        yield
    for key, (path, old) in before.items():
        new = getattr(modules[key[0]], key[1], None)
        if new is not old:
            assigned(path, new if isinstance(new, torch.Tensor) else None, lines.get(key))


def _attributes(root: nn.Module) -> dict[tuple[int, str], tuple[str, torch.Tensor]]:
    found: dict[tuple[int, str], tuple[str, torch.Tensor]] = {}
    walked = walk_modules(root)
    for path, module in walked:
        for name, tensor in module._buffers.items():
            if tensor is not None:
                found[(id(module), name)] = (f"{path}.{name}".lstrip("."), tensor)
    modules = dict(walked)
    for path, name, tensor in plain_tensors(walked):
        found[(id(modules[path]), name)] = (f"{path}.{name}".lstrip("."), tensor)
    return found
