"""aten's spellings as the calls users write: the same function of the same name, wherever the operator table knows it.

Overloads take their arguments in the order of torch's functions and methods, so a name is enough for most.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx

from qgraph.ir.op_table import OPS

Call: TypeAlias = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def users_spelling(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Kind, target and arguments of the call a user would write for a call of an aten overload.

    Args:
        target: the overload; what the operator table knows, or nobody, stays as it is.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return "call_function", target, args, kwargs
    special = _SPECIAL.get(str(target))
    if special is not None:
        return special(args, kwargs)
    if OPS.function(target) is not None:
        return "call_function", target, args, kwargs
    name = target._schema.name.removeprefix("aten::")
    for owner in (torch, F):
        function = getattr(owner, name, None)
        if function is not None and OPS.function(function) is not None:
            return "call_function", function, args, kwargs
    if OPS.method(name) is not None and args and isinstance(args[0], fx.Node):
        return "call_method", name, args, kwargs
    return "call_function", target, args, kwargs


def _slice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    value, dim, start, end, step = args + defaults[len(args) - 1 :]
    end = None if end == sys.maxsize else end
    if dim < 0:  # the rank is not known here
        return "call_function", torch.ops.aten.slice.Tensor, args, kwargs
    index = (*[slice(None)] * dim, slice(start or None, end, None if step == 1 else step))
    return "call_function", operator.getitem, (value, index), {}


def _index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    value, indices = args
    index = tuple(slice(None) if entry is None else entry for entry in indices)
    adjacent = [place for place, entry in enumerate(indices) if entry is not None]
    if adjacent != list(range(adjacent[0], adjacent[0] + len(adjacent))):
        return "call_function", torch.ops.aten.index.Tensor, args, kwargs
    return "call_function", operator.getitem, (value, index[0] if len(index) == 1 else index), {}


def _to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    kept = {name: value for name, value in kwargs.items() if name not in ("layout", "pin_memory") and value is not None}
    return "call_method", "to", args, kept


def _resized(mode: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Call]:
    aligns = mode in ("linear", "bilinear", "bicubic", "trilinear")

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        options = {"size": args[1], "scale_factor": args[-1], "mode": mode}
        if aligns and args[2]:
            options["align_corners"] = True
        given = {name: value for name, value in options.items() if value is not None}
        return "call_function", F.interpolate, args[:1], given

    return call


_SPECIAL: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], Call]] = {
    "aten.slice.Tensor": _slice,
    "aten.index.Tensor": _index,
    "aten.to.dtype_layout": _to,
    "aten.lift_fresh_copy.default": lambda args, kwargs: ("call_function", torch.clone, args, kwargs),
    "aten.upsample_linear1d.vec": _resized("linear"),
    "aten.upsample_bilinear2d.vec": _resized("bilinear"),
    "aten.upsample_bicubic2d.vec": _resized("bicubic"),
    "aten.upsample_trilinear3d.vec": _resized("trilinear"),
    "aten.upsample_nearest1d.vec": _resized("nearest"),
    "aten.upsample_nearest2d.vec": _resized("nearest"),
    "aten.upsample_nearest3d.vec": _resized("nearest"),
}
