"""Nonlinear functions of one value, computed by a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import Function, Op, OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table.define import INPLACE_FLAG, args, aten, define


def _table(name: str, function: Function, example: Callable[..., object], **more: Any) -> Op:
    return define(
        name,
        OpKind.TABLE,
        example,
        target=function,
        quant=QuantRule.OWN,
        lowering="table",
        scalar_function=more.pop("scalar_function", function),
        shape=ShapeRule.SAME,
        **more,
    )


def _hardswish(x: torch.Tensor) -> torch.Tensor:
    return x * (x + 3).clamp(0, 6) / 6


SIGMOID = _table(
    "sigmoid",
    torch.sigmoid,
    lambda input: None,
    spelled=(F.sigmoid, torch.special.expit, aten.sigmoid.default, "sigmoid"),
    in_place=("sigmoid_", torch.sigmoid_),
    modules=(nn.Sigmoid,),
)
TANH = _table(
    "tanh",
    torch.tanh,
    lambda input: None,
    spelled=(F.tanh, aten.tanh.default, "tanh"),
    in_place=("tanh_", torch.tanh_),
    modules=(nn.Tanh,),
)
SILU = _table(
    "silu",
    F.silu,
    lambda input: None,
    spelled=((F.silu, args("input inplace", ignored=INPLACE_FLAG)), aten.silu.default),
    modules=(nn.SiLU,),
)
GELU = _table(
    "gelu",
    F.gelu,
    lambda input, approximate="none": None,
    spelled=(aten.gelu.default,),
    modules=(nn.GELU,),
)
HARDSWISH = _table(
    "hardswish",
    F.hardswish,
    lambda input: None,
    spelled=((F.hardswish, args("input inplace", ignored=INPLACE_FLAG)), aten.hardswish.default),
    modules=(nn.Hardswish,),
    scalar_function=_hardswish,
)
HARDSIGMOID = _table(
    "hardsigmoid",
    F.hardsigmoid,
    lambda input: None,
    spelled=((F.hardsigmoid, args("input inplace", ignored=INPLACE_FLAG)), aten.hardsigmoid.default),
    modules=(nn.Hardsigmoid,),
    scalar_function=lambda x: (x + 3).clamp(0, 6) / 6,
)
LEAKY_RELU = _table(
    "leaky_relu",
    F.leaky_relu,
    lambda input, negative_slope=0.01: None,
    spelled=(
        (F.leaky_relu, args("input negative_slope inplace", ignored=INPLACE_FLAG)),
        aten.leaky_relu.default,
    ),
    in_place=(torch.nn.functional.leaky_relu_,),
    modules=(nn.LeakyReLU,),
)
EXP = _table(
    "exp",
    torch.exp,
    lambda input: None,
    spelled=(aten.exp.default, "exp"),
    in_place=("exp_", torch.exp_),
)
RECIPROCAL = _table(
    "reciprocal",
    torch.reciprocal,
    lambda input: None,
    spelled=(aten.reciprocal.default, "reciprocal"),
    in_place=("reciprocal_", torch.reciprocal_),
)
RSQRT = _table(
    "rsqrt",
    QF.rsqrt_eps,
    lambda input, eps=0.0: None,
    spelled=((torch.rsqrt, args("input")), (aten.rsqrt.default, args("input")), ("rsqrt", args("input"))),
    in_place=(("rsqrt_", args("input")), (torch.rsqrt_, args("input"))),
)
