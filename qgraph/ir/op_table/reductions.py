"""Pooling and reductions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import Function, Op, OpKind, QuantRule
from qgraph.ir.op_table.define import args, aten, define, uniform


def _pool_options(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "output_size")
    found = {name: uniform(values[name]) for name in names if name in values}
    if "stride" in found and found["stride"] == found["kernel_size"]:
        found["stride"] = None
    return found


def _max_pool(name: str, module: type[nn.Module], function: Function, inner: Function) -> Op:
    return define(
        name,
        OpKind.SELECT,
        lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (None),
        target=function,
        spelled=((inner, args("input kernel_size stride padding dilation ceil_mode")),),
        modules=(module,),
        quant=QuantRule.SAME,
        lowering="max_pool",
        canonical=_pool_options,
    )


MAX_POOL1D = _max_pool("max_pool1d", nn.MaxPool1d, F.max_pool1d, torch.max_pool1d)
MAX_POOL2D = _max_pool("max_pool2d", nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
MAX_POOL3D = _max_pool("max_pool3d", nn.MaxPool3d, F.max_pool3d, torch.max_pool3d)

AVG_POOL1D = define(
    "avg_pool1d",
    OpKind.REDUCE,
    lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True: None,
    target=F.avg_pool1d,
    modules=(nn.AvgPool1d,),
    quant=QuantRule.OWN,
    lowering="avg_pool",
    canonical=_pool_options,
)


def _avg_pool(name: str, module: type[nn.Module], function: Function) -> Op:
    def example(  # type: ignore[no-untyped-def]
        input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        return None

    return define(
        name,
        OpKind.REDUCE,
        example,
        target=function,
        modules=(module,),
        quant=QuantRule.OWN,
        lowering="avg_pool",
        canonical=_pool_options,
    )


AVG_POOL2D = _avg_pool("avg_pool2d", nn.AvgPool2d, F.avg_pool2d)
AVG_POOL3D = _avg_pool("avg_pool3d", nn.AvgPool3d, F.avg_pool3d)


def _adaptive(name: str, module: type[nn.Module], function: Function, kind: OpKind, **more: Any) -> Op:
    return define(
        name, kind, lambda input, output_size: None, target=function, modules=(module,), canonical=_pool_options, **more
    )


_AVERAGES = {"quant": QuantRule.OWN, "lowering": "adaptive_avg_pool"}
ADAPTIVE_AVG_POOL1D = _adaptive(
    "adaptive_avg_pool1d", nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d, OpKind.REDUCE, **_AVERAGES
)
ADAPTIVE_AVG_POOL2D = _adaptive(
    "adaptive_avg_pool2d", nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, OpKind.REDUCE, **_AVERAGES
)
ADAPTIVE_AVG_POOL3D = _adaptive(
    "adaptive_avg_pool3d", nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d, OpKind.REDUCE, **_AVERAGES
)
MEAN = define(
    "mean",
    OpKind.REDUCE,
    lambda input, dim=None, keepdim=False, dtype=None: None,
    target=torch.mean,
    spelled=(aten.mean.dim, "mean"),
    quant=QuantRule.OWN,
    lowering="reduce",
)
SUM = define(
    "sum",
    OpKind.REDUCE,
    lambda input, dim=None, keepdim=False, dtype=None: None,
    target=torch.sum,
    spelled=(aten.sum.dim_IntList, "sum"),
    quant=QuantRule.OWN,
    lowering="reduce",
)
