"""Data movement, resampling, identities and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import Fixed, Function, Op, OpKind, QuantRule, ShapeRule, Spelling
from qgraph.ir.op_table.define import args, aten, define, renamed, uniform


def _move(name: str, function: Function, example: Callable[..., object], **more: Any) -> Op:
    more.setdefault("lowering", "move")
    return define(name, OpKind.MOVE, example, target=function, quant=QuantRule.SAME, **more)


def _names_a_dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


RESHAPE = _move(
    "reshape",
    torch.reshape,
    lambda input, shape: None,
    spelled=(
        ("reshape", args("input shape", packed="shape")),
        ("view", args("input shape", packed="shape", renamed={"size": "shape"}, unless=_names_a_dtype)),
        aten.view.default,
        aten.reshape.default,
    ),
)
FLATTEN = _move(
    "flatten",
    torch.flatten,
    lambda input, start_dim=0, end_dim=-1: None,
    spelled=("flatten",),
    modules=(nn.Flatten,),
)
UNFLATTEN = _move(
    "unflatten",
    torch.unflatten,
    lambda input, dim, sizes: None,
    spelled=("unflatten",),
    modules={nn.Unflatten: {"sizes": "unflattened_size"}},
)
PERMUTE = _move(
    "permute",
    torch.permute,
    lambda input, dims: None,
    spelled=(aten.permute.default, ("permute", args("input dims", packed="dims"))),
)
TRANSPOSE = _move(
    "transpose",
    torch.transpose,
    lambda input, dim0, dim1: None,
    spelled=(
        (torch.swapaxes, renamed(axis0="dim0", axis1="dim1")),
        torch.swapdims,
        aten.transpose.int,
        "transpose",
        ("swapaxes", renamed(axis0="dim0", axis1="dim1")),
        "swapdims",
        ("t", args("input", dim0=0, dim1=1)),
        (torch.t, args("input", dim0=0, dim1=1)),
    ),
)
MOVEDIM = _move(
    "movedim",
    torch.movedim,
    lambda input, source, destination: None,
    spelled=(torch.moveaxis, "movedim", "moveaxis"),
)
REPEAT_INTERLEAVE = _move(
    "repeat_interleave",
    torch.repeat_interleave,
    lambda input, repeats, dim=None, output_size=None: None,
    spelled=(("repeat_interleave", args("input repeats dim output_size")),),
)
EXPAND_AS = define(
    "expand_as",
    OpKind.MOVE,
    lambda input, other: None,
    "input other",
    target=torch.Tensor.expand_as,
    spelled=("expand_as",),
    plain=("other",),  # read for its shape
    quant=QuantRule.SAME,
    lowering="move",
)
SQUEEZE = _move(
    "squeeze",
    torch.squeeze,
    lambda input, dim=None: None,
    spelled=("squeeze", aten.squeeze.dim),
)
UNSQUEEZE = _move(
    "unsqueeze",
    torch.unsqueeze,
    lambda input, dim: None,
    spelled=("unsqueeze", aten.unsqueeze.default),
)
EXPAND = _move(
    "expand",
    torch.broadcast_to,
    lambda input, size: None,
    spelled=(
        ("expand", args("input size", packed="size")),
        ("broadcast_to", args("input size")),
        aten.expand.default,
    ),
)
REPEAT = _move(
    "repeat",
    torch.tile,
    lambda input, dims: None,
    spelled=(
        ("repeat", args("input dims", packed="dims", renamed={"repeats": "dims"})),
        ("tile", args("input dims", packed="dims")),
    ),
)
SLICE = _move(
    "slice",
    operator.getitem,
    lambda input, index: None,
    spelled=("__getitem__",),
    lowering="slice",
)
SPLIT = _move(
    "split",
    torch.split,
    lambda input, split_size_or_sections, dim=0: None,
    spelled=(
        (torch.functional.split, args("input split_size_or_sections dim")),
        (torch.Tensor.split, args("input split_size_or_sections dim")),
        ("split", args("input split_size_or_sections dim")),
    ),
)
CHUNK = _move("chunk", torch.chunk, lambda input, chunks, dim=0: None, spelled=("chunk",))
UNBIND = _move("unbind", torch.unbind, lambda input, dim=0: None, spelled=("unbind",))
SELECT = _move("select", torch.select, lambda input, dim, index: None, spelled=("select",))
NARROW = _move("narrow", torch.narrow, lambda input, dim, start, length: None, spelled=("narrow",))
INDEX_SELECT = _move(
    "index_select",
    torch.index_select,
    lambda input, dim, index: None,
    spelled=("index_select", aten.index_select.default),
)
ROLL = _move("roll", torch.roll, lambda input, shifts, dims=None: None, spelled=("roll",))
FLIP = _move(
    "flip",
    torch.flip,
    lambda input, dims: None,
    spelled=(("flip", args("input dims", packed="dims")),),
)
SET_ITEM = define(
    "set_item",
    OpKind.MOVE,
    lambda input, index, value: None,
    "input value",
    target=QF.set_item,
    in_place=(operator.setitem, "__setitem__"),
    refusal="a write into a part of a tensor has no integer form; write it with torch.cat or torch.where",
)
COPY_TO = define(
    "copy_to",
    OpKind.MOVE,
    lambda input, other: None,
    "input other",
    target=QF.copy_to,
    in_place=(("copy_", args("input other non_blocking", ignored="non_blocking")),),
    refusal="a write into a part of a tensor has no integer form; write it with torch.cat or torch.where",
)
_PADS = {"pad": "padding"}
_MIRRORED: dict[str, str | Fixed] = {"pad": "padding", "mode": Fixed("reflect")}
_REPEATED: dict[str, str | Fixed] = {"pad": "padding", "mode": Fixed("replicate")}
_CIRCULAR: dict[str, str | Fixed] = {"pad": "padding", "mode": Fixed("circular")}
_CONSTANT_PADS = {"pad": "padding", "value": "value"}
PAD = define(
    "pad",
    OpKind.MOVE,
    lambda input, pad, mode="constant", value=None: None,
    target=F.pad,
    modules={
        nn.ZeroPad1d: _PADS,
        nn.ZeroPad2d: _PADS,
        nn.ZeroPad3d: _PADS,
        nn.ConstantPad1d: _CONSTANT_PADS,
        nn.ConstantPad2d: _CONSTANT_PADS,
        nn.ConstantPad3d: _CONSTANT_PADS,
        nn.ReflectionPad1d: _MIRRORED,
        nn.ReflectionPad2d: _MIRRORED,
        nn.ReflectionPad3d: _MIRRORED,
        nn.ReplicationPad1d: _REPEATED,
        nn.ReplicationPad2d: _REPEATED,
        nn.ReplicationPad3d: _REPEATED,
        nn.CircularPad1d: _CIRCULAR,
        nn.CircularPad2d: _CIRCULAR,
        nn.CircularPad3d: _CIRCULAR,
    },
    quant=lambda values: QuantRule.SAME if values["mode"] != "constant" or not values["value"] else QuantRule.OWN,
    lowering="pad",
    canonical=lambda values: {"value": values["value"] or None},
)


def _resize_options(values: Mapping[str, Any]) -> dict[str, Any]:
    factor = uniform(values["scale_factor"])
    return {"size": uniform(values["size"]), "scale_factor": float(factor) if isinstance(factor, int) else factor}


INTERPOLATE = define(
    "interpolate",
    OpKind.SAMPLE,
    lambda input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False: (None),
    target=F.interpolate,
    modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    quant=lambda values: QuantRule.SAME if values["mode"].startswith("nearest") else QuantRule.OWN,
    lowering="resize",
    canonical=_resize_options,
)


def _dropout(*, flag: str = "training", default: bool = True) -> Spelling:
    """A dropout that is off: one that is on draws random numbers and is no identity."""

    def is_on(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return bool(args[2] if len(args) > 2 else kwargs.get(flag, default))

    return args(f"input p {flag} inplace", ignored=f"p {flag} inplace", unless=is_on)


IDENTITY = define(
    "identity",
    OpKind.MOVE,
    lambda input: None,
    spelled=(
        torch.clone,
        torch.detach,
        torch.alias_copy,
        (F.dropout, _dropout()),
        (F.dropout1d, _dropout()),
        (F.dropout2d, _dropout()),
        (F.dropout3d, _dropout()),
        (F.alpha_dropout, _dropout(default=False)),
        (F.feature_alpha_dropout, _dropout(default=False)),
        (torch.dropout, _dropout(flag="train")),
        ("contiguous", args("input memory_format", ignored="memory_format")),
        ("clone", args("input memory_format", ignored="memory_format")),
        "detach",
    ),
    modules=(
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ),
    shape=ShapeRule.SAME,
    quant=QuantRule.SAME,
    lowering="move",
)


def _overload_of_to(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Parameters of `x.to(dtype)`, `x.to(device, dtype)` and `x.to(other)`, by the first argument."""
    first = args[1] if len(args) > 1 else None
    kinds = ("dtype",) if isinstance(first, torch.dtype) else ("device", "dtype")
    if first is not None and not isinstance(first, (torch.dtype, torch.device, str, int)):
        kinds = ("other",)
    return ("input", *kinds, "non_blocking", "copy")


_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "short": torch.int16,
    "char": torch.int8,
    "byte": torch.uint8,
    "bool": torch.bool,
}
CAST = define(
    "cast",
    OpKind.MOVE,
    lambda input, other=None, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None: None,
    "input other",
    spelled=(
        ("to", Spelling(_overload_of_to)),
        ("type", args("input dtype non_blocking")),
        ("type_as", args("input other")),
        ("cpu", args("input memory_format", device="cpu")),
        ("cuda", args("input device non_blocking memory_format", device="cuda")),
        *((name, args("input memory_format", dtype=dtype)) for name, dtype in _CASTS.items()),
    ),
    refusal="formats are the plan's choice; a cast ends what is quantized",
)
