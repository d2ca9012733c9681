"""Operators that are taken apart before they are quantized, unless the target runs them as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir.op import OpKind, QuantRule, ShapeRule
from qgraph.ir.op_table.define import args, aten, define

BATCH_NORM = define(
    "batch_norm",
    OpKind.COMPOSITE,
    lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: None,
    "input running_mean running_var weight bias",
    target=F.batch_norm,
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    parameters=("running_mean", "running_var", "weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="batch_norm",
)
LAYER_NORM = define(
    "layer_norm",
    OpKind.COMPOSITE,
    lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None,
    "input weight bias",
    target=F.layer_norm,
    modules=(nn.LayerNorm,),
    parameters=("weight", "bias"),
    shape=ShapeRule.SAME,
    decomposition="layer_norm",
)
SOFTMAX = define(
    "softmax",
    OpKind.COMPOSITE,
    lambda input, dim=None, dtype=None: None,
    target=F.softmax,
    spelled=(
        (F.softmax, args("input dim _stacklevel dtype", ignored="_stacklevel")),
        torch.softmax,
        aten.softmax.int,
        "softmax",
    ),
    modules=(nn.Softmax,),
    shape=ShapeRule.SAME,
    quant=QuantRule.OWN,
    lowering="softmax",
    decomposition="softmax",
)
