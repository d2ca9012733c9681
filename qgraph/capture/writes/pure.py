"""The out-of-place form of in-place calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.ir import functional as QF
from qgraph.ir.node_info import info, set_info
from qgraph.ir.op_table import COPY_TO, SET_ITEM
from qgraph.ir.values import TensorSpec

Change = Callable[[], None]

# In place these write zeros and ones of the tensor's own dtype; else they give booleans.
_BOOLEAN = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "greater", "greater_equal", "less", "less_equal", "not_equal"}
    | {"logical_and", "logical_or", "logical_xor", "logical_not"}
)
_TO_OWN_DTYPE = ("copy_", "zero_", "fill_", operator.setitem)


def pure_form(root: nn.Module, node: fx.Node, target: fx.Node) -> Change | None:
    """What turns the call into one that leaves `target`, the operand it writes to, as it is; None where nothing does.

    The node then gives the new value of the operand, in the operand's dtype.
    """
    own = info(target).value
    if not isinstance(own, TensorSpec) or not (node.target in _TO_OWN_DTYPE or _keeps_dtype(node, own)):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return (lambda: setattr(module, "inplace", False)) if getattr(module, "inplace", False) else None
    if "out" in node.kwargs:
        return _change(node, kwargs={key: value for key, value in node.kwargs.items() if key != "out"})
    if node.kwargs.get("inplace"):
        return _change(node, kwargs={**node.kwargs, "inplace": False})
    if node.op == "call_method":
        return _method(node, str(node.target))
    if node.target is operator.setitem:
        return _change(node, target=QF.set_item, op=SET_ITEM)
    target_function = _function(node.target)
    return None if target_function is None else _change(node, target=target_function)


def _keeps_dtype(node: fx.Node, own: TensorSpec) -> bool:
    """Whether the pure operation, which promotes dtypes, gives the operand's own."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if own.dtype is not torch.bool and name.strip("_") in _BOOLEAN:
        return False
    specs = [info(operand).value for operand in node.all_input_nodes]
    return all(_yields(spec, own) for spec in specs if isinstance(spec, TensorSpec))


def _yields(spec: TensorSpec, own: TensorSpec) -> bool:
    if spec.dtype is own.dtype or _category(spec.dtype) < _category(own.dtype):
        return True
    # A tensor without dimensions counts like a number.
    return _category(spec.dtype) == _category(own.dtype) and not spec.shape and bool(own.shape)


def _category(dtype: torch.dtype) -> int:
    if dtype is torch.bool:
        return 0
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1


def _change(node: fx.Node, *, op: Any = None, **fields: Any) -> Change:
    def change() -> None:
        for name, value in fields.items():
            setattr(node, name, value)
        if op is not None:
            set_info(node, replace(info(node), op=op))

    return change


def _method(node: fx.Node, name: str) -> Change | None:
    if name == "copy_":
        return _call(node, QF.copy_to, node.args[:2], op=COPY_TO)
    if name in ("zero_", "fill_"):
        value = node.args[1] if name == "fill_" else 0
        return None if isinstance(value, fx.Node) else _call(node, torch.full_like, (node.args[0], value))
    plain = name.rstrip("_") if not name.startswith("__") else name.replace("__i", "__", 1)
    if not name.endswith("_") or not hasattr(torch.Tensor, plain):
        return None
    return _change(node, target=plain)


def _call(node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], op: Any = None) -> Change:
    def change() -> None:
        node.op = "call_function"
        _change(node, op=op, target=function, args=args, kwargs={})()

    return change


def _function(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        packet = getattr(getattr(torch.ops, target.namespace), name.rstrip("_"), None)
        return getattr(packet, target._overloadname, None) if name.endswith("_") else None
    name = getattr(target, "__name__", "")
    for namespace in (torch, torch.nn.functional):
        if name.endswith("_") and getattr(namespace, name, None) is target and hasattr(namespace, name[:-1]):
            return getattr(namespace, name[:-1])
    return None
