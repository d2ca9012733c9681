"""Lowering of comparisons and of choices between values.

    x < y           mask = qx * Mx < qy * My                    Mx ~ sx, My ~ sy, exact products
    x < number      mask = qx < threshold                       threshold: where the dequantized codes pass the number
    maximum         qz = max(rescale(qx), rescale(qy))          both at the scale of the result
    where, fills    qz = mask ? rescale(qx) : rescale(qy)       a number becomes its code
    prelu, abs      qz = saturate(qx >= 0 ? rescale(qx; sx / sz) : rescale(qx; slope * sx / sz))
A mask is a bool tensor: it is no code and passes as it is. A fill of 0 keeps the scale, because 0 is a code; so does
one beyond every value (1e4 and more, infinity): it becomes the lowest or highest code, which is right where only the
order of values counts and refused elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.errors import InternalError
from qgraph.ir.arguments import bind, quant_rule
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import ABS, is_sentinel
from qgraph.lowering.base import Lowering, LoweringContext, encode_saturating, is_number, register_lowering
from qgraph.lowering.elementwise import lower_affine, requantized_to
from qgraph.lowering.options import shape_of
from qgraph.numerics import QParams, dequantize, encode_common_shift
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target

_COMPARED_BITS = 31


class CompareLowering(Lowering):
    """gt, ge, lt, le, eq and ne, with a number or another value."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        x, y = (bind(node).operand(name) for name in ("input", "other"))
        if not isinstance(y, fx.Node) and not is_number(y):
            return no(f"it compares with {y!r}", node)
        return yes() if isinstance(x, fx.Node) else no("its first operand is a number", node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, y = (bind(node).operand(name) for name in ("input", "other"))
        relation = info(node).op.name
        if not isinstance(y, fx.Node):
            code = ctx.tensor(node, "threshold", torch.tensor(threshold(relation, float(y), ctx.qparams(x))))
            one = ctx.tensor(node, "one", torch.tensor(1))
            return ctx.integer("compare", x, code, one, one, like=node, relation=relation)
        scales = torch.stack([ctx.qparams(operand).scale.double() for operand in (x, y)])
        factor = encode_common_shift(scales / scales.max(), _COMPARED_BITS)
        multipliers = [
            ctx.tensor(node, f"multiplier_{name}", m) for name, m in zip("xy", factor.multiplier, strict=True)
        ]
        found = {f"{name}_zero": ctx.qparams(operand).zero for name, operand in (("x", x), ("y", y))}
        zeros: dict[str, Any] = {name: zero for name, zero in found.items() if zero}
        return ctx.integer("compare", x, y, *multipliers, like=node, relation=relation, **zeros)


def threshold(relation: str, number: float, qparams: QParams) -> int:
    """The code `t` such that a code stands in `relation` to `t` exactly where its float32 real does to `number`.

    For `eq` and `ne` it is one below all codes where no real equals the number.
    """
    codes = torch.arange(qparams.qtype.qmin, qparams.qtype.qmax + 1)
    reals, single = dequantize(codes, qparams), torch.tensor(number, dtype=torch.float32)
    below, not_above = int((reals < single).sum()), int((reals <= single).sum())
    if relation in ("lt", "ge"):
        return qparams.qtype.qmin + below
    if relation in ("gt", "le"):
        return qparams.qtype.qmin + not_above - 1
    return qparams.qtype.qmin + (below if not_above > below else -1)


class ExtremeLowering(Lowering):
    """maximum and minimum of two values: both at the scale of the result, then the larger code."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        operands = [bind(node).operand(name) for name in ("input", "other")]
        return yes() if all(isinstance(o, fx.Node) for o in operands) else no("an operand is a number", node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        result = ctx.qparams(node)
        operands = [requantized_to(value, result, node, ctx, name) for name, value in bind(node).nodes()]
        ctx.edit.set_arguments(node, tuple(operands), {})
        ctx.moved(node, node, result)
        return node


class WhereLowering(Lowering):
    """where: values at the scale of the result; a number becomes its code."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        values = [bind(node).operand(name) for name in ("input", "other")]
        if not any(isinstance(value, fx.Node) for value in values):
            return no("it chooses between numbers: nothing in it is a code", node)
        return _fillable(node, [value for value in values if not isinstance(value, fx.Node)])

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, result = bind(node), ctx.qparams(node)
        chosen = [self._codes(name, bound.operand(name), result, node, ctx) for name in ("input", "other")]
        ctx.edit.set_arguments(node, (bound.operand("condition"), *chosen), {})
        ctx.moved(node, node, result)
        return node

    def _codes(self, name: str, value: Any, result: QParams, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        if isinstance(value, fx.Node):
            return requantized_to(value, result, node, ctx, name)
        return ctx.tensor(node, name, torch.tensor(fill_code(value, result, ctx), dtype=result.qtype.storage))


class MaskedFillLowering(Lowering):
    """masked_fill with a number."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        value = bind(node).operand("value")
        return (
            no("its fill is computed in the forward", node) if isinstance(value, fx.Node) else _fillable(node, [value])
        )

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, result = bind(node), ctx.qparams(node)
        x = requantized_to(bound.operand("input"), result, node, ctx, "input")
        ctx.edit.set_arguments(node, (x, bound.operand("mask"), fill_code(bound.operand("value"), result, ctx)), {})
        ctx.moved(node, node, result)
        return node


def fill_code(value: float, result: QParams, ctx: LoweringContext) -> int:
    """The code of a fill; the lowest or highest one for a fill beyond every value."""
    if is_sentinel(value):
        return result.qtype.qmin if value < 0 else result.qtype.qmax
    return int(ctx.bounds(result, low=value)["low"])


def _fillable(node: fx.Node, numbers: list[Any]) -> Verdict:
    for number in numbers:
        if is_sentinel(number):
            reader = _first_reader_of_size(node)
            if reader is not None:
                return no(f"its fill {number!r} has no code, and {info(reader).site} reads more than its order", node)
        elif not is_number(number):
            return no(f"it fills in {number!r}, for which there is no code", node)
    return yes()


def _first_reader_of_size(node: fx.Node) -> fx.Node | None:
    """A user to which more counts than which values are larger; None if there is none."""
    for user in node.users:
        op = info(user).op
        if op.kind is OpKind.MOVE and quant_rule(user) is QuantRule.SAME:
            found = _first_reader_of_size(user)
            if found is not None:
                return found
        elif op.kind is not OpKind.SELECT or quant_rule(user) not in (QuantRule.SAME, QuantRule.PLAIN):
            return user
    return None


class SlopesLowering(Lowering):
    """prelu and abs: one factor for values from zero on, another below."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if info(node).op is not ABS and node.op != "call_module":
            return no("its slopes are computed in the forward", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, result = bind(node).operand("input"), ctx.qparams(node)
        arithmetic, source = ctx.step(node, "rescale"), ctx.qparams(x)
        factors: list[fx.Node | None] = []
        for prefix, slope in (("", torch.ones((), dtype=torch.float64)), ("negative_", _slope(node, x))):
            factor = encode_saturating(arithmetic.rule, ctx.ratio(node, source, slope), result.qtype)
            factors.append(ctx.tensor(node, f"{prefix}multiplier", factor.multiplier))
            factors.append(None if factor.shift is None else ctx.tensor(node, f"{prefix}shift", factor.shift))
        options = {"arithmetic": str(arithmetic), **ctx.bounds(result), **ctx.zeros(node, x=x)}
        return ctx.integer("prelu", x, *factors, like=node, **options)


def _slope(node: fx.Node, x: fx.Node) -> torch.Tensor:
    """Slope below zero, float64 `[]`, or one per channel, shaped to broadcast against `x`."""
    if info(node).op is ABS:
        return torch.tensor(-1.0, dtype=torch.float64)
    module: Any = module_of(node)
    weight: torch.Tensor = module.weight.detach().double()
    if weight.numel() == 1:
        return weight.reshape(())
    rank = len(shape_of(x))
    if rank < 2:
        raise InternalError("slopes per channel have no channels", where=where(node))
    return weight.reshape(-1, *[1] * (rank - 2))


class NegLowering(Lowering):
    """A change of sign: a rescaling by a negative factor."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        minus = torch.tensor(-1.0, dtype=torch.float64)
        return lower_affine(node, bind(node).operand("input"), minus, None, ctx)


for _name, _lowering in {
    "compare": CompareLowering(),
    "extreme": ExtremeLowering(),
    "where": WhereLowering(),
    "masked_fill": MaskedFillLowering(),
    "prelu": SlopesLowering(),
    "abs": SlopesLowering(),
    "neg": NegLowering(),
}.items():
    register_lowering(_name, _lowering)
