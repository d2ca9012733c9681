"""Comparisons, choices between values, and the larger or smaller of two."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import Function, Op, OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table.define import args, aten, define

SENTINEL = 1.0e4
"""A number this large, filled in for masked values, means "beyond every other": -1e4, -65504, -1e9 and -inf do."""


def is_sentinel(value: object) -> bool:
    """Whether a fill means "beyond every other value", not a quantity."""
    return isinstance(value, (int, float)) and not math.isnan(value) and abs(value) >= SENTINEL


def _comparison(name: str, long: str | None, python: Function) -> Op:
    function, packet = getattr(torch, name), getattr(aten, name)
    longer = () if long is None else (getattr(torch, long), long)
    return define(
        name,
        OpKind.SELECT,
        lambda input, other: None,
        "input other",
        target=function,
        spelled=(python, packet.Tensor, packet.Scalar, name, f"__{name}__", *longer),
        quant=QuantRule.PLAIN,
        lowering="compare",
    )


GT = _comparison("gt", "greater", operator.gt)
GE = _comparison("ge", "greater_equal", operator.ge)
LT = _comparison("lt", "less", operator.lt)
LE = _comparison("le", "less_equal", operator.le)
EQ = _comparison("eq", None, operator.eq)
NE = _comparison("ne", "not_equal", operator.ne)


def _extreme(name: str, overload: Function) -> Op:
    function = getattr(torch, name)
    return define(
        name,
        OpKind.SELECT,
        lambda input, other: None,
        "input other",
        target=function,
        spelled=(getattr(aten, name).default, overload, name),
        quant=QuantRule.OWN,
        lowering="extreme",
        commutative=True,
        shape=ShapeRule.BROADCAST,
    )


MAXIMUM = _extreme("maximum", aten.max.other)
MINIMUM = _extreme("minimum", aten.min.other)


def _choice_rule(values: Mapping[str, Any]) -> QuantRule:
    """Zero is a code of every scale, and what lies beyond every value becomes the last code; other numbers count."""
    chosen = [values[name] for name in ("input", "other", "value") if name in values]
    numbers = [value for value in chosen if isinstance(value, (int, float))]
    kept = bool(numbers) and all(value == 0 or is_sentinel(value) for value in numbers)
    return QuantRule.SAME if kept else QuantRule.OWN


WHERE = define(
    "where",
    OpKind.SELECT,
    lambda condition, input, other: None,
    "condition input other",
    target=torch.where,
    spelled=(
        # Of a condition alone it gives positions.
        (torch.where, args("condition input other", unless=lambda given, named: len(given) + len(named) < 3)),
        aten.where.self,
        aten.where.ScalarSelf,
        aten.where.ScalarOther,
        ("where", args("input condition other")),
    ),
    plain=("condition",),
    quant=_choice_rule,
    lowering="where",
)
MASKED_FILL = define(
    "masked_fill",
    OpKind.SELECT,
    lambda input, mask, value: None,
    "input mask value",
    target=torch.masked_fill,
    spelled=(aten.masked_fill.Scalar, aten.masked_fill.Tensor, "masked_fill"),
    in_place=("masked_fill_",),
    plain=("mask",),
    quant=_choice_rule,
    lowering="masked_fill",
    shape=ShapeRule.BROADCAST,
)
PRELU = define(
    "prelu",
    OpKind.SELECT,
    lambda input, weight: None,
    "input weight",
    target=F.prelu,
    spelled=(torch.prelu, aten.prelu.default, "prelu"),
    modules=(nn.PReLU,),
    parameters=("weight",),
    quant=QuantRule.OWN,
    lowering="prelu",
    shape=ShapeRule.SAME,
)
ABS = define(
    "abs",
    OpKind.SELECT,
    lambda input: None,
    target=torch.abs,
    spelled=(operator.abs, torch.absolute, aten.abs.default, "abs", "absolute", "__abs__"),
    in_place=("abs_", "absolute_", torch.abs_),
    quant=QuantRule.OWN,
    lowering="abs",
    shape=ShapeRule.SAME,
)
NEG = define(
    "neg",
    OpKind.ARITHMETIC,
    lambda input: None,
    target=torch.neg,
    spelled=(operator.neg, torch.negative, aten.neg.default, "neg", "negative", "__neg__"),
    in_place=("neg_", "negative_", torch.neg_),
    quant=QuantRule.OWN,
    lowering="neg",
    shape=ShapeRule.SAME,
)
