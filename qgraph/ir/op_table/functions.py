"""Further nonlinear functions of one value, computed by a table, and those that jump."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import Function, Op, OpKind, QuantRule, ShapeRule, Spelling
from qgraph.ir.op_table.define import INPLACE_FLAG, args, aten, define

_ACTIVATION = args("input inplace", ignored=INPLACE_FLAG)


def _function(name: str, function: Function, example: Callable[..., object] = lambda input: None, **more: Any) -> Op:
    return define(
        name,
        OpKind.TABLE,
        example,
        target=function,
        quant=QuantRule.OWN,
        lowering=more.pop("lowering", "table"),
        scalar_function=more.pop("scalar_function", function),
        shape=ShapeRule.SAME,
        **more,
    )


def _of_tensor(name: str, *others: Function, **more: Any) -> Op:
    """A function that is also a method, has a form in place, and is called the same everywhere."""
    function, writes = getattr(torch, name), getattr(torch, f"{name}_", None)
    return _function(
        name,
        function,
        spelled=(*others, getattr(aten, name).default, name),
        in_place=(f"{name}_", *(() if writes is None else (writes,))),
        **more,
    )


def _only(count: int) -> Callable[[tuple[Any, ...], Any], bool]:
    """Recognizes calls with more than `count` arguments: the overload has scales that no module writes."""
    return lambda values, named: len(values) + len(named) > count


ERF = _of_tensor("erf", torch.special.erf)
EXP2 = _of_tensor("exp2", torch.special.exp2)
EXPM1 = _of_tensor("expm1", torch.special.expm1)
LOG = _of_tensor("log")
LOG2 = _of_tensor("log2")
LOG10 = _of_tensor("log10")
LOG1P = _of_tensor("log1p", torch.special.log1p)
SQRT = _of_tensor("sqrt")
SIN = _of_tensor("sin")
COS = _of_tensor("cos")
TAN = _of_tensor("tan")
ATAN = _function(
    "atan",
    torch.atan,
    spelled=(torch.arctan, aten.atan.default, "atan", "arctan"),
    in_place=("atan_", "arctan_", torch.atan_, torch.arctan_),
)
ASINH = _function(
    "asinh",
    torch.asinh,
    spelled=(torch.arcsinh, aten.asinh.default, "asinh", "arcsinh"),
    in_place=("asinh_", "arcsinh_", torch.asinh_, torch.arcsinh_),
)
LOGIT = _function(
    "logit",
    torch.logit,
    lambda input, eps=None: None,
    spelled=(torch.special.logit, aten.logit.default, "logit"),
    in_place=("logit_", torch.logit_),
)
MISH = _function("mish", F.mish, spelled=((F.mish, _ACTIVATION), aten.mish.default), modules=(nn.Mish,))
ELU = _function(
    "elu",
    F.elu,
    lambda input, alpha=1.0: None,
    spelled=(
        (F.elu, args("input alpha inplace", ignored=INPLACE_FLAG)),
        (aten.elu.default, args("input alpha", unless=_only(2))),
    ),
    in_place=(F.elu_,),
    modules=(nn.ELU,),
)
SELU = _function(
    "selu",
    F.selu,
    spelled=((F.selu, _ACTIVATION), torch.selu, aten.selu.default),
    in_place=(torch.selu_,),
    modules=(nn.SELU,),
)
CELU = _function(
    "celu",
    F.celu,
    lambda input, alpha=1.0: None,
    spelled=((F.celu, args("input alpha inplace", ignored=INPLACE_FLAG)), torch.celu, aten.celu.default),
    in_place=(torch.celu_,),
    modules=(nn.CELU,),
)
SOFTPLUS = _function(
    "softplus",
    F.softplus,
    lambda input, beta=1.0, threshold=20.0: None,
    spelled=(aten.softplus.default,),
    modules=(nn.Softplus,),
)
SOFTSIGN = _function("softsign", F.softsign, modules=(nn.Softsign,))
LOGSIGMOID = _function("logsigmoid", F.logsigmoid, modules=(nn.LogSigmoid,))
TANHSHRINK = _function("tanhshrink", F.tanhshrink, modules=(nn.Tanhshrink,))
HARDSHRINK = _function(
    "hardshrink",
    F.hardshrink,
    lambda input, lambd=0.5: None,
    spelled=(torch.hardshrink, aten.hardshrink.default, "hardshrink"),
    modules=(nn.Hardshrink,),
)
SOFTSHRINK = _function(
    "softshrink",
    F.softshrink,
    lambda input, lambd=0.5: None,
    spelled=(aten.softshrink.default,),
    modules=(nn.Softshrink,),
)


_RAISED = Spelling(("exponent", "input"))
_SQUARED = args("input", exponent=2)
POW = define(
    "pow",
    OpKind.TABLE,
    lambda input, exponent: None,
    "input exponent",
    target=torch.pow,
    spelled=(
        operator.pow,
        aten.pow.Tensor_Scalar,
        aten.pow.Scalar,
        "pow",
        "__pow__",
        ("__rpow__", _RAISED),
        (torch.square, _SQUARED),
        (aten.square.default, _SQUARED),
        ("square", _SQUARED),
    ),
    in_place=("pow_", "__ipow__", operator.ipow, ("square_", _SQUARED), (torch.square_, _SQUARED)),
    quant=QuantRule.OWN,
    lowering="pow",
    shape=ShapeRule.BROADCAST,
)


# --- functions that jump: no table between entries holds them ------------------------------------------------------

SIGN = _of_tensor("sign", torch.sgn, lowering="steps")
FLOOR = _of_tensor("floor", lowering="steps")
CEIL = _of_tensor("ceil", lowering="steps")
TRUNC = _function(
    "trunc",
    torch.trunc,
    spelled=(torch.fix, aten.trunc.default, "trunc", "fix"),
    in_place=("trunc_", "fix_", torch.trunc_, torch.fix_),
    lowering="steps",
)
ROUND = _function(
    "round",
    torch.round,
    lambda input, decimals=0: None,
    spelled=(aten.round.default, "round"),
    in_place=("round_", torch.round_),
    lowering="steps",
)
