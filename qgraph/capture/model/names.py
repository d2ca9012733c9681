"""Stable site names, given while the model runs.

    backbone.conv            the first call of a module
    backbone.conv(1)         its second call
    backbone._generated_add_0        the first add in one run of backbone.forward
    backbone._generated_add_0(1)     the same add when backbone runs again
    skip[add]                a call of a FloatFunctional's method

Functional names count within one run of the owner's forward, so that they do not depend on how often the owner ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from qgraph.capture.values.storage import storage_key

_STANDARD_ATTRIBUTES = nn.Module().__dict__.keys()


@dataclass
class Scope:
    """One running forward: its module path and how often each function was called in it."""

    path: str
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class SiteNames:
    """Names sites of one capture."""

    scopes: list[Scope] = field(default_factory=lambda: [Scope("")])
    used: Counter[str] = field(default_factory=Counter)

    @property
    def owner(self) -> str:
        """Path of the running module."""
        return self.scopes[-1].path

    def enter(self, path: str) -> None:
        """A module's forward begins."""
        self.scopes.append(Scope(path))

    def leave(self) -> None:
        """It ends."""
        self.scopes.pop()

    def module_call(self, path: str) -> str:
        """Site of a call of the module at `path`."""
        return self._numbered(path)

    def function_call(self, function: str) -> str:
        """Site of a functional call in the running forward."""
        scope = self.scopes[-1]
        position = scope.calls[function]
        scope.calls[function] += 1
        prefix = f"{scope.path}." if scope.path else ""
        return self._numbered(f"{prefix}_generated_{function}_{position}")

    def method_call(self, path: str, method: str) -> str:
        """Site of a call of a `FloatFunctional`'s method."""
        return self._numbered(f"{path}[{method}]")

    def _numbered(self, base: str) -> str:
        count = self.used[base]
        self.used[base] += 1
        return base if count == 0 else f"{base}({count})"


def walk_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """`root.named_modules()` as a list, without nested generators that hand every entry up level by level."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        prefix = f"{path}." if path else ""
        pending += [(prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None]
    return found


def module_paths(root: nn.Module) -> dict[int, str]:
    """`id(module)` to its first registered path; the root is the empty path."""
    return {id(module): path for path, module in walk_modules(root)}


def tensor_paths(root: nn.Module) -> dict[int, str]:
    """`id(tensor)` to its path, for parameters, buffers and plain tensor attributes; first name wins."""
    paths: dict[int, str] = {}
    walked = walk_modules(root)
    for path, module in walked:
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    paths.setdefault(id(tensor), prefix + name)
    for path, name, tensor in plain_tensors(walked):
        paths.setdefault(id(tensor), f"{path}.{name}" if path else name)
    return paths


def plain_tensors(walked: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, str, torch.Tensor]]:
    """Path, attribute name and value of the tensors that modules keep as plain attributes."""
    found = []
    for path, module in walked:
        attributes = module.__dict__
        for name in attributes.keys() - _STANDARD_ATTRIBUTES:
            value = attributes[name]
            if isinstance(value, torch.Tensor):
                found.append((path, name, value))
    return sorted(found, key=lambda entry: entry[:2])


def state_storages(root: nn.Module) -> dict[int, str]:
    """Storage identity to path, for every tensor a module holds: a write to one changes the model."""
    walked = walk_modules(root)
    held = [
        (f"{path}.{name}".lstrip("."), tensor)
        for path, module in walked
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    held += [(f"{path}.{name}".lstrip("."), tensor) for path, name, tensor in plain_tensors(walked)]
    keyed = {storage_key(tensor): path for path, tensor in reversed(held)}
    keyed.pop(0, None)  # tensors without storage have no identity to protect
    return keyed
