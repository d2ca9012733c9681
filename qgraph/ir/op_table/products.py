"""Matrix products: convolutions, linear, matmul."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import Function, Op, OpKind, QuantRule
from qgraph.ir.op_table.define import SWAPPED, aten, define, renamed
from qgraph.nn import FUSED_CLASSES


def _conv(name: str, module: type[nn.Module], function: Function, overload: Function | None) -> Op:
    def example(  # type: ignore[no-untyped-def]
        input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", residual=None
    ):
        return None

    return define(
        name,
        OpKind.MATMUL,
        example,
        "input weight bias residual",
        target=function,
        spelled=() if overload is None else (overload,),
        modules=(module, FUSED_CLASSES[module]),
        parameters=("weight", "bias"),
        quant=QuantRule.OWN,
        lowering="conv",
    )


def _conv_transpose(name: str, module: type[nn.Module], function: Function, overload: Function) -> Op:
    def example(  # type: ignore[no-untyped-def]
        input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, residual=None
    ):
        return None

    return define(
        name,
        OpKind.MATMUL,
        example,
        "input weight bias residual",
        target=function,
        spelled=(overload,),
        modules=(module, FUSED_CLASSES[module]),
        parameters=("weight", "bias"),
        quant=QuantRule.OWN,
        lowering="conv",
    )


CONV1D = _conv("conv1d", nn.Conv1d, F.conv1d, aten.conv1d.default)
CONV2D = _conv("conv2d", nn.Conv2d, F.conv2d, aten.conv2d.default)
CONV3D = _conv("conv3d", nn.Conv3d, F.conv3d, aten.conv3d.default)
CONV_TRANSPOSE1D = _conv_transpose(
    "conv_transpose1d", nn.ConvTranspose1d, F.conv_transpose1d, aten.conv_transpose1d.default
)
CONV_TRANSPOSE2D = _conv_transpose(
    "conv_transpose2d", nn.ConvTranspose2d, F.conv_transpose2d, aten.conv_transpose2d.input
)
CONV_TRANSPOSE3D = _conv_transpose(
    "conv_transpose3d", nn.ConvTranspose3d, F.conv_transpose3d, aten.conv_transpose3d.input
)
LINEAR = define(
    "linear",
    OpKind.MATMUL,
    lambda input, weight, bias=None, residual=None: None,
    "input weight bias residual",
    target=F.linear,
    spelled=(aten.linear.default,),
    modules=(nn.Linear, FUSED_CLASSES[nn.Linear]),
    parameters=("weight", "bias"),
    quant=QuantRule.OWN,
    lowering="linear",
)
CONVOLUTIONS = (CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)
TRANSPOSED = (CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)
FUSABLE = (*CONVOLUTIONS, LINEAR)
MATMUL = define(
    "matmul",
    OpKind.MATMUL,
    lambda input, other: None,
    "input other",
    target=torch.matmul,
    spelled=(
        (torch.bmm, renamed(mat2="other")),
        (torch.mm, renamed(mat2="other")),
        (torch.mv, renamed(vec="other")),
        (torch.dot, renamed(tensor="other")),
        operator.matmul,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.mv.default,
        "matmul",
        "__matmul__",
        ("bmm", renamed(mat2="other")),
        ("mm", renamed(mat2="other")),
        ("mv", renamed(vec="other")),
        ("dot", renamed(tensor="other")),
        ("__rmatmul__", SWAPPED),
    ),
    quant=QuantRule.OWN,
    lowering="matmul",
)
