"""Copies of a model: of its structure always, of its tensors only where somebody may write to them.

Copying a model's weights costs as much as running it. Recording therefore runs on a structure that shares the weights,
with every write to them refused at dispatch; a graph that is handed out gets tensors of its own at the end.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from qgraph.capture.model.names import plain_tensors, walk_modules
from qgraph.capture.values.storage import storage_key
from qgraph.errors import CaptureError

Convert = Callable[[torch.Tensor], torch.Tensor]

_IMMUTABLE = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
_TENSOR_TABLES = ("_parameters", "_buffers")


def copy_model(model: nn.Module, convert: Convert) -> nn.Module:
    """A copy of the model's structure in which every tensor `t` is `convert(t)`; ties between tensors are kept.

    Raises:
        CaptureError: a part of the model cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): convert(tensor) for tensor in _held_by(model)}
    try:
        clone = _copy_tree(model, memo)
        for _, module in walk_modules(clone):
            _rebind_closures(module, memo)
        return clone
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied",
            why=f"copy.deepcopy says: {type(error).__name__}: {error}",
            fix="make the model deepcopy-able; computed tensors kept as attributes are the usual obstacle",
        ) from error


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside parallel and compile wrappers, whose own forwards compute nothing."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return tensor


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype on the meta device."""
    return torch.empty_like(tensor, device="meta")


def with_own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with its own memory; parameters stay parameters."""
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def state_keeper(module: nn.Module) -> Callable[[], None]:
    """Remembers all tensors of `module`; the function returned puts them and their values back."""
    held: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = [
        (table, name, tensor, tensor.detach().clone())
        for child in module.modules()
        for table in (child._parameters, child._buffers, child.__dict__)
        for name, tensor in table.items()
        if isinstance(tensor, torch.Tensor)
    ]

    def restore() -> None:
        with torch.no_grad():
            for table, name, tensor, value in held:
                if tensor.shape == value.shape:
                    tensor.copy_(value)
                else:
                    tensor.data = value
                table[name] = tensor

    return restore


def own_tensors(gm: nn.Module, model: nn.Module) -> None:
    """Gives `gm` copies of the tensors it still shares with `model`."""
    borrowed = {storage_key(tensor) for tensor in _held_by(model)}
    clones: dict[int, torch.Tensor] = {}
    for _, module in walk_modules(gm):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for entries in tables:
            for name, tensor in entries.items():
                if not isinstance(tensor, torch.Tensor) or storage_key(tensor) not in borrowed:
                    continue
                if id(tensor) not in clones:
                    clones[id(tensor)] = with_own_memory(tensor)
                entries[name] = clones[id(tensor)]


def _held_by(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and plain tensor attributes of all modules."""
    walked = walk_modules(model)
    tables = (table for _, module in walked for table in (module._parameters, module._buffers))
    held = [tensor for table in tables for tensor in table.values() if tensor is not None]
    return held + [tensor for _, _, tensor in plain_tensors(walked)]


def _copy_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy(module, memo)`, which spends a quarter of a millisecond a module on empty hook tables."""
    known = memo.get(id(module))
    if known is not None:
        assert isinstance(known, nn.Module)
        return known
    inner = unwrapped(module)
    if inner is not module:
        memo[id(module)] = _copy_tree(inner, memo)
        return _copy_tree(inner, memo)
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules.") and _copies_its_own_way(kind):
        own = copy.deepcopy(module, memo)
        for name, value in module.__dict__.items():  # which the copies of a GraphModule lack
            if "_hooks" in name and isinstance(value, dict) and value and not own.__dict__.get(name):
                own.__dict__[name] = copy.deepcopy(value, memo)
        return own
    clone = memo[id(module)] = kind.__new__(kind)  # known before its parts are copied: a child may point back to it
    for name, value in module.__dict__.items():
        if name == "_modules":
            children = {key: None if child is None else _copy_tree(child, memo) for key, child in value.items()}
            clone.__dict__[name] = children
        elif name in _TENSOR_TABLES:
            clone.__dict__[name] = {key: None if t is None else memo[id(t)] for key, t in value.items()}
        elif name != "_compiled_call_impl":
            clone.__dict__[name] = value if type(value) in _IMMUTABLE else _copy_attribute(value, memo)
    return clone


def _copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE or (kind is tuple and _all_immutable(value)):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    plain = not value if kind in (dict, OrderedDict) else kind in (list, set) and _all_immutable(value)
    if not plain:
        return copy.deepcopy(value, memo)
    copied = memo[id(value)] = kind(value)
    return copied


def _rebind_closures(module: nn.Module, memo: dict[int, Any]) -> None:
    """Lets hooks and other functions kept on a copy see the copies of what they close over.

    `copy.deepcopy` keeps functions as they are: a hook that stores features on its model would go on storing them on
    the user's.
    """
    for name, value in module.__dict__.items():
        if type(value) is FunctionType:
            module.__dict__[name] = _rebound(value, memo, set())
        elif "_hooks" in name and value and isinstance(value, dict):
            for key, hook in value.items():
                if isinstance(hook, FunctionType):
                    value[key] = _rebound(hook, memo, set())


def _rebound(function: FunctionType, memo: dict[int, Any], seen: set[FunctionType]) -> FunctionType:
    """The function over the copies in `memo`; itself if it closes over nothing that was copied."""
    if function in seen or not function.__closure__:
        return function
    seen.add(function)
    cells = []
    for cell in function.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # nothing assigned yet
            cells.append(cell)
            continue
        known = _rebound(content, memo, seen) if isinstance(content, FunctionType) else memo.get(id(content), content)
        cells.append(cell if known is content else CellType(known))
    if all(new is old for new, old in zip(cells, function.__closure__, strict=True)):
        return function
    arguments = function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    bound = FunctionType(function.__code__, *arguments)
    bound.__kwdefaults__ = function.__kwdefaults__
    bound.__dict__.update(function.__dict__)
    return bound


def _copies_its_own_way(kind: type[nn.Module]) -> bool:
    return (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or getattr(kind, "__getstate__", None) is not getattr(nn.Module, "__getstate__", None)
        or kind.__setstate__ is not nn.Module.__setstate__
        or hasattr(kind, "__deepcopy__")
        or hasattr(kind, "__getnewargs__")
    )


def _all_immutable(values: Iterable[Any]) -> bool:
    return all(type(value) in _IMMUTABLE for value in values)
