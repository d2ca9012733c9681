"""Stable site names, given while the model runs.

    backbone.conv            the first call of a module
    backbone.conv(1)         its second call
    backbone._generated_add_0        the first add in one run of backbone.forward
    backbone._generated_add_0(1)     the same add when backbone runs again
    skip[add]                a call of a FloatFunctional's method

Functional names count within one run of the owner's forward, so that they do not depend on how often the owner ran.
In a dynamic block they count the calls of its code:

    backbone.camera._generated_add_0        the first add in the code of block `camera` of backbone's forward
    backbone.camera._generated_add_0(1)     the same add in the next iteration
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TypeAlias

import torch
from torch import nn

from qgraph.capture.model.source import is_user_code, user_line
from qgraph.capture.values.storage import storage_key
from qgraph.errors import UserError
from qgraph.ir.node_info import Repeated

_STANDARD_ATTRIBUTES = nn.Module().__dict__.keys()


CallPath: TypeAlias = tuple[tuple[CodeType, int], ...]  # the instructions of user code that lead to a call


@dataclass
class Scope:
    """One running forward: its module path and how often each function was called in it."""

    path: str
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class BlockRun:
    """One run of a dynamic block.

    Args:
        path: the block's path, such as `backbone.camera`.
        owner: path of the module whose forward it is in.
        frame: the frame that runs it, while it runs.
        calls: how often each call was reached in this run.
    """

    path: str
    owner: str
    frame: FrameType | None
    calls: Counter[tuple[str, CallPath]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Place:
    """Where in a dynamic block a call is."""

    run: BlockRun
    calls: CallPath


@dataclass
class SiteNames:
    """Names sites of one capture.

    Args:
        scopes: running forwards and blocks, the innermost last.
        used: how often each name was given.
        blocks: running dynamic blocks, the innermost last.
        repeats: site to what it shares with other iterations, for sites in dynamic blocks.
    """

    scopes: list[Scope] = field(default_factory=lambda: [Scope("")])
    used: Counter[str] = field(default_factory=Counter)
    blocks: list[BlockRun] = field(default_factory=list)
    repeats: dict[str, Repeated] = field(default_factory=dict)
    _runs: Counter[str] = field(default_factory=Counter)
    _anonymous: dict[tuple[str, CodeType, int], str] = field(default_factory=dict)
    _numbers: dict[str, dict[object, int]] = field(default_factory=dict)
    _loops: dict[str, str] = field(default_factory=dict)

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

    def enter_block(self, owner: str, name: str | None, frame: FrameType) -> None:
        """A dynamic block in the forward of the module at `owner` begins.

        Raises:
            UserError: a block of this name is running in the same forward.
        """
        outer = self.blocks[-1].path if self.blocks and self.blocks[-1].owner == owner else owner
        path = f"{outer}.{name or self._anonymous_name(owner, frame)}".lstrip(".")
        running = [run.path.removeprefix(owner).lstrip(".").split(".") for run in self.blocks if run.owner == owner]
        if any(name in parts for parts in running):
            raise UserError(
                f"the dynamic block {name!r} is inside another one of this name",
                where=str(user_line() or ""),
                why="calls in it would have the names of calls around it",
                fix="give the inner block a name of its own",
            )
        self.blocks.append(BlockRun(path, owner, frame))
        self._runs[path] += 1

    def leave_block(self) -> None:
        """It ends."""
        self.blocks.pop().frame = None

    def place(self) -> Place | None:
        """Where in a dynamic block the running call is; None outside of blocks."""
        return Place(self.blocks[-1], _calls_from(self.blocks[-1].frame)) if self.blocks else None

    def module_call(self, path: str, place: Place | None = None) -> str:
        """Site of a call of the module at `path`; `place` is where it was made, if not here."""
        place = place or self.place()
        site = self._numbered(path)
        if place is not None:
            self._note_repeat(site, path, path, self.owner, place)
        return site

    def function_call(self, function: str, place: Place | None = None) -> str:
        """Site of a functional call in the running forward."""
        place, scope = place or self.place(), self.scopes[-1]
        if place is not None and place.run.owner == scope.path:
            identity = self._identity(f"{place.run.path}._generated_{function}_", function, self.owner, place)
            site = self._numbered(identity)
            self.repeats[site] = Repeated(place.run.path, identity, site)
            return site
        position = scope.calls[function]
        scope.calls[function] += 1
        prefix = f"{scope.path}." if scope.path else ""
        base = f"{prefix}_generated_{function}_{position}"
        site = self._numbered(base)
        if place is not None:
            self._note_repeat(site, base, base, self.owner, place)
        return site

    def method_call(self, path: str, method: str, place: Place | None = None) -> str:
        """Site of a call of a `FloatFunctional`'s method."""
        return self.module_call(f"{path}[{method}]", place)

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the blocks that ran."""
        once = [
            f"dynamic block {path} ran once: give example inputs that run it more than once, or its calls are fused "
            "and given scales as if they were static code"
            for path, count in self._runs.items()
            if count == 1 and path not in self._loops
        ]
        return (*once, *self._loops.values())

    def _anonymous_name(self, owner: str, frame: FrameType) -> str:
        key = (owner, frame.f_code, frame.f_lasti)
        taken = sum(known[0] == owner for known in self._anonymous)
        return self._anonymous.setdefault(key, f"_dynamic_block_{taken}")

    def _note_repeat(self, site: str, base: str, function: str, owner: str, place: Place) -> None:
        identity = self._identity(f"{place.run.path}:{base}#", function, owner, place)
        self.repeats[site] = Repeated(place.run.path, identity, site)

    def _identity(self, prefix: str, function: str, owner: str, place: Place) -> str:
        """`prefix` and a number: the same one whenever the same code of the block makes the call."""
        run, calls = place.run, place.calls
        repetition = run.calls[function, calls]
        run.calls[function, calls] += 1
        if run.owner == owner:
            if repetition:
                self._note_loop(run, function, calls)
            repetition = 0
        numbers = self._numbers.setdefault(prefix, {})
        return f"{prefix}{numbers.setdefault((calls, repetition), len(numbers))}"

    def _note_loop(self, run: BlockRun, function: str, calls: CallPath) -> None:
        self._loops.setdefault(
            run.path,
            f"dynamic block {run.path} contains a loop that calls {function} at one place several times in one run of "
            f"the block ({_line(*calls[0]) if calls else ''}): put the `with` inside the loop, not around it",
        )

    def _numbered(self, base: str) -> str:
        count = self.used[base]
        self.used[base] += 1
        return base if count == 0 else f"{base}({count})"


def _calls_from(outermost: FrameType | None) -> CallPath:
    """The instructions of user code from a block's frame down to the running call."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_code(frame.f_code):
            found.append((frame.f_code, frame.f_lasti))
        if frame is outermost:
            break
        frame = frame.f_back
    return tuple(found)


def _line(code: CodeType, instruction: int) -> str:
    """File and line of an instruction."""
    found = next((line for start, end, line in code.co_lines() if start <= instruction < end), None)
    return f"{code.co_filename}:{found or code.co_firstlineno}"


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
