"""Lowering of what moves codes without changing them, of joins, padding and stubs.

Movement is done by the same torch function, on codes. A join brings its operands to the scale of its result first.
Padding with a number pads with that number's code.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from qgraph.ir.arguments import bind, coded_operands
from qgraph.ir.node_info import info
from qgraph.ir.op_table import PAD
from qgraph.lowering.base import (
    Lowering,
    LoweringContext,
    is_number,
    register_lowering,
    takes_numbers,
)
from qgraph.lowering.elementwise import requantized_to
from qgraph.numerics import RECIPROCAL
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


class MoveLowering(Lowering):
    """Reshapes, permutations, slices, splits: the same call on codes."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        source = ctx.qparams(coded_operands(node)[0][1])
        ctx.moved(node, node, source)
        return node


class PadLowering(Lowering):
    """Padding; by a number other than zero the result has a scale of its own."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        amounts, value = bound.option("pad"), bound.option("value")
        if any(isinstance(amount, fx.Node) for amount in amounts):
            return no("its amounts are computed in the forward", node)
        if value is not None and not is_number(value):
            return no(f"it pads with {value!r}, for which there is no code", node)
        if value and not takes_numbers(target, info(node).op.name):
            return no(f"{target.name} pads with zero only", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        x, value = bound.operand("input"), bound.option("value")
        source = ctx.qparams(x)
        if bound.option("mode") != "constant" or (not value and not source.zero):
            ctx.moved(node, node, source)
            return node
        result = ctx.qparams(node) if value else source
        code = ctx.bounds(result, low=value or 0.0)["low"]
        moved = requantized_to(x, result, node, ctx, "requantize")
        padded = ctx.edit.call_function(F.pad, (moved, tuple(bound.option("pad"))), {"value": code}, op=PAD, like=node)
        ctx.moved(padded, node, result)
        return padded


class JoinLowering(Lowering):
    """cat and stack."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, result = bind(node), ctx.qparams(node)
        parts = [
            requantized_to(part, result, node, ctx, f"input{position}")
            for position, part in enumerate(bound.operand("tensors"))
        ]
        ctx.edit.set_arguments(node, (parts,), bound.options())
        ctx.moved(node, node, result)
        return node


class QuantizeLowering(Lowering):
    """A quant stub: from reals to codes, or from one scale to another."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, result = node.all_input_nodes[0], ctx.qparams(node)
        if info(x).qparams is not None:
            moved = requantized_to(x, result, node, ctx, "requantize")
            if moved is not x:
                ctx.edit.annotate(moved, site=info(node).site)
            return moved
        scale = ctx.tensor(node, "scale", result.scale)
        rule = ctx.target.quantize_rule
        options: dict[str, Any] = {} if rule == RECIPROCAL else {"rounding": str(rule)}
        return ctx.integer("quantize", x, scale, like=node, format=str(result.qtype), **options, **ctx.zeros(node))


class DequantizeLowering(Lowering):
    """A dequant stub: from codes to reals; nothing where the value is real already."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x = node.all_input_nodes[0]
        source = info(x).qparams
        if source is None:
            return x
        scale = ctx.tensor(node, "scale", source.scale)
        axis = -1 if source.axis is None else source.axis
        zero: dict[str, Any] = {"x_zero": source.zero} if source.zero else {}
        real = ctx.integer("dequantize", x, scale, like=node, axis=axis, **zero)
        ctx.edit.annotate(real, qparams=None, value=info(node).value)
        return real


for _name, _lowering in {
    "move": MoveLowering(),
    "pad": PadLowering(),
    "join": JoinLowering(),
    "quantize": QuantizeLowering(),
    "dequantize": DequantizeLowering(),
}.items():
    register_lowering(_name, _lowering)
