"""Lowering of arithmetic and bounds.

    x + y, x - y    qz = saturate(round(qx * Mx +- qy * My, shift))          Mx ~ sx / sz, My ~ sy / sz
    x * y           qz = saturate(rescale(qx * qy; sx * sy / sz))
    x * w + b       qz = saturate(round(qx * M + B, shift))                  M ~ sx * w / sz, B ~ b / sz
    relu            qz = max(qx, 0)                                          scale unchanged
    clamp           qz = rescaled qx between the codes of the bounds
A number as operand is exact: it enters M or B.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qgraph.errors import QuantizationError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.op_table import DIV, RELU6, SUB
from qgraph.lowering.base import (
    Lowering,
    LoweringContext,
    adds_constants,
    bounds,
    coded,
    encode_saturating,
    is_number,
    register_lowering,
    sum_rule,
    takes_numbers,
)
from qgraph.lowering.functions import table_call, tabulate_call
from qgraph.lowering.options import shape_of
from qgraph.numerics import Arithmetic, AtenCat, AtenRequantize, EngineSum, Factor, QParams, RequantizeRule
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target

_LARGEST_OFFSET = 2.0**62


class SumLowering(Lowering):
    """add and sub, with `alpha`."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        operands = [bound.operand(name) for name in bound.op.operands]
        if not is_number(bound.option("alpha")):
            return no("alpha is computed in the forward", node)
        rule = target.step("sum", bound.op.name).rule
        if isinstance(rule, EngineSum):
            return self._engine_supports(node, operands, rule, target)
        return _number_or_node(node, operands, target)

    def _engine_supports(self, node: fx.Node, operands: list[Any], rule: EngineSum, target: Target) -> Verdict:
        if not all(isinstance(operand, fx.Node) for operand in operands):
            if target.functions.rescale:
                return _number_or_node(node, operands, target)
            return no(f"{target.name} adds no numbers to codes", node)
        if bind(node).option("alpha") != 1:
            return no(f"{target.name} scales no operand of a sum", node)
        if not rule.broadcasts and shape_of(operands[0]) != shape_of(operands[1]):
            return no(f"{target.name} adds values of one shape only", node)
        if info(node).op is SUB and not rule.subtracts:
            return no(f"{target.name} has no subtraction", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        sign = -float(bound.option("alpha")) if info(node).op is SUB else float(bound.option("alpha"))
        operands, signs = [bound.operand("input"), bound.operand("other")], [1.0, sign]
        if not all(isinstance(operand, fx.Node) for operand in operands):
            if ctx.target.functions.rescale:
                return tabulate_call(node, ctx)
            number = next(i for i, operand in enumerate(operands) if not isinstance(operand, fx.Node))
            one = torch.tensor(signs[1 - number], dtype=torch.float64)
            shift = torch.tensor(signs[number] * operands[number], dtype=torch.float64)
            return lower_affine(node, operands[1 - number], one, shift, ctx)
        arithmetic = ctx.step(node, "sum")
        if isinstance(arithmetic.rule, EngineSum):
            factors = _engine_factors(node, operands, sign, arithmetic.rule, ctx)
        else:
            factors = _common_shift(node, operands, signs, sum_rule(arithmetic), ctx)
        return ctx.integer(
            "add",
            *operands,
            *factors,
            like=node,
            arithmetic=str(arithmetic),
            **bounds(ctx.qparams(node)),
            **ctx.zeros(node, x=operands[0], y=operands[1]),
        )


def _common_shift(
    node: fx.Node, operands: list[Any], signs: list[float], rule: RequantizeRule, ctx: LoweringContext
) -> list[fx.Node | None]:
    """Nodes for both multipliers and the shift of a sum that is rounded once."""
    reals = [ctx.ratio(node, ctx.qparams(operand)) * s for operand, s in zip(operands, signs, strict=True)]
    factor = rule.encode_sum(torch.stack(reals))
    multipliers = [ctx.tensor(node, f"multiplier_{name}", factor.multiplier[i]) for i, name in enumerate(("x", "y"))]
    return [*multipliers, None if factor.shift is None else ctx.tensor(node, "shift", factor.shift)]


def _engine_factors(
    node: fx.Node, operands: list[Any], sign: float, rule: EngineSum, ctx: LoweringContext
) -> list[fx.Node | None]:
    """Nodes for what an engine stores for a sum of two."""
    x, y = (ctx.qparams(operand) for operand in operands)
    found = rule.encode(x.scale, y.scale, ctx.qparams(node).scale, sign, x.qtype.bits)
    tensors = {"multiplier_x": found.x, "multiplier_y": found.y, "shift": found.shift, "multiplier": found.result}
    return [None if tensor is None else ctx.tensor(node, name, tensor) for name, tensor in tensors.items()]


class ProductOfValuesLowering(Lowering):
    """mul, and div by a number."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        operands = [bound.operand(name) for name in bound.op.operands]
        if info(node).op is DIV and bound.option("rounding_mode") is not None:
            return no("it rounds its quotient", node)
        if info(node).op is DIV and (isinstance(operands[1], fx.Node) or not operands[1]):
            return no("it divides by a computed value: decompose-composites takes it apart", node)
        return _number_or_node(node, operands, target)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        x, y = bound.operand("input"), bound.operand("other")
        if not isinstance(y, fx.Node):
            if ctx.target.functions.rescale:
                return tabulate_call(node, ctx)
            factor = torch.tensor(float(y), dtype=torch.float64)
            factor = 1.0 / factor if info(node).op is DIV else factor
            return lower_affine(node, x, factor, None, ctx)
        result = ctx.qparams(node)
        real = ctx.ratio(node, ctx.qparams(x), ctx.qparams(y))
        multiplier, shift, arithmetic = ctx.rescale(node, real, "product")
        options = {"arithmetic": str(arithmetic), **bounds(result), **ctx.zeros(node, x=x, y=y)}
        return ctx.integer("mul", x, y, multiplier, shift, like=node, **options)


class AffineLowering(Lowering):
    """A scale and shift per channel: multiplier and offset of one rescaling."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if not adds_constants(target, info(node).op.name):
            return no(f"{target.name} adds no constants where it rescales", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        module: Any = module_of(node)
        weight, bias = module.weight.detach().double(), module.bias.detach().double()
        return lower_affine(node, bind(node).operand("input"), weight, bias, ctx)


class ReluLowering(Lowering):
    """relu at an unchanged scale: real zero is code zero."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x = bind(node).operand("input")
        source = ctx.qparams(x)
        return ctx.integer("clamp", x, like=node, result=source, **ctx.bounds(source, low=0.0))


class ClampLowering(Lowering):
    """Bounds that may fall between codes: the result has a scale of its own."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        limits = _clamp_limits(node)
        if any(isinstance(limit, fx.Node) for limit in limits):
            return no("a bound is computed in the forward", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        one = torch.tensor(1.0, dtype=torch.float64)
        low, high = _clamp_limits(node)
        if ctx.target.functions.rescale:
            return table_call(node, bind(node).operand("input"), lambda values: values.clamp(low, high), ctx)
        return lower_affine(node, bind(node).operand("input"), one, None, ctx, low=low, high=high)


def lower_affine(
    node: fx.Node,
    x: fx.Node,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ctx: LoweringContext,
    *,
    low: float | None = None,
    high: float | None = None,
) -> fx.Node:
    """`x * weight + bias` between two bounds, as one rescaling of the codes of `x`.

    Args:
        weight, bias: real numbers, float64, broadcastable to `x`.
        low, high: bounds of the result.
    """
    result = ctx.qparams(node)
    scale = result.scale.double()
    real = ctx.ratio(node, ctx.qparams(x), weight)
    limits = {**ctx.bounds(result, low, high), **ctx.zeros(node, x=x)}
    if bias is None:
        multiplier, shift, arithmetic = ctx.rescale(node, real, "product")
        return ctx.integer("requantize", x, multiplier, shift, None, like=node, arithmetic=str(arithmetic), **limits)
    arithmetic = ctx.step(node, "sum")
    factor = sum_rule(arithmetic).encode_sum(real.unsqueeze(0))
    multiplier = ctx.tensor(node, "multiplier", factor.multiplier[0])
    offset = bias / scale
    shift_node = None
    if factor.shift is None:
        offset = offset.to(torch.float32)
    else:
        shift_node = ctx.tensor(node, "shift", factor.shift)
        offset = torch.round(torch.ldexp(offset, factor.shift.double()))
        if bool((offset.abs() > _LARGEST_OFFSET).any()):
            raise QuantizationError(
                "an added constant is too large for the scale of the result",
                where=where(node),
                why="it does not fit the 64-bit register of the rescaling",
                fix="look at the calibrated range of this site",
            )
        offset = offset.to(torch.int64)
    offset_node = ctx.tensor(node, "offset", offset)
    return ctx.integer(
        "requantize", x, multiplier, shift_node, offset_node, like=node, arithmetic=str(arithmetic), **limits
    )


def requantized_to(x: fx.Node, result: QParams, like: fx.Node, ctx: LoweringContext, role: str) -> fx.Node:
    """`x` at another scale and format; `x` itself if it has them already."""
    source = ctx.qparams(x)
    if source.same_as(result):
        return x
    if ctx.target.functions.rescale:
        table = ctx.tensor(like, f"{role}_table", ctx.table(lambda values: values, source, result))
        node = ctx.integer("lookup", x, table, like=like, result=result, source=str(source.qtype))
        ctx.edit.annotate(node, site=f"{info(like).site}.{role}", value=coded(info(x).value, result))
        return node
    arithmetic = _rescaling(like, ctx)
    if isinstance(arithmetic.rule, AtenRequantize):
        factor = Factor(arithmetic.rule.stages(source.scale, source.zero, result.scale), None)
    else:
        real = ctx.target.factor("quant_stub", source.scale, result=result.scale)
        factor = encode_saturating(arithmetic.rule, real, result.qtype)
    multiplier = ctx.tensor(like, f"{role}_multiplier", factor.multiplier)
    shift = None if factor.shift is None else ctx.tensor(like, f"{role}_shift", factor.shift)
    zeros = {name: zero for name, zero in (("x_zero", source.zero), ("zero", result.zero)) if zero}
    options = {"arithmetic": str(arithmetic), **bounds(result), **zeros}
    node = ctx.integer("requantize", x, multiplier, shift, None, like=like, result=result, **options)
    ctx.edit.annotate(node, site=f"{info(like).site}.{role}", value=coded(info(x).value, result))
    return node


def _rescaling(like: fx.Node, ctx: LoweringContext) -> Arithmetic:
    """The target's arithmetic of a change of scale. torch joins channels of images differently from all else."""
    arithmetic = ctx.step(like, "rescale")
    if isinstance(arithmetic.rule, AtenCat) and not (len(shape_of(like)) == 4 and bind(like).option("dim") in (1, -3)):
        return replace(arithmetic, rule=AtenRequantize())
    return arithmetic


def _clamp_limits(node: fx.Node) -> tuple[Any, Any]:
    if info(node).op is RELU6:
        return 0.0, 6.0
    bound = bind(node)
    return bound.option("min"), bound.option("max")


def _number_or_node(node: fx.Node, operands: list[Any], target: Target) -> Verdict:
    for operand in operands:
        if not isinstance(operand, fx.Node) and not takes_numbers(target, info(node).op.name):
            return no(f"{target.name} has no {info(node).op} of codes and a number", node)
        if not isinstance(operand, fx.Node) and not is_number(operand):
            return no(f"it computes with {operand!r}", node)
    return yes()


register_lowering("add", SumLowering())
register_lowering("mul", ProductOfValuesLowering())
register_lowering("affine", AffineLowering())
register_lowering("relu", ReluLowering())
register_lowering("clamp", ClampLowering())
