"""How a float operator with known scales becomes integer operators.

A lowering answers two questions: can this call run on that target (and if not, why), and which integer operators
compute it. `LOWERINGS` maps the names in the op table to lowerings; another package adds one by `register_lowering`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.errors import InternalError, QuantizationError, TargetError, UserError, did_you_mean
from qgraph.ir.arguments import bind, coded_operands, quant_rule
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.integer import integer_operator
from qgraph.ir.node_info import graph_info, info, where
from qgraph.ir.op import QuantRule
from qgraph.ir.op_table import OPAQUE
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.text import called_name
from qgraph.ir.values import TensorSpec
from qgraph.lowering.options import has_options
from qgraph.numerics import (
    RECIPROCAL,
    Arithmetic,
    EngineSoftmax,
    EngineSum,
    Factor,
    QParams,
    QType,
    QuantizeRule,
    RequantizeRule,
    Rule,
    ScalarFunction,
    SegmentForm,
    TwoTables,
    build_table,
)
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


class Lowering(ABC):
    """One way to take an operator to integers."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        """Whether this call can be computed in integers on `target`; formats are checked elsewhere."""
        return yes()

    @abstractmethod
    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        """The node that computes `node`'s codes; operands of `node` are lowered already."""


@dataclass
class LoweringContext:
    """What lowerings work with.

    Args:
        edit: the graph's editor.
        target: the hardware.
    """

    edit: Editor
    target: Target

    def qparams(self, node: Any) -> QParams:
        """Parameters of a lowered operand.

        Raises:
            InternalError: it has none.
        """
        found = info(node).qparams
        if found is None:
            raise InternalError("an integer operator reads a value without scale", where=where(node))
        return found

    def zeros(self, like: fx.Node, **operands: Any) -> dict[str, Any]:
        """Options for the zero points of named operands and of `like`'s result, as far as they are not 0."""
        found = {f"{name}_zero": self.qparams(node).zero for name, node in operands.items() if node is not None}
        found["zero"] = self.qparams(like).zero
        return {name: zero for name, zero in found.items() if zero}

    def integer(self, name: str, *args: Any, like: fx.Node, result: QParams | None = None, **options: Any) -> fx.Node:
        """A call of an integer operator that computes `like`'s value (`result`: its parameters, if not `like`'s)."""
        node = self.edit.call_function(integer_operator(name), args, options, op=info(like).op, like=like)
        qparams = result or info(like).qparams
        self.edit.annotate(node, qparams=qparams, value=coded(info(like).value, qparams), plan=None, weight_plan=None)
        return node

    def moved(self, node: fx.Node, like: fx.Node, qparams: QParams, shape: tuple[int, ...] | None = None) -> None:
        """Records that `node` holds codes with `qparams`, shaped as `like`'s value or as given."""
        value = info(like).value if shape is None else TensorSpec(shape, torch.float32)
        self.edit.annotate(node, qparams=qparams, value=coded(value, qparams), plan=None, weight_plan=None)

    def tensor(self, like: fx.Node, role: str, tensor: torch.Tensor) -> fx.Node:
        """A node that reads `tensor`, kept as a buffer named after `like`'s site and its role."""
        path = f"{node_name(info(like).site)}_{role}"
        return self.edit.constant(tensor, path=path, like=like)

    def factor(self, like: fx.Node, factor: Factor) -> tuple[fx.Node, fx.Node | None]:
        """Nodes for a stored factor's multiplier and shift."""
        multiplier = self.tensor(like, "multiplier", factor.multiplier)
        shift = None if factor.shift is None else self.tensor(like, "shift", factor.shift)
        return multiplier, shift

    def step(self, node: fx.Node, name: str) -> Arithmetic:
        """The target's arithmetic of a named step of `node`'s operator, on its first operand's format."""
        return self.target.step(name, info(node).op.name, self._source(node))

    def _source(self, node: fx.Node) -> QType | None:
        found = next((info(operand).qparams for _, operand in bind(node).nodes()), None)
        return None if found is None else found.qtype

    def ratio(
        self, node: fx.Node, *operands: QParams | torch.Tensor, divisor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`s1 * s2 * ... / (s * divisor)`, `s` the scale of `node`'s result, as the target computes it; float64."""
        scales = [operand.scale if isinstance(operand, QParams) else operand for operand in operands]
        result = self.qparams(node).scale
        if divisor is not None:
            result = result.to(divisor.dtype) * divisor
        found = self.target.factor(info(node).op.name, *scales, result=result)
        self._check_factor(node, found)
        return found

    def check_scale(self, node: fx.Node, op: str | None = None) -> None:
        """Refuses results finer than the device computes them, of the node's operator or of another fused with it.

        Raises:
            QuantizationError: this one is.
        """
        op = op or info(node).op.name
        rule, result = self.target.rule(op), info(node).qparams
        if rule is not None and result is not None and bool((result.scale < rule.least_scale).any()):
            raise QuantizationError(
                f"{self.target.name} gives no {op} a scale of {result.scale.min().item():g}",
                why=f"the smallest scale of its results is {rule.least_scale:g}",
                fix="look at the calibrated range of this site",
            )

    def _check_factor(self, node: fx.Node, factor: torch.Tensor) -> None:
        """Refuses factors the device does not rescale by."""
        name, rule = info(node).op.name, self.target.rule(info(node).op.name)
        if rule is None or rule.factor_range is None:
            return
        least, end = rule.factor_range
        outside = factor[(factor.abs() < least) | (factor.abs() >= end)]
        if outside.numel():
            raise QuantizationError(
                f"{self.target.name} cannot rescale this {name} by {outside[0].item():g}",
                why=f"its factor, of the scales of operand and result, has to be from {least:g} to below {end:g}",
                fix="look at the calibrated ranges around this op",
            )

    def bounds(self, result: QParams, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        """As `bounds`, with the target's way to quantize a bound."""
        return bounds(result, low, high, self.target.bound_rule)

    def table(self, function: ScalarFunction, source: QParams, result: QParams) -> torch.Tensor:
        """The target's table of a function of one value, full or of even intervals.

        Raises:
            TargetError: the target's tables of this format have another form.
        """
        functions, form = self.target.functions, self.target.table_form(source.qtype)
        if isinstance(form, (SegmentForm, TwoTables)):
            raise TargetError(f"function tables of {self.target.name} for {source.qtype} are neither full nor even")
        return build_table(
            function,
            source,
            result,
            entries=form,
            rule=functions.quantize or self.target.quantize_rule,
            dtype=functions.values,
        )

    def rescale(self, like: fx.Node, real: torch.Tensor, step: str) -> tuple[fx.Node, fx.Node | None, Arithmetic]:
        """Nodes for one real factor (float64) under the target's arithmetic of `step`."""
        arithmetic = self.step(like, step)
        multiplier, shift = self.factor(like, encode_saturating(arithmetic.rule, real, self.qparams(like).qtype))
        return multiplier, shift, arithmetic


def encode_saturating(rule: Rule, factor: torch.Tensor, result: QType) -> Factor:
    """What the device stores for a factor whose product is saturated to `result`.

    A factor beyond the result's range takes zero to zero and all else to saturation, and so does the largest factor
    the device can store. Such factors arise where a result is far smaller than its operands, as a mean of normalized
    values is.
    """
    if isinstance(rule, (EngineSum, EngineSoftmax)):
        raise UserError(f"{rule} does not rescale single values", fix="give this operator another word")
    beyond = rule.largest > 2.0 * (1 << result.bits) and getattr(rule, "saturates", True)
    return rule.encode(factor.clamp(-rule.largest, rule.largest) if beyond else factor)


def bounds(
    result: QParams, low: float | None = None, high: float | None = None, rule: QuantizeRule = RECIPROCAL
) -> dict[str, Any]:
    """The bounds and format options of an operator whose result is also limited to the reals [low, high].

    `rule` quantizes these reals.
    """
    qtype = result.qtype
    limits = {"low": qtype.qmin, "high": qtype.qmax}
    for name, value in (("low", low), ("high", high)):
        if value is not None and abs(value) != float("inf"):
            zero = result.zero_points().flatten()[0].cpu()
            code = rule.codes(torch.tensor(value, dtype=torch.float32), result.scale.cpu(), zero).item()
            limits[name] = int(min(max(code, qtype.qmin), qtype.qmax))
    return {**limits, "format": str(qtype)}


def check_float_tensors(node: fx.Node) -> Verdict:
    """What every lowering needs: a float32 tensor computed from float32 tensors of known shape.

    Operands and results that the op table calls plain are masks or indices and need not be float32.
    """
    spec = tensor_spec(node)
    if quant_rule(node) is not QuantRule.PLAIN and (spec is None or spec.dtype is not torch.float32):
        return no(f"its result is {info(node).value or 'unknown'}, not a float32 tensor", node)
    for name, operand in coded_operands(node):
        theirs = tensor_spec(operand)
        if theirs is None or theirs.dtype is not torch.float32:
            return no(f"its operand {name} is {info(operand).value or 'unknown'}, not a float32 tensor", node)
    return yes()


def takes_numbers(target: Target, op: str) -> bool:
    """Whether the target computes an operator with a number in place of codes."""
    rule = target.rule(op)
    return rule is None or rule.numbers


def is_number(value: Any) -> bool:
    """Whether an operand is a plain finite number."""
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def batch_is_free(node: fx.Node) -> bool:
    """Whether the graph serves any batch size, so that dimension 0 must not enter a constant."""
    owner = node.graph.owning_module
    return isinstance(owner, fx.GraphModule) and graph_info(owner).batch_fixed is None


def sum_rule(arithmetic: Arithmetic) -> RequantizeRule:
    """The rule of a sum of any terms.

    Raises:
        QuantizationError: the target only knows one engine's sum of two.
    """
    if not isinstance(arithmetic.rule, RequantizeRule):
        raise QuantizationError(
            f"{arithmetic.rule} defines no sum of several terms", fix="leave this operator in float"
        )
    return arithmetic.rule


def adds_constants(target: Target, op: str) -> bool:
    """Whether the target can add a constant where it rescales, as `x * w + b` needs."""
    return isinstance(target.step("sum", op).rule, RequantizeRule)


LOWERINGS: dict[str, Lowering] = {}


def register_lowering(name: str, lowering: Lowering) -> Lowering:
    """Adds a lowering under the name that op-table entries use.

    Raises:
        UserError: the name is taken.
    """
    if name in LOWERINGS:
        raise UserError(f"a lowering named {name!r} exists already", fix="choose another name")
    LOWERINGS[name] = lowering
    return lowering


def lowering_of(node: fx.Node) -> Lowering | None:
    """The lowering of a node's operator; None if it has none.

    Raises:
        UserError: the op table names one that is not registered.
    """
    name = info(node).op.lowering
    if name is None:
        return None
    if name not in LOWERINGS:
        raise UserError(
            f"no lowering is named {name!r}",
            where=where(node),
            why=f"the entry of {info(node).op} in the op table names it",
            fix=f"{did_you_mean(name, LOWERINGS)} A lowering of your own is added by register_lowering.",
        )
    return LOWERINGS[name]


def support(node: fx.Node, target: Target) -> Verdict:
    """Whether a call can run in integers on `target`, and if not, why."""
    op, lowering = info(node).op, lowering_of(node)
    if info(node).in_place or info(node).unstable:
        return no("its memory is written in place", node)
    if lowering is None:
        found = info(node).float_reason  # of the pass that should have taken it apart
        if found is not None:
            return no(found, node)
        return no(op.refusal or f"no integer form of {called_name(node) if op is OPAQUE else op} is known", node)
    if target.rule(op.name) is None:
        return no(f"{target.name} has no {op}", node)
    verdict = has_options(node, target) and lowering.supports(node, target)
    return verdict if not verdict else check_float_tensors(node) if _is_tensor(node) else yes()


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(info(node).value, tuple)


_PLAIN_DTYPES = (torch.bool, torch.int64)


def coded(value: Any, qparams: QParams | None) -> Any:
    """A value's specification once it holds codes; truth values and indices beside it stay what they are."""
    if qparams is None:
        return value
    if isinstance(value, tuple):
        return tuple(coded(entry, qparams) for entry in value)
    if not isinstance(value, TensorSpec) or value.dtype in _PLAIN_DTYPES:
        return value
    return TensorSpec(value.shape, qparams.qtype.storage)
