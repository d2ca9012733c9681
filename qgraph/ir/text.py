"""The readable form of a graph: one line a node, stable from run to run.

    graph ResNet (fused)
      %x                : f32[1,3,8,8]  = input
      %conv1            : f32[1,8,8,8]  = conv2d(%x, padding=(1, 1), activation=relu)  @conv1  model.py:12
      return %conv1

Golden tests, diffs, dumps and bug reports use this form. Operands are positional, options follow by name and
only where they differ from the operator's default; `@` gives the site where it is not the node's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from qgraph.ir.arguments import bind
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import NodeInfo, graph_info, has_info, info, module_of
from qgraph.ir.op_table import CONSTANT, INPUT, OPAQUE
from qgraph.ir.values import format_spec

_WIDEST = 40


def print_graph(gm: fx.GraphModule, *, source: bool = True, values: bool = True) -> str:
    """The text form of a graph.

    Args:
        gm: a graph made by qgraph.
        source: whether to end each line with the user's source line.
        values: whether to give shapes and dtypes.
    """
    head = graph_info(gm)
    target = f", target {head.target.name}" if head.target else ""
    rows = [_row(node, source=source) for node in gm.graph.nodes if node.op != "output"]
    name_width = min(_WIDEST, max((len(row[0]) for row in rows), default=0))
    value_width = min(_WIDEST, max((len(row[1]) for row in rows), default=0))
    lines = [f"graph {head.model} ({head.stage}{target})"]
    for name, value, text in rows:
        spec = f" : {value.ljust(value_width)}" if values else ""
        lines.append(f"  {name.ljust(name_width)}{spec} = {text}".rstrip())
    lines += [f"  return {_value(node.args[0])}" for node in gm.graph.nodes if node.op == "output"]
    return "\n".join(lines) + "\n"


def describe(node: fx.Node) -> str:
    """The text form of one node's right-hand side."""
    record = info(node)
    extra = [f"{key}={_value(value)}" for key, value in _options(node)]
    operands = [_value(value) for value in _operands(node)]
    if record.op is INPUT:
        return "input"
    if record.op is CONSTANT:
        return f"constant[{node.target}]"
    return f"{_name(node, record)}({', '.join(operands + extra)})"


def _row(node: fx.Node, *, source: bool) -> tuple[str, str, str]:
    record = info(node)
    parts = [describe(node)]
    if record.site.strip("_") != node.name:
        parts.append(f"@{record.site}")
    parts += list(_quantization(record))
    if source and record.source is not None:
        parts.append(f"{os.path.basename(record.source.file)}:{record.source.line}")
    return f"%{node.name}", format_spec(record.value), "  ".join(parts)


def _quantization(record: NodeInfo) -> Iterator[str]:
    if record.qparams is not None:
        yield f"-> {record.qparams}"
    elif record.plan is not None:
        yield f"-> {record.plan.format}"
    if record.weight_plan is not None:
        yield f"weight {record.weight_plan.format}"
    if record.float_reason is not None:
        yield f"float: {record.float_reason}"
    if record.in_place:
        yield "in place"


def _name(node: fx.Node, record: NodeInfo) -> str:
    integer = integer_name(node.target)
    if integer is not None:
        return f"qgraph.{integer}"
    return record.op.name if record.op is not OPAQUE else called_name(node)


def called_name(node: fx.Node) -> str:
    """What a node calls, in words: a module's class, a method or a function's name."""
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if isinstance(node.target, str):
        return f".{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    name = getattr(node.target, "__name__", "function")
    module = (getattr(node.target, "__module__", None) or "").split(".")[0].lstrip("_")
    return f"{module or 'torch'}.{name}"


def _operands(node: fx.Node) -> list[Any]:
    if not _bindable(node):
        return list(node.args)
    bound = bind(node)
    held = bound.op.parameters if bound.module is not None else ()
    operands = [bound.operand(name) for name in bound.op.operands if name not in held]
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def _options(node: fx.Node) -> Iterator[tuple[str, Any]]:
    if not _bindable(node):
        yield from node.kwargs.items()
        return
    yield from bind(node).options().items()
    if node.op == "call_module":
        yield from _module_options(module_of(node))


def _module_options(module: nn.Module) -> Iterator[tuple[str, Any]]:
    activation = getattr(module, "activation", None)
    if activation is not None and str(activation) != "none":
        yield "activation", activation
    scale = getattr(module, "scale", None)
    if isinstance(scale, float):
        yield "scale", scale


def _bindable(node: fx.Node) -> bool:
    if not has_info(node) or node.op in ("placeholder", "get_attr", "output"):
        return False
    op = info(node).op
    return op is not OPAQUE and bool(op.signature.parameters) and integer_name(node.target) is None


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        inner = ", ".join(_value(entry) for entry in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if part is None else _value(part) for part in parts)
    if value is Ellipsis:
        return "..."
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value)
