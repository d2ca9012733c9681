"""Operators on the two or three dimensions of space: sampling at positions, windows as columns, shuffles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table.define import define, uniform


def _grid_options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"align_corners": bool(values["align_corners"])}


GRID_SAMPLE = define(
    "grid_sample",
    OpKind.SAMPLE,
    lambda input, grid, mode="bilinear", padding_mode="zeros", align_corners=False: None,
    "input grid",
    target=QF.grid_sample,
    spelled=(F.grid_sample,),
    positions=("grid",),
    quant=lambda values: QuantRule.SAME if values["mode"] == "nearest" else QuantRule.OWN,
    lowering="grid_sample",
    canonical=_grid_options,
)
PIXEL_SHUFFLE = define(
    "pixel_shuffle",
    OpKind.MOVE,
    lambda input, upscale_factor: None,
    target=F.pixel_shuffle,
    spelled=(torch.pixel_shuffle,),
    modules=(nn.PixelShuffle,),
    quant=QuantRule.SAME,
    lowering="move",
)
PIXEL_UNSHUFFLE = define(
    "pixel_unshuffle",
    OpKind.MOVE,
    lambda input, downscale_factor: None,
    target=F.pixel_unshuffle,
    spelled=(torch.pixel_unshuffle,),
    modules=(nn.PixelUnshuffle,),
    quant=QuantRule.SAME,
    lowering="move",
)
CHANNEL_SHUFFLE = define(
    "channel_shuffle",
    OpKind.MOVE,
    lambda input, groups: None,
    target=F.channel_shuffle,
    spelled=(torch.channel_shuffle,),
    modules=(nn.ChannelShuffle,),
    quant=QuantRule.SAME,
    lowering="move",
)


def _window_options(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kernel_size", "dilation", "padding", "stride")
    return {name: uniform(values[name]) for name in names}


UNFOLD = define(
    "unfold",
    OpKind.MOVE,
    lambda input, kernel_size, dilation=1, padding=0, stride=1: None,
    target=F.unfold,
    modules=(nn.Unfold,),
    quant=QuantRule.SAME,
    lowering="unfold",
    canonical=_window_options,
)
FOLD = define(
    "fold",
    OpKind.REDUCE,
    lambda input, output_size, kernel_size, dilation=1, padding=0, stride=1: None,
    target=F.fold,
    modules=(nn.Fold,),
    quant=QuantRule.OWN,
    lowering="fold",
    canonical=_window_options,
)
WINDOWS = define(
    "windows",
    OpKind.MOVE,
    lambda input, dimension, size, step: None,
    target=QF.windows,
    spelled=("unfold",),
    quant=QuantRule.SAME,
    lowering="move",
)
