"""How fx should write a call that the recorder saw: kind of node, target, and arguments a graph can hold."""

from __future__ import annotations

import copy
import keyword
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qgraph.capture.model.source import calling_file

_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__neg__": operator.neg,
    "__pow__": operator.pow,
    "__mod__": operator.mod,
    "__floordiv__": operator.floordiv,
    "__matmul__": operator.matmul,
    "__abs__": operator.abs,
}

# Some methods are wrapped functions of another name: `Tensor.__pow__` calls itself `pow`.
_RENAMED = {
    value: name
    for name, value in vars(torch.Tensor).items()
    if callable(value) and getattr(torch.Tensor, getattr(value, "__name__", name), None) is not value
}

UNKNOWN = object()
_TENSOR_TYPE = type(torch.FloatTensor)
_KEPT = (float, complex, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


def name_of(func: Any) -> str:
    """The name users know a torch function by; of a property, the property's."""
    name = getattr(func, "__name__", "function")
    if name in ("__get__", "__set__"):
        return str(getattr(func.__self__, "__name__", name))
    return str(name)


def spelled(func: Any, name: str, args: Any) -> tuple[str, Any, tuple[Any, ...]]:
    """Node kind, target and arguments of a call."""
    args = tuple(args)
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        return _property(name, args)
    name = _RENAMED.get(func, name)
    if getattr(torch.Tensor, name, None) is not func:
        return "call_function", func, args
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    return ("call_method", name, args) if args else ("call_function", func, args)


def _property(name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    tensor = args[0]
    if name == "T" and tensor.dim() <= 2:
        return "call_method", "t", args
    if name == "T":
        return "call_method", "permute", (tensor, *reversed(range(tensor.dim())))
    if name == "mT":
        return "call_method", "transpose", (tensor, -2, -1)
    if name == "data":
        return "call_method", "detach", args[:1]
    return "call_function", getattr, (tensor, name)


def plain(value: Any) -> Any:
    """`value` as fx can write it into code; `UNKNOWN` if it cannot."""
    if isinstance(value, torch.SymInt):
        return UNKNOWN
    if isinstance(value, (bool, str)) or value is None or value is Ellipsis:
        return value
    if isinstance(value, int):
        return int(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, _TENSOR_TYPE):
        return f"{value.__module__}.{value.__name__}"
    return value if isinstance(value, _KEPT) else UNKNOWN


def holds_array(value: Any) -> bool:
    """Whether there is a numpy array among arguments."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_array, value))
    if isinstance(value, dict):
        return any(map(holds_array, value.values()))
    return type(value).__module__ == "numpy" and getattr(value, "ndim", 0) > 0


def is_shallow_copy(name: str) -> bool:
    """Whether `copy.copy` is taking a tensor apart, not somebody who wants its bytes."""
    return name == "__reduce_ex__" and calling_file() == copy.__file__


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor object with the same memory: what `copy.copy` makes."""
    return tensor.detach()


def importable(root: nn.Module, path: str) -> str:
    """`path` without Python's keywords, which fx cannot write into code: modules and tensors get a second name."""
    if not any(map(keyword.iskeyword, path.split("."))):
        return path
    owner, parts = root, []
    for name in path.split("."):
        parts.append(f"{name}_" if keyword.iskeyword(name) else name)
        value = getattr(owner, name)
        if parts[-1] != name and not hasattr(owner, parts[-1]):
            if isinstance(value, nn.Module):
                owner.__dict__[parts[-1]] = value  # not a child: a running Sequential would call it too
            else:
                setattr(owner, parts[-1], value)
        owner = value
    return ".".join(parts)
