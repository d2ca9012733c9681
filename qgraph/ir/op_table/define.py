"""How entries of the operator table are written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qgraph.ir.op import Fixed, Function, Op, OpKind, OpTable, Spelling

OPS = OpTable()

aten = torch.ops.aten
Target = Function | str


def _by_spelling(*items: Target | tuple[Target, Spelling]) -> dict[Any, Spelling]:
    pairs = [item if isinstance(item, tuple) else (item, Spelling()) for item in items]
    return dict(pairs)


def define(
    name: str,
    kind: OpKind,
    example: Callable[..., object],
    operands: str = "input",
    *,
    target: Function | None = None,
    spelled: tuple[Target | tuple[Target, Spelling], ...] = (),
    in_place: tuple[Target | tuple[Target, Spelling], ...] = (),
    modules: Mapping[type[nn.Module], Mapping[str, str | Fixed]] | tuple[type[nn.Module], ...] = (),
    **more: Any,
) -> Op:
    """Defines an operator; `example` is never called, it only shows parameters and defaults."""
    spellings = _by_spelling(*spelled)
    entry = Op(
        name=name,
        kind=kind,
        signature=inspect.signature(example),
        operands=tuple(operands.split()),
        target=target,
        functions={key: value for key, value in spellings.items() if not isinstance(key, str)},
        methods={key: value for key, value in spellings.items() if isinstance(key, str)},
        in_place=_by_spelling(*in_place),
        modules=modules if isinstance(modules, Mapping) else {module: {} for module in modules},
        **more,
    )
    return OPS.define(entry)


def args(
    names: str,
    *,
    ignored: str = "",
    packed: str | None = None,
    renamed: Mapping[str, str] | None = None,
    unless: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None,
    **fixed: object,
) -> Spelling:
    """A spelling with parameters of its own: their names in order, options it lacks as `fixed`."""
    return Spelling(tuple(names.split()), packed, fixed, tuple(ignored.split()), renamed or {}, unless=unless)


def renamed(**names: str) -> Spelling:
    """A spelling that calls some parameters by other names."""
    return Spelling(renamed=names)


SWAPPED = Spelling(swapped=True)
INPLACE_FLAG = "inplace"


def uniform(value: Any) -> Any:
    """`(3, 3)` as 3: torch repeats a number over the spatial dimensions."""
    equal = isinstance(value, (tuple, list)) and len(value) > 0 and all(entry is value[0] for entry in value)
    return value[0] if equal else value
