"""Lowering of functions of one value.

f(x)            qz = table[qx], full or interpolated as the target has it; torch has a second table for its scalar loop
floor, sign     qz = values[number of thresholds not above qx]        exact: no table between entries holds a jump
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.errors import InternalError, QGraphError, QuantizationError, UserError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, where
from qgraph.lowering.base import Lowering, LoweringContext, bounds, is_number, register_lowering
from qgraph.numerics import (
    EngineSoftmax,
    ScalarFunction,
    SegmentForm,
    TwoTables,
    build_segments,
    build_steps,
    has_two_tables,
    two_tables,
)
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


class TableLowering(Lowering):
    """Any function of one value: a table of the target's form."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if info(node).op.scalar_function is None:
            return no(f"the op table gives no function for {info(node).op}", node)
        if any(isinstance(option, fx.Node) for option in bind(node).options().values()):
            return no("an option is computed in the forward", node)
        if _has_two_tables(target) and not has_two_tables(info(node).op.name, bind(node).options()):
            return no(f"torch computes no such {info(node).op} of codes", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        x, make = bound.operand("input"), ctx.target.functions.tables.get(bound.op.name)
        source, result = ctx.qparams(x), ctx.qparams(node)
        if isinstance(ctx.target.table_form(source.qtype), TwoTables):
            tables = ctx.tensor(node, "tables", two_tables(bound.op.name, bound.options(), source, result))
            return ctx.integer("lookup_two", x, tables, like=node, source=str(source.qtype))
        if make is None:
            return table_call(node, x, _scalar_function(node, ctx.target), ctx)
        table = ctx.tensor(node, "table", make(source, result, **bound.options()))
        return ctx.integer("lookup", x, table, like=node, source=str(source.qtype))


def _has_two_tables(target: Target) -> bool:
    return any(isinstance(form, TwoTables) for form in target.tables.values())


class PowLowering(Lowering):
    """A power with a number as exponent or as base."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        operands = [bind(node).operand(name) for name in ("input", "exponent")]
        numbers = [operand for operand in operands if not isinstance(operand, fx.Node)]
        if len(numbers) != 1:
            return no("base and exponent are both computed in the forward", node)
        return yes() if is_number(numbers[0]) else no(f"it computes with {numbers[0]!r}", node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        base, exponent = (bind(node).operand(name) for name in ("input", "exponent"))
        if isinstance(base, fx.Node):
            return table_call(node, base, lambda values: torch.pow(values, exponent), ctx)
        return table_call(node, exponent, lambda values: torch.pow(base, values), ctx)


class StepsLowering(TableLowering):
    """A function that jumps: a full table, or its thresholds and the values between them."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, function = bind(node).operand("input"), _scalar_function(node, ctx.target)
        if ctx.target.functions.rescale:
            return table_call(node, x, function, ctx)
        thresholds, values = build_steps(function, ctx.qparams(x), ctx.qparams(node))
        tensors = [ctx.tensor(node, role, t) for role, t in (("thresholds", thresholds), ("values", values))]
        return ctx.integer("lookup_steps", x, *tensors, like=node)


class SoftmaxLowering(Lowering):
    """Softmax as one operator, on devices that have it; elsewhere it is taken apart before."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        if bound.option("dim") is None:
            return no("it leaves its dimension to torch's deprecated default", node)
        if bound.option("dtype") not in (None, torch.float32):
            return no(f"it computes in {bound.option('dtype')}", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, result, arithmetic = bind(node).operand("input"), ctx.qparams(node), ctx.step(node, "product")
        rule = arithmetic.rule
        if not isinstance(rule, EngineSoftmax) or result.scale.item() != rule.step:
            raise QuantizationError(
                f"{rule} computes no softmax with scale {result.scale.item():g}",
                where=where(node),
                fix="give the target's softmax a word of its own and the fixed_result that belongs to it",
            )
        options: dict[str, Any] = {"dim": int(bind(node).option("dim")), "arithmetic": str(arithmetic)}
        options |= {**bounds(result), **ctx.zeros(node)}
        multiplier, shift = ctx.factor(node, rule.encode(ctx.qparams(x).scale))
        return ctx.integer("softmax", x, multiplier, shift, like=node, **options)


def table_call(node: fx.Node, x: fx.Node, function: ScalarFunction, ctx: LoweringContext) -> fx.Node:
    """`function` of the codes of `x`, as a lookup in a table of the target's form."""
    source, result = ctx.qparams(x), ctx.qparams(node)
    form = ctx.target.table_form(source.qtype)
    if isinstance(form, TwoTables):
        raise InternalError("a target of torch's tables computes a function torch has no kernel for", where=where(node))
    if not isinstance(form, SegmentForm):
        table = ctx.tensor(node, "table", ctx.table(function, source, result))
        return ctx.integer("lookup", x, table, like=node, source=str(source.qtype))
    made = build_segments(function, source, result, form)
    tensors = [ctx.tensor(node, role, getattr(made, role)) for role in ("entries", "starts", "shifts")]
    options: dict[str, Any] = {
        "source": str(source.qtype),
        "fraction_bits": form.fraction_bits,
        "format": str(result.qtype),
    }
    return ctx.integer("lookup_segments", x, *tensors, like=node, **options)


def tabulate_call(node: fx.Node, ctx: LoweringContext) -> fx.Node:
    """A call with one computed operand and numbers as a table of what torch computes."""
    bound = bind(node)
    operands = [bound.operand(name) for name in bound.op.operands]
    position = next(i for i, operand in enumerate(operands) if isinstance(operand, fx.Node))
    target: Any = bound.op.target

    def function(values: torch.Tensor) -> torch.Tensor:
        numbers = [operand if isinstance(operand, fx.Node) else values.new_tensor(operand) for operand in operands]
        numbers[position] = values
        result: torch.Tensor = target(*numbers, **bound.options())
        return result

    return table_call(node, operands[position], function, ctx)


def _scalar_function(node: fx.Node, target: Target) -> ScalarFunction:
    """The function of a call with its options: the target's own, or the op table's.

    Raises:
        InternalError: the op table gives none.
    """
    op, options = info(node).op, bind(node).options()
    function = target.functions.own.get(op.name, op.scalar_function)
    if function is None:
        raise InternalError("a table has no function", where=where(node))

    def checked(values: torch.Tensor) -> torch.Tensor:
        try:
            result: object = function(values, **options)
        except QGraphError:
            raise
        except Exception as error:
            raise UserError(
                f"the function of {op} fails",
                where=where(node),
                why=f"{type(error).__name__}: {error}",
                fix="it must take a tensor and return its values element by element",
            ) from error
        if not isinstance(result, torch.Tensor) or result.shape != values.shape:
            got = f"shape {list(result.shape)}" if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"
            raise UserError(
                f"the function of {op} is not elementwise",
                where=where(node),
                why=f"it returned {got} for a tensor of shape {list(values.shape)}",
                fix="it must take a tensor and return its values element by element",
            )
        return result

    return checked


register_lowering("table", TableLowering())
register_lowering("pow", PowLowering())
register_lowering("softmax", SoftmaxLowering())
register_lowering("steps", StepsLowering())
