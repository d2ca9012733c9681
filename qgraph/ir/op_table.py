"""The canonical operators: one entry each, with every spelling that means it.

To add an operator, add an entry here (or call `OPS.define` from your own package), then its lowering and
kernels; `docs/writing_a_pass.md` and `docs/architecture.md` show where. Reports, patterns, checks, lowering
and costs read this table and need no change.

Sections: graph structure; matrix products; arithmetic; tables; selection; pooling and reductions; movement;
composites; stubs.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.ir import functional as QF
from qgraph.ir.op import Function, Op, OpKind, OpTable, QuantRule, ShapeRule, Spelling
from qgraph.nn import FUSED_CLASSES, Affine, DeQuantStub, QuantStub

OPS = OpTable()

aten = torch.ops.aten
Target = Function | str


def _spell(*items: Target | tuple[Target, Spelling]) -> dict[Any, Spelling]:
    pairs = [item if isinstance(item, tuple) else (item, Spelling()) for item in items]
    return dict(pairs)


def _op(
    name: str,
    kind: OpKind,
    example: Callable[..., object],
    operands: str = "input",
    *,
    target: Function | None = None,
    spelled: tuple[Target | tuple[Target, Spelling], ...] = (),
    in_place: tuple[Target | tuple[Target, Spelling], ...] = (),
    modules: Mapping[type[nn.Module], Mapping[str, str]] | tuple[type[nn.Module], ...] = (),
    **more: Any,
) -> Op:
    """Defines an operator; `example` is never called, it only shows parameters and defaults."""
    spellings = _spell(*spelled)
    entry = Op(
        name=name,
        kind=kind,
        signature=inspect.signature(example),
        operands=tuple(operands.split()),
        target=target,
        functions={key: value for key, value in spellings.items() if not isinstance(key, str)},
        methods={key: value for key, value in spellings.items() if isinstance(key, str)},
        in_place=_spell(*in_place),
        modules=modules if isinstance(modules, Mapping) else {module: {} for module in modules},
        **more,
    )
    return OPS.define(entry)


def _args(
    names: str,
    *,
    ignored: str = "",
    packed: str | None = None,
    renamed: Mapping[str, str] | None = None,
    unless: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None,
    **fixed: object,
) -> Spelling:
    return Spelling(tuple(names.split()), packed, fixed, tuple(ignored.split()), renamed or {}, unless=unless)


def _renamed(**names: str) -> Spelling:
    return Spelling(renamed=names)


_SWAPPED = Spelling(swapped=True)
_FLAG = "inplace"


# --- graph structure ---------------------------------------------------------------------------------------

INPUT = _op("input", OpKind.INPUT, lambda: None, "")
OUTPUT = _op("output", OpKind.OUTPUT, lambda: None, "")
CONSTANT = _op("constant", OpKind.CONSTANT, lambda: None, "")
GUARD = _op("guard", OpKind.STRUCTURE, lambda: None, "")
OPAQUE = _op("opaque", OpKind.OPAQUE, lambda: None, "")
ITEM = _op("item", OpKind.STRUCTURE, lambda value, index: None, "value", target=QF.item)
FIELD = _op("field", OpKind.STRUCTURE, lambda value, name: None, "value", target=QF.field)
REBUILD = _op("rebuild", OpKind.STRUCTURE, lambda: None, "")
SCALAR = _op("scalar", OpKind.STRUCTURE, lambda: None, "")
SIZE = _op("size", OpKind.STRUCTURE, lambda input, dim=None: None, spelled=("size", aten.sym_size.int))

# --- matrix products ---------------------------------------------------------------------------------------


def _conv(name: str, module: type[nn.Module], function: Function, overload: Function | None) -> Op:
    def example(  # type: ignore[no-untyped-def]
        input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", residual=None
    ):
        return None

    return _op(
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

    return _op(
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
LINEAR = _op(
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
MATMUL = _op(
    "matmul",
    OpKind.MATMUL,
    lambda input, other: None,
    "input other",
    target=torch.matmul,
    spelled=(
        (torch.bmm, _renamed(mat2="other")),
        (torch.mm, _renamed(mat2="other")),
        operator.matmul,
        aten.matmul.default,
        aten.bmm.default,
        "matmul",
        "__matmul__",
        ("bmm", _renamed(mat2="other")),
        ("mm", _renamed(mat2="other")),
        ("__rmatmul__", _SWAPPED),
    ),
    quant=QuantRule.OWN,
    lowering="matmul",
)

# --- arithmetic --------------------------------------------------------------------------------------------

ADD = _op(
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
SUB = _op(
    "sub",
    OpKind.ARITHMETIC,
    lambda input, other, alpha=1: None,
    "input other",
    target=torch.sub,
    spelled=(
        operator.sub,
        torch.subtract,
        (torch.rsub, _SWAPPED),
        aten.sub.Tensor,
        "sub",
        "subtract",
        "__sub__",
        ("__rsub__", _SWAPPED),
    ),
    in_place=(operator.isub, "sub_", "__isub__"),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="add",
)
MUL = _op(
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
DIV = _op(
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
        ("__rdiv__", _SWAPPED),
        ("__rtruediv__", _SWAPPED),
    ),
    in_place=(operator.itruediv, "div_", "true_divide_", "__itruediv__"),
    quant=QuantRule.OWN,
    shape=ShapeRule.BROADCAST,
    lowering="mul",
    decomposition="div",
)
AFFINE = _op(
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
CAT = _op(
    "cat",
    OpKind.MOVE,
    lambda tensors, dim=0: None,
    "tensors",
    target=torch.cat,
    spelled=(torch.concat, torch.concatenate, aten.cat.default),
    quant=QuantRule.OWN,
    lowering="join",
)
STACK = _op(
    "stack",
    OpKind.MOVE,
    lambda tensors, dim=0: None,
    "tensors",
    target=torch.stack,
    spelled=(aten.stack.default,),
    quant=QuantRule.OWN,
    lowering="join",
)

# --- tables ------------------------------------------------------------------------------------------------


def _table(name: str, function: Function, example: Callable[..., object], **more: Any) -> Op:
    return _op(
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
    spelled=((F.silu, _args("input inplace", ignored=_FLAG)), aten.silu.default),
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
    spelled=((F.hardswish, _args("input inplace", ignored=_FLAG)), aten.hardswish.default),
    modules=(nn.Hardswish,),
    scalar_function=_hardswish,
)
HARDSIGMOID = _table(
    "hardsigmoid",
    F.hardsigmoid,
    lambda input: None,
    spelled=((F.hardsigmoid, _args("input inplace", ignored=_FLAG)), aten.hardsigmoid.default),
    modules=(nn.Hardsigmoid,),
    scalar_function=lambda x: (x + 3).clamp(0, 6) / 6,
)
LEAKY_RELU = _table(
    "leaky_relu",
    F.leaky_relu,
    lambda input, negative_slope=0.01: None,
    spelled=(
        (F.leaky_relu, _args("input negative_slope inplace", ignored=_FLAG)),
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
    spelled=((torch.rsqrt, _args("input")), (aten.rsqrt.default, _args("input")), ("rsqrt", _args("input"))),
    in_place=(("rsqrt_", _args("input")), (torch.rsqrt_, _args("input"))),
)

# --- selection: codes are kept or replaced by other codes --------------------------------------------------

RELU = _op(
    "relu",
    OpKind.SELECT,
    lambda input: None,
    target=F.relu,
    spelled=(
        (F.relu, _args("input inplace", ignored=_FLAG)),
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
RELU6 = _op(
    "relu6",
    OpKind.SELECT,
    lambda input: None,
    target=F.relu6,
    spelled=((F.relu6, _args("input inplace", ignored=_FLAG)), aten.relu6.default),
    modules=(nn.ReLU6,),
    quant=QuantRule.OWN,
    shape=ShapeRule.SAME,
    lowering="clamp",
)
_BOUNDS = {"min_val": "min", "max_val": "max"}
CLAMP = _op(
    "clamp",
    OpKind.SELECT,
    lambda input, min=None, max=None: None,
    target=torch.clamp,
    spelled=(
        torch.clip,
        (F.hardtanh, _args("input min max inplace", ignored=_FLAG, renamed=_BOUNDS, min=-1.0, max=1.0)),
        aten.clamp.default,
        (aten.hardtanh.default, _args("input min max", renamed=_BOUNDS, min=-1.0, max=1.0)),
        "clamp",
        "clip",
        ("clamp_min", _args("input min")),
        ("clamp_max", _args("input max")),
        (torch.clamp_min, _args("input min")),
        (torch.clamp_max, _args("input max")),
    ),
    in_place=(
        "clamp_",
        "clip_",
        torch.clamp_,
        ("clamp_min_", _args("input min")),
        ("clamp_max_", _args("input max")),
        (F.hardtanh_, _args("input min max", renamed=_BOUNDS, min=-1.0, max=1.0)),
    ),
    modules={nn.Hardtanh: {"min": "min_val", "max": "max_val"}},
    quant=QuantRule.OWN,
    lowering="clamp",
)
AMAX = _op(
    "amax",
    OpKind.SELECT,
    lambda input, dim=(), keepdim=False: None,
    target=torch.amax,
    spelled=(aten.amax.default, "amax"),
    quant=QuantRule.SAME,
    lowering="move",
)

# --- pooling and reductions --------------------------------------------------------------------------------


def _uniform(value: Any) -> Any:
    """`(3, 3)` as 3: torch repeats a number over the spatial dimensions."""
    equal = isinstance(value, (tuple, list)) and len(value) > 0 and all(entry is value[0] for entry in value)
    return value[0] if equal else value


def _pool_options(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "output_size")
    found = {name: _uniform(values[name]) for name in names if name in values}
    if "stride" in found and found["stride"] == found["kernel_size"]:
        found["stride"] = None
    return found


def _max_pool(name: str, module: type[nn.Module], function: Function, inner: Function) -> Op:
    return _op(
        name,
        OpKind.SELECT,
        lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (None),
        target=function,
        spelled=((inner, _args("input kernel_size stride padding dilation ceil_mode")),),
        modules=(module,),
        quant=QuantRule.SAME,
        lowering="max_pool",
        canonical=_pool_options,
    )


MAX_POOL1D = _max_pool("max_pool1d", nn.MaxPool1d, F.max_pool1d, torch.max_pool1d)
MAX_POOL2D = _max_pool("max_pool2d", nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
MAX_POOL3D = _max_pool("max_pool3d", nn.MaxPool3d, F.max_pool3d, torch.max_pool3d)

AVG_POOL1D = _op(
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

    return _op(
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
    return _op(
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
MEAN = _op(
    "mean",
    OpKind.REDUCE,
    lambda input, dim=None, keepdim=False, dtype=None: None,
    target=torch.mean,
    spelled=(aten.mean.dim, "mean"),
    quant=QuantRule.OWN,
    lowering="reduce",
)
SUM = _op(
    "sum",
    OpKind.REDUCE,
    lambda input, dim=None, keepdim=False, dtype=None: None,
    target=torch.sum,
    spelled=(aten.sum.dim_IntList, "sum"),
    quant=QuantRule.OWN,
    lowering="reduce",
)

# --- movement ----------------------------------------------------------------------------------------------


def _move(name: str, function: Function, example: Callable[..., object], **more: Any) -> Op:
    more.setdefault("lowering", "move")
    return _op(name, OpKind.MOVE, example, target=function, quant=QuantRule.SAME, **more)


def _names_a_dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


RESHAPE = _move(
    "reshape",
    torch.reshape,
    lambda input, shape: None,
    spelled=(
        ("reshape", _args("input shape", packed="shape")),
        ("view", _args("input shape", packed="shape", renamed={"size": "shape"}, unless=_names_a_dtype)),
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
    spelled=(aten.permute.default, ("permute", _args("input dims", packed="dims"))),
)
TRANSPOSE = _move(
    "transpose",
    torch.transpose,
    lambda input, dim0, dim1: None,
    spelled=(
        (torch.swapaxes, _renamed(axis0="dim0", axis1="dim1")),
        torch.swapdims,
        aten.transpose.int,
        "transpose",
        ("swapaxes", _renamed(axis0="dim0", axis1="dim1")),
        "swapdims",
        ("t", _args("input", dim0=0, dim1=1)),
        (torch.t, _args("input", dim0=0, dim1=1)),
    ),
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
        ("expand", _args("input size", packed="size")),
        ("broadcast_to", _args("input size")),
        aten.expand.default,
    ),
)
REPEAT = _move(
    "repeat",
    torch.tile,
    lambda input, dims: None,
    spelled=(
        ("repeat", _args("input dims", packed="dims", renamed={"repeats": "dims"})),
        ("tile", _args("input dims", packed="dims")),
    ),
)
SLICE = _move(
    "slice",
    operator.getitem,
    lambda input, index: None,
    spelled=("__getitem__",),
)
SPLIT = _move(
    "split",
    torch.split,
    lambda input, split_size_or_sections, dim=0: None,
    spelled=(
        (torch.functional.split, _args("input split_size_or_sections dim")),
        (torch.Tensor.split, _args("input split_size_or_sections dim")),
        ("split", _args("input split_size_or_sections dim")),
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
    spelled=(("flip", _args("input dims", packed="dims")),),
)
SET_ITEM = _op(
    "set_item",
    OpKind.MOVE,
    lambda input, index, value: None,
    "input value",
    target=QF.set_item,
    in_place=(operator.setitem, "__setitem__"),
)
COPY_TO = _op(
    "copy_to",
    OpKind.MOVE,
    lambda input, other: None,
    "input other",
    target=QF.copy_to,
    in_place=(("copy_", _args("input other non_blocking", ignored="non_blocking")),),
)
_PADS = {"pad": "padding"}
_CONSTANT_PADS = {"pad": "padding", "value": "value"}
PAD = _op(
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
    },
    quant=lambda values: QuantRule.SAME if values["mode"] != "constant" or not values["value"] else QuantRule.OWN,
    lowering="pad",
    canonical=lambda values: {"value": values["value"] or None},
)


def _resize_options(values: Mapping[str, Any]) -> dict[str, Any]:
    factor = _uniform(values["scale_factor"])
    return {"size": _uniform(values["size"]), "scale_factor": float(factor) if isinstance(factor, int) else factor}


INTERPOLATE = _op(
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
    lowering="interpolate",
    canonical=_resize_options,
)


def _dropout(*, flag: str = "training", default: bool = True) -> Spelling:
    """A dropout that is off: one that is on draws random numbers and is no identity."""

    def is_on(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return bool(args[2] if len(args) > 2 else kwargs.get(flag, default))

    return _args(f"input p {flag} inplace", ignored=f"p {flag} inplace", unless=is_on)


IDENTITY = _op(
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
        ("contiguous", _args("input memory_format", ignored="memory_format")),
        ("clone", _args("input memory_format", ignored="memory_format")),
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
CAST = _op(
    "cast",
    OpKind.MOVE,
    lambda input, other=None, dtype=None, device=None, non_blocking=False, copy=False, memory_format=None: None,
    "input other",
    spelled=(
        ("to", Spelling(_overload_of_to)),
        ("type", _args("input dtype non_blocking")),
        ("type_as", _args("input other")),
        ("cpu", _args("input memory_format", device="cpu")),
        ("cuda", _args("input device non_blocking memory_format", device="cuda")),
        *((name, _args("input memory_format", dtype=dtype)) for name, dtype in _CASTS.items()),
    ),
)

# --- composites: taken apart before they are quantized -----------------------------------------------------

BATCH_NORM = _op(
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
LAYER_NORM = _op(
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
SOFTMAX = _op(
    "softmax",
    OpKind.COMPOSITE,
    lambda input, dim=None, dtype=None: None,
    target=F.softmax,
    spelled=(
        (F.softmax, _args("input dim _stacklevel dtype", ignored="_stacklevel")),
        torch.softmax,
        aten.softmax.int,
        "softmax",
    ),
    modules=(nn.Softmax,),
    decomposition="softmax",
)

# --- stubs -------------------------------------------------------------------------------------------------

QUANT_STUB = _op(
    "quant_stub",
    OpKind.STUB,
    lambda input: None,
    modules=(QuantStub,),
    quant=QuantRule.OWN,
    lowering="quantize",
)
DEQUANT_STUB = _op("dequant_stub", OpKind.STUB, lambda input: None, modules=(DeQuantStub,), lowering="dequantize")
FAKE_QUANT = _op("fake_quant", OpKind.STUB, lambda input: None, quant=QuantRule.SAME)
