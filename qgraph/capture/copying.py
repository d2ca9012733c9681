"""Copies of a model: of its structure always, of its tensors only where somebody may write to them.

Copying a model's weights costs as much as running it. Recording therefore runs on a structure that shares the weights,
with every write to them refused at dispatch; a graph that is handed out gets tensors of its own at the end.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qgraph.capture.names import plain_tensors
from qgraph.capture.taint import storage_key
from qgraph.errors import CaptureError

Convert = Callable[[torch.Tensor], torch.Tensor]

_IMMUTABLE = (int, float, bool, str, type(None), torch.dtype, torch.device)
_TENSOR_TABLES = ("_parameters", "_buffers")


def copy_model(model: nn.Module, convert: Convert) -> nn.Module:
    """A copy of the model's structure in which every tensor `t` is `convert(t)`; ties between tensors are kept.

    Raises:
        CaptureError: a part of the model cannot be copied.
    """
    held = [*model.parameters(), *model.buffers(), *(tensor for _, _, tensor in plain_tensors(model))]
    memo: dict[int, Any] = {id(tensor): convert(tensor) for tensor in held}
    try:
        return _copy_tree(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied",
            why=f"copy.deepcopy says: {type(error).__name__}: {error}",
            fix="make the model deepcopy-able; computed tensors kept as attributes are the usual obstacle",
        ) from error


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
    borrowed = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    borrowed |= {storage_key(tensor) for _, _, tensor in plain_tensors(model)}
    clones: dict[int, torch.Tensor] = {}
    for module in gm.modules():
        for table in _TENSOR_TABLES:
            entries = module.__dict__[table]
            for name, tensor in entries.items():
                if tensor is None or storage_key(tensor) not in borrowed:
                    continue
                if id(tensor) not in clones:
                    clones[id(tensor)] = with_own_memory(tensor)
                entries[name] = clones[id(tensor)]


def _copy_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy(module, memo)`, which spends a quarter of a millisecond a module on empty hook tables."""
    known = memo.get(id(module))
    if known is not None:
        assert isinstance(known, nn.Module)
        return known
    children = {name: None if child is None else _copy_tree(child, memo) for name, child in module._modules.items()}
    clone = _quick_clone(module, children, memo)
    if clone is None:
        return copy.deepcopy(module, memo)
    memo[id(module)] = clone
    return clone


def _quick_clone(module: nn.Module, children: dict[str, nn.Module | None], memo: dict[int, Any]) -> nn.Module | None:
    """A copy of a module whose own attributes are all plain; None for others."""
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules.") and _copies_its_own_way(kind):
        return None
    attributes: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in _TENSOR_TABLES:
            attributes[name] = {key: None if t is None else memo[id(t)] for key, t in value.items()}
        elif name == "_modules":
            attributes[name] = children
        elif isinstance(value, _IMMUTABLE) or (isinstance(value, tuple) and _all_immutable(value)):
            attributes[name] = value
        elif isinstance(value, list) and _all_immutable(value):
            attributes[name] = list(value)
        elif isinstance(value, torch.Tensor):
            attributes[name] = memo[id(value)]
        elif isinstance(value, (dict, set)) and not value:
            attributes[name] = type(value)() if type(value) in (dict, set, OrderedDict) else copy.copy(value)
        elif name == "_non_persistent_buffers_set":
            attributes[name] = set(value)
        else:
            return None
    clone = kind.__new__(kind)
    clone.__dict__.update(attributes)
    return clone


def _copies_its_own_way(kind: type[nn.Module]) -> bool:
    return (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__setstate__ is not nn.Module.__setstate__
        or hasattr(kind, "__deepcopy__")
        or hasattr(kind, "__getnewargs__")
    )


def _all_immutable(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _IMMUTABLE) for value in values)
