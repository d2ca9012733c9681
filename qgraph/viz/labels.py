"""What is written on the boxes and edges of a picture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import torch
from torch import fx

from qgraph.ir.arguments import quant_rule
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, module_of, tensor_at
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, FAKE_QUANT, GUARD, ITEM, OPAQUE
from qgraph.ir.text import called_name, describe
from qgraph.ir.values import format_spec
from qgraph.numerics import Format, parse_qtype

_WIDTH = 36
_PIECES = re.compile(r"[^._]*[._]+|[^._]+")


def is_hidden(node: fx.Node) -> bool:
    """Whether a node is shown in other boxes' text and edges instead of a box of its own."""
    record = info(node)
    if record.op is CONSTANT:
        return _is_parameter(node)
    return record.op in (FAKE_QUANT, GUARD)


def _is_parameter(node: fx.Node) -> bool:
    """Whether a constant only parametrizes integer operators: weights, biases, multipliers, tables."""
    return info(node).qparams is None and bool(node.users) and all(integer_name(user.target) for user in node.users)


def sources(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The boxes a node's data comes from, each with the operand that reaches it; hidden nodes are looked through."""
    for operand in node.all_input_nodes:
        source = operand
        while is_hidden(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if not is_hidden(source):
            yield source, operand


def box_text(node: fx.Node, sharing: str | None = None) -> str:
    """Operator, site, weights and, for float islands, the reason."""
    record = info(node)
    if record.op.kind is OpKind.OUTPUT:
        return "output"
    lines = [operator_text(node), wrapped(record.site)]
    if weight_format(node) is not None:
        lines.append(f"weight {weight_format(node)}")
    if sharing is not None:
        lines.append(sharing)
    if record.float_reason is not None:
        lines.append("float: " + wrapped(record.float_reason, 28))
    return "\n".join(lines)


def _clipping(node: fx.Node) -> list[str]:
    """An activation fused into an integer operator, as its bounds show it."""
    qtype = parse_qtype(str(node.kwargs["format"]))
    low, high = node.kwargs["low"], node.kwargs["high"]
    if (low, high) == (qtype.qmin, qtype.qmax):
        return []
    return ["relu"] if (low, high) == (0, qtype.qmax) else ["clamp"]


def weight_format(node: fx.Node) -> Format | None:
    """Format of an operator's weight, planned or frozen; None while there is none."""
    record = info(node)
    if record.weight_qparams is not None:
        return record.weight_qparams.qtype
    return None if record.weight_plan is None else record.weight_plan.format


def operator_text(node: fx.Node) -> str:
    """The operator, with what is fused into it, and the integer operator where its name says something else."""
    record = info(node)
    if record.op is OPAQUE:
        return called_name(node)
    parts = [record.op.name]
    integer = integer_name(node.target)
    if node.op == "call_module":
        module = module_of(node)
        parts += ["add"] if getattr(module, "adds", False) else []
        activation = str(getattr(module, "activation", "none"))
        parts += [activation] if activation != "none" else []
    elif integer in ("conv", "conv_pairs", "linear"):
        parts += ["add"] if node.args[3] is not None else []
        parts += _clipping(node)
    elif integer is not None and record.op.kind is not OpKind.STUB and not record.op.name.startswith(integer):
        return f"{record.op.name}: {integer}"
    return " + ".join(parts)


def value_text(node: fx.Node) -> str:
    """Format and scale of a node's result, where they are known, above its shape and dtype."""
    value = info(node).value
    shape = f"{len(value)} values" if isinstance(value, tuple) else format_spec(value) if value is not None else ""
    return "\n".join(line for line in (_format_text(node), shape) if line)


def _format_text(node: fx.Node) -> str:
    kind, scale, qparams = value_format(node), value_scale(node), info(node).qparams
    if kind is None:
        return ""
    zero = "" if qparams is None or qparams.symmetric else f" + {qparams.zero_points().flatten()[0].item()}"
    if scale is None:
        return f"{kind}{zero}"
    step = f"{scale.item():.4g}" if scale.numel() == 1 else f"{scale.numel()} scales"
    return f"{kind} * {step}{zero}"


def value_format(node: fx.Node) -> Format | None:
    """Format of a node's result, planned or frozen; None while it is plain float."""
    qparams = info(node).qparams
    if qparams is not None:
        return qparams.qtype
    rounded = _rounded_at(node)
    planned = rounded.all_input_nodes[0] if info(rounded).op is FAKE_QUANT else rounded
    plan = info(planned).plan
    return None if plan is None else plan.format


def value_scale(node: fx.Node) -> torch.Tensor | None:
    """Scale of a node's result; None where there is none, or none yet."""
    qparams = info(node).qparams
    if qparams is not None:
        return qparams.scale
    rounded = _rounded_at(node)
    rounding = next((user for user in rounded.users if info(user).op is FAKE_QUANT), rounded)
    scale = getattr(module_of(rounding), "scale", None) if info(rounding).op is FAKE_QUANT else None
    return scale if isinstance(scale, torch.Tensor) and scale.numel() else None


def _rounded_at(node: fx.Node) -> fx.Node:
    """Where a float value was last rounded: movements and selections keep the codes of their first operand."""
    while info(node).plan is None and info(node).op is not FAKE_QUANT and node.all_input_nodes:
        if info(node).op is not ITEM and quant_rule(node) is not QuantRule.SAME:
            break
        node = node.all_input_nodes[0]
    return node


def hover_text(node: fx.Node) -> str:
    """The node's line of the text form, with the user's source line."""
    source = info(node).source
    return f"%{node.name} = {describe(node)}" + (f"\n{os.path.basename(source.file)}:{source.line}" if source else "")


def shared_calls(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Calls that use the same weights as another call, each with words that say so."""
    calls: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for key in _weight_keys(node):
            calls.setdefault(key, []).append(node)
    return {
        node: f"shared: call {number} of {len(group)}"
        for group in calls.values()
        if len(group) > 1
        for number, node in enumerate(group, start=1)
    }


def _weight_keys(node: fx.Node) -> Iterator[int]:
    if node.op == "call_module":
        weight = getattr(module_of(node), "weight", None)
        if isinstance(weight, torch.Tensor):
            yield id(weight)
    owner = node.graph.owning_module
    if owner is not None:
        yield from (id(tensor_at(owner, str(weight.target))) for weight in _weights(node))


def _weights(node: fx.Node) -> list[fx.Node]:
    """The constant that an integer convolution or linear operator uses as its weight."""
    weight = node.args[1] if integer_name(node.target) in ("conv", "conv_pairs", "linear") else None
    return [weight] if isinstance(weight, fx.Node) and info(weight).op is CONSTANT else []


def wrapped(text: str, width: int = _WIDTH) -> str:
    """`text` in lines of at most `width` characters, broken at blanks; longer words behind a dot or underscore."""
    lines = [""]
    for word in text.split(" "):
        pieces = [word] if len(word) <= width else _PIECES.findall(word)
        for number, piece in enumerate(pieces):
            gap = " " if lines[-1] and number == 0 else ""
            if len(lines[-1]) + len(gap) + len(piece) > width and lines[-1]:
                lines.append("")
                gap = ""
            lines[-1] += gap + piece
            while len(lines[-1]) > width:
                lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(lines)
