"""Sums, products and joins of values with scales of their own."""

from __future__ import annotations

import operator

import torch

from qgraph.ir.op import OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table.define import SWAPPED, aten, define
from qgraph.nn import Affine

ADD = define(
    "add",
    OpKind.ARITHMETIC,
    lambda input, other, alpha=1: None,
    "input other",
    target=torch.add,
    spelled=(operator.add, aten.add.Tensor, aten.add.Scalar, "add", "__add__", "__radd__"),
    in_place=(operator.iadd, "add_", "__iadd__", aten.add_.Tensor),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="add",
    commutative=True,
)
SUB = define(
    "sub",
    OpKind.ARITHMETIC,
    lambda input, other, alpha=1: None,
    "input other",
    target=torch.sub,
    spelled=(
        operator.sub,
        torch.subtract,
        (torch.rsub, SWAPPED),
        aten.sub.Tensor,
        "sub",
        "subtract",
        "__sub__",
        ("__rsub__", SWAPPED),
    ),
    in_place=(operator.isub, "sub_", "__isub__"),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="add",
)
MUL = define(
    "mul",
    OpKind.ARITHMETIC,
    lambda input, other: None,
    "input other",
    target=torch.mul,
    spelled=(
        operator.mul,
        torch.multiply,
        aten.mul.Tensor,
        "mul",
        "multiply",
        "__mul__",
        "__rmul__",
    ),
    in_place=(operator.imul, "mul_", "__imul__"),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="mul",
    commutative=True,
)
DIV = define(
    "div",
    OpKind.ARITHMETIC,
    lambda input, other, rounding_mode=None: None,
    "input other",
    target=torch.div,
    spelled=(
        operator.truediv,
        torch.divide,
        torch.true_divide,
        aten.div.Tensor,
        "div",
        "divide",
        "true_divide",
        "__truediv__",
        "__div__",
        ("__rdiv__", SWAPPED),
        ("__rtruediv__", SWAPPED),
    ),
    in_place=(operator.itruediv, "div_", "true_divide_", "__itruediv__"),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="mul",
    decomposition="div",
)
AFFINE = define(
    "affine",
    OpKind.ARITHMETIC,
    lambda input, weight, bias: None,
    "input weight bias",
    modules=(Affine,),
    parameters=("weight", "bias"),
    quant=QuantRule.OWN,
    lowering="affine",
    shape=ShapeRule.SAME,
)
CAT = define(
    "cat",
    OpKind.MOVE,
    lambda tensors, dim=0: None,
    "tensors",
    target=torch.cat,
    spelled=(torch.concat, torch.concatenate, aten.cat.default),
    quant=QuantRule.OWN,
    lowering="join",
)
STACK = define(
    "stack",
    OpKind.MOVE,
    lambda tensors, dim=0: None,
    "tensors",
    target=torch.stack,
    spelled=(aten.stack.default,),
    quant=QuantRule.OWN,
    lowering="join",
)
