"""Which modules become one node of the graph, and which are looked into.

A leaf is an instance of exactly one of torch's own module classes with its own forward and no hooks, or what the user
names. Subclasses may compute anything, and hooks and parametrizations change what a class computes: they are traced
through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qgraph.errors import UserError, did_you_mean

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
_LEAF_PACKAGES = (
    "torch.nn.modules.",
    "torch.ao.nn.",
    "torch.ao.quantization.",
    "qgraph.nn.",
    "qgraph.capture.boundary.guard",
)


@dataclass(frozen=True)
class LeafRule:
    """Decides leaves.

    Args:
        classes: further classes whose instances are leaves.
        paths: module paths that are leaves.
    """

    classes: tuple[type[nn.Module], ...] = ()
    paths: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, module: nn.Module, path: str) -> bool:
        """Whether `module`, registered at `path`, is a leaf."""
        if path in self.paths or (self.classes and isinstance(module, self.classes)):
            return True
        if isinstance(module, torch.jit.ScriptModule):
            return True
        kind = type(module)
        return kind.__module__.startswith(_LEAF_PACKAGES) and not isinstance(module, _CONTAINERS) and _plain(module)


LeafChoice = type[nn.Module] | str


def leaf_rule(model: nn.Module, chosen: Iterable[LeafChoice] | LeafChoice) -> LeafRule:
    """The rule for the user's `leaf_modules`: classes, or paths of the model's modules, one or several.

    Raises:
        UserError: an entry is neither, or a path names no module of the model.
    """
    single = isinstance(chosen, (str, type, nn.Module)) or not isinstance(chosen, Iterable)
    classes: list[type[nn.Module]] = []
    paths: set[str] = set()
    entries: list[Any] = [chosen] if single else list(chosen)  # type: ignore[arg-type]
    known = _known_paths(model) if entries else {}
    for entry in entries:
        if isinstance(entry, str):
            if entry not in known:
                raise UserError(
                    f"leaf_modules names {entry!r}, which is no module of the model", fix=did_you_mean(entry, known)
                )
            paths.add(known[entry])
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            classes.append(entry)
        else:
            raise UserError(f"leaf_modules holds {entry!r}", fix="give module classes or module paths")
    return LeafRule(tuple(classes), frozenset(paths))


def _known_paths(model: nn.Module) -> dict[str, str]:
    """Every path of a module to the first path of the same module."""
    first_paths = {id(module): path for path, module in model.named_modules()}
    return {path: first_paths[id(module)] for path, module in model.named_modules(remove_duplicate=False) if path}


def _plain(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
