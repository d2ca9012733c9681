"""Operators whose results are codes of their operands, or bounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table.define import INPLACE_FLAG, args, aten, define

RELU = define(
    "relu",
    OpKind.SELECT,
    lambda input: None,
    target=F.relu,
    spelled=(
        (F.relu, args("input inplace", ignored=INPLACE_FLAG)),
        torch.relu,
        aten.relu.default,
        "relu",
    ),
    in_place=("relu_", torch.relu_, aten.relu_.default),
    modules=(nn.ReLU,),
    quant=QuantRule.SAME,
    shape=ShapeRule.SAME,
    lowering="relu",
)
RELU6 = define(
    "relu6",
    OpKind.SELECT,
    lambda input: None,
    target=F.relu6,
    spelled=((F.relu6, args("input inplace", ignored=INPLACE_FLAG)), aten.relu6.default),
    modules=(nn.ReLU6,),
    quant=QuantRule.OWN,
    shape=ShapeRule.SAME,
    lowering="clamp",
)
_BOUNDS = {"min_val": "min", "max_val": "max"}
CLAMP = define(
    "clamp",
    OpKind.SELECT,
    lambda input, min=None, max=None: None,
    target=torch.clamp,
    spelled=(
        torch.clip,
        (F.hardtanh, args("input min max inplace", ignored=INPLACE_FLAG, renamed=_BOUNDS, min=-1.0, max=1.0)),
        aten.clamp.default,
        (aten.hardtanh.default, args("input min max", renamed=_BOUNDS, min=-1.0, max=1.0)),
        "clamp",
        "clip",
        ("clamp_min", args("input min")),
        ("clamp_max", args("input max")),
        (torch.clamp_min, args("input min")),
        (torch.clamp_max, args("input max")),
    ),
    in_place=(
        "clamp_",
        "clip_",
        torch.clamp_,
        ("clamp_min_", args("input min")),
        ("clamp_max_", args("input max")),
        (F.hardtanh_, args("input min max", renamed=_BOUNDS, min=-1.0, max=1.0)),
    ),
    modules={nn.Hardtanh: {"min": "min_val", "max": "max_val"}},
    quant=QuantRule.OWN,
    lowering="clamp",
)
AMAX = define(
    "amax",
    OpKind.SELECT,
    lambda input, dim=(), keepdim=False: None,
    target=torch.amax,
    spelled=(aten.amax.default, "amax"),
    quant=QuantRule.SAME,
    lowering="move",
)
AMIN = define(
    "amin",
    OpKind.SELECT,
    lambda input, dim=(), keepdim=False: None,
    target=torch.amin,
    spelled=(aten.amin.default, "amin"),
    quant=QuantRule.SAME,
    lowering="move",
)
