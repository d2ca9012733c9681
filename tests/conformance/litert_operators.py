"""How each operator of a frozen graph is written in TFLite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from qgraph.ir.arguments import Bound, bind
from qgraph.ir.evaluate import call_node
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import DIV
from qgraph.lowering.options import spatial
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Activation
from qgraph.numerics import QParams, bias_codes, quantize
from tests.conformance.litert_model import Model, Value

_FUSED = {Activation.NONE: "NONE", Activation.RELU: "RELU", Activation.RELU6: "RELU6"}


def _quant_stub(model: Model, node: fx.Node, bound: Bound) -> Value:
    source = model.values[node.all_input_nodes[0]]
    if model.tensors[source].dtype == "float32":
        return model.op("QUANTIZE", [source], model.result(node))
    return model.requantize(source, _params(node))


def _params(node: Any) -> QParams:
    found = info(node).qparams
    assert found is not None
    return found


# --- products ------------------------------------------------------------------------------------------------------


def _weights(model: Model, node: fx.Node, order: tuple[int, ...], axis: int) -> list[str]:
    """Tensors of weight and bias; the weight's dimensions in `order`, its scales along the new `axis`."""
    module, x, weight = cast("Any", module_of(node)), bind(node).operand("input"), info(node).weight_qparams
    assert weight is not None
    codes = quantize(module.weight.detach(), weight).permute(order).numpy()
    scale = weight.scale.numpy()
    names = [model.constant(codes, scale=scale, axis=axis if scale.ndim else 0)]
    step = accumulator_step(_params(x), weight, scale_repeats(node)).expand(codes.shape[axis])
    bias = torch.zeros(codes.shape[axis]) if module.bias is None else module.bias.detach()
    wide = np.int32 if str(_params(x).qtype) == "int8" else np.int64
    steps = np.array(accumulator_step(_params(x), weight).float().numpy())
    return [*names, model.constant(bias_codes(bias, step).numpy().astype(wide), scale=steps)]


def _same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Output size and padding in front of TFLite's SAME."""
    out = -(-size // stride)
    return out, max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2


def _window(
    model: Model, x: str, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, fill: int | None = None
) -> tuple[str, str]:
    """The channels-last image, padded unless TFLite's own padding does the same, and that padding's name."""
    sizes = model.shape(x)[1:3]
    same = [_same_pads(*values) for values in zip(sizes, kernel, stride, dilation, strict=True)]
    if [tuple(pair) for pair in same] == list(zip(out, padding, strict=True)):
        return x, "SAME"
    after = []
    for size, n, k, s, p, d in zip(sizes, out, kernel, stride, padding, dilation, strict=True):
        after.append(max((n - 1) * s + (k - 1) * d + 1 - size - p, 0))
    amounts = [(0, 0), *zip(padding, after, strict=True), (0, 0)]
    return model.pad(x, amounts, fill), "VALID"


def _conv(model: Model, node: fx.Node, bound: Bound) -> Value:
    module: Any = module_of(node)
    x = model.channels_last(model.operand(bound))
    groups, channels = module.groups, module.weight.shape[0]
    depthwise = groups > 1 and groups == model.shape(x)[3]
    order, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
    stride, dilation = spatial(module.stride, 2), spatial(module.dilation, 2)
    kernel, out = module.weight.shape[2:], model.shapes[node][2:]
    x, padding = _window(model, x, out, kernel, stride, spatial(module.padding, 2), dilation)
    options = {
        "padding": padding,
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
        "fusedActivationFunction": _FUSED[module.activation],
        **({"depthMultiplier": channels // groups} if depthwise else {}),
    }
    result = model.result(node, (model.shape(x)[0], *out, channels))
    inputs = [x, *_weights(model, node, order, axis)]
    code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    return model.channels_first(model.op(code, inputs, result, **options))


def _conv_transpose(model: Model, node: fx.Node, bound: Bound) -> Value:
    """The whole result without padding, of which a part is taken: every position is rescaled by itself."""
    module: Any = module_of(node)
    assert module.groups == 1, "TRANSPOSE_CONV has no groups"
    assert spatial(module.dilation, 2) == [1, 1], "TRANSPOSE_CONV has no dilation"
    x = model.channels_last(model.operand(bound))
    stride, pads, extra = (spatial(v, 2) for v in (module.stride, module.padding, module.output_padding))
    kernel, out, batch = module.weight.shape[2:], model.shapes[node][2:], model.shape(x)[0]
    whole = [
        (n - 1) * s + k + max(0, more - p)
        for n, s, k, more, p in zip(model.shape(x)[1:3], stride, kernel, extra, pads, strict=True)
    ]
    shape = (batch, *whole, module.weight.shape[1])
    weight, bias = _weights(model, node, (1, 2, 3, 0), 0)
    full = model.op(
        "TRANSPOSE_CONV",
        [model.constant(np.array(shape, np.int32)), weight, x, bias],
        model.result(node, shape),
        padding="VALID",
        strideH=stride[0],
        strideW=stride[1],
        fusedActivationFunction=_FUSED[module.activation],
    )
    size = (batch, *out, shape[3])
    begin = model.constant(np.array([0, *pads, 0], np.int32))
    part = model.op("SLICE", [full, begin, model.constant(np.array(size, np.int32))], model.like(full, size))
    return model.channels_first(part)


def _linear(model: Model, node: fx.Node, bound: Bound) -> Value:
    module: Any = module_of(node)
    x = model.operand(bound)
    flat = model.reshape(x, (int(np.prod(model.shape(x)[:-1])), model.shape(x)[-1]))
    result = model.result(node, (model.shape(flat)[0], module.weight.shape[0]))
    inputs = [flat, *_weights(model, node, (0, 1), 0)]
    made = model.op("FULLY_CONNECTED", inputs, result, fusedActivationFunction=_FUSED[module.activation])
    return model.reshape(made, model.shapes[node])


def _matmul(model: Model, node: fx.Node, bound: Bound) -> Value:
    return model.op("BATCH_MATMUL", [model.operand(bound), model.operand(bound, "other")], model.result(node))


# --- element by element --------------------------------------------------------------------------------------------


def _add(model: Model, node: fx.Node, bound: Bound) -> Value:
    code = bound.op.name.upper()
    inputs = [model.operand(bound), model.operand(bound, "other")]
    return model.op(code, inputs, model.result(node), potScaleInt16=False)


def _mul(model: Model, node: fx.Node, bound: Bound) -> Value:
    x, y = model.operand(bound), bound.operand("other")
    if isinstance(y, fx.Node):
        return model.op("MUL", [x, model.values[y]], model.result(node))
    real = 1.0 / y if bound.op is DIV else float(y)
    sign = np.array(-1 if real < 0 else 1, model.tensors[x].dtype)
    return model.op("MUL", [x, model.constant(sign, scale=np.float32(abs(real)))], model.result(node))


def _unary(code: str, **names: str) -> Any:
    """An operator of one value; `names` maps TFLite's options to torch's."""

    def emit(model: Model, node: fx.Node, bound: Bound) -> Value:
        options = {theirs: bound.option(ours) for theirs, ours in names.items()}
        return model.op(code, [model.operand(bound)], model.result(node), **options)

    return emit


def _gelu(model: Model, node: fx.Node, bound: Bound) -> Value:
    approximate = bound.option("approximate") == "tanh"
    return model.op("GELU", [model.operand(bound)], model.result(node), approximate=approximate)


def _softmax(model: Model, node: fx.Node, bound: Bound) -> Value:
    """Over the last dimension, so between two exchanges of dimensions."""
    x = model.operand(bound)
    order = list(range(len(model.shape(x))))
    dim = int(bound.option("dim")) % len(order)
    order[dim], order[-1] = order[-1], order[dim]
    turned = x if dim == len(order) - 1 else model.permute(x, tuple(order))
    made = model.op("SOFTMAX", [turned], model.result(node, model.shape(turned)), beta=1.0)
    return made if turned == x else model.permute(made, tuple(order))


def _code(value: float, qparams: QParams) -> int:
    """The code of a number: ties of its float32 quotient go away from zero."""
    quotient = np.float32(value) / np.float32(qparams.scale.item())
    whole = np.trunc(quotient)
    steps = int(whole + np.copysign(abs(quotient - whole) >= 0.5, quotient))
    return min(max(steps + qparams.zero, qparams.qtype.qmin), qparams.qtype.qmax)


def _extreme(model: Model, node: fx.Node, bound: Bound) -> Value:
    parts = [model.requantize(model.operand(bound, name), _params(node)) for name in ("input", "other")]
    return model.op(bound.op.name.upper(), parts, model.result(node))


def _clamp(model: Model, node: fx.Node, bound: Bound) -> Value:
    """A change of scale, then the larger and the smaller code."""
    result = _params(node)
    current = model.requantize(model.operand(bound), result)
    for code, limit in (("MAXIMUM", bound.option("min")), ("MINIMUM", bound.option("max"))):
        if limit is None:
            continue
        edge = model.constant(np.array(_code(limit, result), str(result.qtype)), result)
        current = model.op(code, [current, edge], model.like(current, model.shape(current)))
    return current


# --- windows -------------------------------------------------------------------------------------------------------


def _pool(code: str) -> Any:
    def emit(model: Model, node: fx.Node, bound: Bound) -> Value:
        kernel = spatial(bound.option("kernel_size"), 2)
        stride = kernel if bound.option("stride") is None else spatial(bound.option("stride"), 2)
        padding, out = spatial(bound.option("padding"), 2), model.shapes[node][2:]
        largest = code == "MAX_POOL_2D"
        fill = _params(node).qtype.qmin if largest else None
        x = model.channels_last(model.operand(bound))
        assert not largest or spatial(bound.option("dilation"), 2) == [1, 1], "TFLite dilates no pools"
        unpadded = x
        x, how = _window(model, x, out, kernel, stride, padding, [1, 1], fill)
        assert largest or x == unpadded, "AVERAGE_POOL_2D cannot leave out this padding"
        result = model.result(node, (model.shape(x)[0], *out, model.shape(x)[3]))
        options = {"padding": how, "filterHeight": kernel[0], "filterWidth": kernel[1]}
        made = model.op(code, [x], result, strideH=stride[0], strideW=stride[1], **options)
        return model.channels_first(made)

    return emit


def _reduce(code: str) -> Any:
    def emit(model: Model, node: fx.Node, bound: Bound) -> Value:
        x = model.operand(bound)
        rank, dim = len(model.shape(x)), bound.option("dim")
        dims = list(range(rank)) if dim in (None, (), []) else list(dim) if isinstance(dim, (tuple, list)) else [dim]
        axes = model.constant(np.array([axis % rank for axis in dims], np.int32))
        return model.op(code, [x, axes], model.result(node), keepDims=bool(bound.option("keepdim")))

    return emit


def _global_average(model: Model, node: fx.Node, bound: Bound) -> Value:
    axes = model.constant(np.array([2, 3], np.int32))
    return model.op("MEAN", [model.operand(bound), axes], model.result(node), keepDims=True)


def _interpolate(model: Model, node: fx.Node, bound: Bound) -> Value:
    x, out = model.channels_last(model.operand(bound)), model.shapes[node][2:]
    result = model.result(node, (model.shape(x)[0], *out, model.shape(x)[3]))
    inputs = [x, model.constant(np.array(out, np.int32))]
    if bound.option("mode") == "nearest":
        made = model.op("RESIZE_NEAREST_NEIGHBOR", inputs, result, alignCorners=False, halfPixelCenters=False)
    else:
        align = bool(bound.option("align_corners"))
        made = model.op("RESIZE_BILINEAR", inputs, result, alignCorners=align, halfPixelCenters=not align)
    return model.channels_first(made)


# --- what moves codes ----------------------------------------------------------------------------------------------


def _reshape(model: Model, node: fx.Node, bound: Bound) -> Value:
    return model.reshape(model.operand(bound), model.shapes[node])


def _move(model: Model, node: fx.Node, bound: Bound) -> Value:
    """Any movement as GATHER from the flat tensor; the indices are what the same call makes of positions."""
    source = next(operand for _, operand in bound.nodes())
    x = model.values[source]
    positions = torch.arange(int(np.prod(model.shape(x))), dtype=torch.float64).reshape(model.shape(x))
    moved = call_node(
        model.gm,
        node,
        fx.node.map_arg(node.args, lambda used: positions if used is source else None),
        fx.node.map_arg(node.kwargs, lambda used: positions if used is source else None),
    )
    parts = moved if isinstance(moved, (tuple, list)) else [moved]
    flat = model.reshape(x, (positions.numel(),))
    names = []
    for part in parts:
        index = part.flatten().numpy().astype(np.int32)
        picked = model.op("GATHER", [flat, model.constant(index)], model.like(flat, index.shape), axis=0)
        names.append(model.reshape(picked, tuple(part.shape)))
    return tuple(names) if isinstance(moved, (tuple, list)) else names[0]


def _pad(model: Model, node: fx.Node, bound: Bound) -> Value:
    if bound.option("mode") != "constant":
        return _move(model, node, bound)
    x, value, result = model.operand(bound), bound.option("value"), _params(node)
    given = list(bound.option("pad"))
    pairs = [(given[i], given[i + 1]) for i in range(0, len(given), 2)]
    amounts = [(0, 0)] * (len(model.shape(x)) - len(pairs)) + pairs[::-1]
    if not value:
        return model.pad(x, amounts)
    return model.pad(model.requantize(x, result), amounts, _code(value, result))


def _join(model: Model, node: fx.Node, bound: Bound) -> Value:
    stacks = bound.op.name == "stack"
    result = _params(node)
    parts = [model.requantize(model.values[part], result) for part in bound.operand("tensors")]
    axis = int(bound.option("dim")) % len(model.shapes[node])
    if stacks:
        shape = [1 if i == axis else n for i, n in enumerate(model.shapes[node])]
        parts = [model.reshape(part, tuple(shape)) for part in parts]
    return model.op("CONCATENATION", parts, model.result(node), axis=axis)


EMITTERS: dict[str, Callable[[Model, fx.Node, Bound], Value]] = {
    "quant_stub": _quant_stub,
    "conv2d": _conv,
    "conv_transpose2d": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "div": _mul,
    "relu": _unary("RELU"),
    "relu6": _unary("RELU6"),
    "clamp": _clamp,
    "max_pool2d": _pool("MAX_POOL_2D"),
    "avg_pool2d": _pool("AVERAGE_POOL_2D"),
    "mean": _reduce("MEAN"),
    "amax": _reduce("REDUCE_MAX"),
    "amin": _reduce("REDUCE_MIN"),
    "maximum": _extreme,
    "minimum": _extreme,
    "adaptive_avg_pool2d": _global_average,
    "interpolate": _interpolate,
    "pad": _pad,
    "cat": _join,
    "stack": _join,
    **dict.fromkeys(("reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("permute", "transpose", "expand", "repeat", "slice", "index_select"), _move),
    **dict.fromkeys(("movedim", "repeat_interleave", "expand_as"), _move),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _move),
    **dict.fromkeys(("split", "chunk", "unbind", "select", "narrow", "roll", "flip"), _move),
    "softmax": _softmax,
    "sigmoid": _unary("LOGISTIC"),
    "tanh": _unary("TANH"),
    "exp": _unary("EXP"),
    "log": _unary("LOG"),
    "gelu": _gelu,
    "hardswish": _unary("HARD_SWISH"),
    "leaky_relu": _unary("LEAKY_RELU", alpha="negative_slope"),
}
