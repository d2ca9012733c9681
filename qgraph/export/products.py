"""Convolutions, linear and matrix products on real numbers: weights and biases are dequantized constants."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.export.call import Call, translates
from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import TRANSPOSED
from qgraph.lowering.base import bounds
from qgraph.lowering.options import spatial
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Activation, Fused
from qgraph.numerics import QParams, bias_codes, quantize
from qgraph.targets import target_of


@translates("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> str:
    """Conv or ConvTranspose, with what is fused into it."""
    module = weighted_module(call)
    axis = 1 if info(call.node).op in TRANSPOSED else 0
    weight = _real_weight(call, module, axis)
    kind = "ConvTranspose" if info(call.node).op in TRANSPOSED else "Conv"
    name = call.emit(kind, call.read("input"), weight, _real_bias(call, module), **geometry(call, module))
    return finish(call, module, name)


@translates("linear")
def linear(call: Call) -> str:
    """Gemm; operands of another rank than 2 become matrices first, whose rows are given back their shape at the end."""
    module = weighted_module(call)
    if call.rank() != 2:
        rows = as_rows(call, call.value("input").codes is not None)
        call.then = shape_giver(call, call.dims())
    else:
        rows = call.read("input")
    weight = _real_weight(call, module, 0)
    return finish(call, module, call.emit("Gemm", rows, weight, _real_bias(call, module), transB=1))


@translates("matmul")
def matmul(call: Call) -> str:
    """MatMul."""
    return call.emit("MatMul", call.read("input"), call.read("other"))


def weighted_module(call: Call) -> Any:
    """The module of a convolution or linear.

    Raises:
        UserError: the call has none, or one that is not canonical.
    """
    if call.node.op != "call_module":
        raise call.unsupported("its weight is computed in the forward")
    module: Any = module_of(call.node)
    if isinstance(getattr(module, "padding", 0), str) or getattr(module, "padding_mode", "zeros") != "zeros":
        raise call.unsupported("its padding is not canonical")
    if len(call.node.args) > 2 or call.node.kwargs:
        raise call.unsupported("it is given an output size")
    return module


def geometry(call: Call, module: Any) -> dict[str, Any]:
    """Attributes of a convolution."""
    rank = module.weight.dim() - 2
    found: dict[str, Any] = {
        "kernel_shape": list(module.weight.shape[2:]),
        "strides": spatial(module.stride, rank),
        "pads": spatial(module.padding, rank) * 2,
        "dilations": spatial(module.dilation, rank),
        "group": module.groups,
    }
    if info(call.node).op in TRANSPOSED:
        found["output_padding"] = spatial(module.output_padding, rank)
    return found


def weight_codes(call: Call, module: Any) -> tuple[torch.Tensor, QParams] | None:
    """Codes of the weight and their parameters; None in a float island."""
    qparams = info(call.node).weight_qparams
    return None if qparams is None else (quantize(module.weight.detach(), qparams), qparams)


def coded_bias(call: Call, module: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes of the bias, int32, and their scale, float32; None where it is not quantized."""
    qparams, source = info(call.node).weight_qparams, call.value("input").qparams
    if module.bias is None or qparams is None or source is None:
        return None
    step = accumulator_step(source, qparams, scale_repeats(call.node))
    return bias_codes(module.bias.detach(), step).to(torch.int32), step.to(torch.float32)


def _real_weight(call: Call, module: Any, axis: int) -> str:
    found = weight_codes(call, module)
    if found is None:
        return call.constant("weight", module.weight)
    codes, qparams = found
    name = call.constant("weight.codes", codes)
    scale, zero = call.walk.parameters(f"{call.site}.weight", qparams)
    along = axis if qparams.per_channel else None
    return call.emit("DequantizeLinear", name, scale, zero, axis=along)


def _real_bias(call: Call, module: Any) -> str:
    found = coded_bias(call, module)
    if found is None:
        return "" if module.bias is None else call.constant("bias", module.bias)
    codes, scale = found
    inputs = [call.constant("bias.codes", codes), call.constant("bias.scale", scale)]
    inputs.append(call.constant("bias.zero_point", torch.zeros(scale.shape, dtype=torch.int32)))
    return call.emit("DequantizeLinear", *inputs, axis=0 if scale.dim() else None)


def finish(call: Call, module: Any, name: str) -> str:
    """Residual and activation of a fused operator.

    An activation stands before the rounding only where saturation does its work, so that an engine can leave it out and
    still compute in integers; elsewhere it is applied to the rounded value.
    """
    residual = call.bound.operand("residual")
    if residual is not None:
        name = call.emit("Add", name, call.read("residual"))
    activation = module.activation if isinstance(module, Fused) else Activation.NONE
    if activation is Activation.NONE:
        return name

    def activate(real: str) -> str:
        return _activated(call, activation, real)

    if call.walk.is_rounded(call.node) and activation_limits(call, activation) is not None:
        call.late = activate
        return name
    return activate(name)


def activation_limits(call: Call, activation: Activation) -> tuple[int, int] | None:
    """The lowest and highest code an activation lets through; None where they are the format's own."""
    result = info(call.node).qparams
    if result is None or activation is Activation.NONE:
        return None
    high = 6.0 if activation is Activation.RELU6 else None
    limits = bounds(result, 0.0, high, target_of(call.walk.gm).quantize_rule)
    found = int(limits["low"]), int(limits["high"])
    return None if found == (result.qtype.qmin, result.qtype.qmax) else found


def _activated(call: Call, activation: Activation, real: str) -> str:
    if activation is Activation.RELU:
        return call.emit("Relu", real)
    low, high = (call.constant(name, torch.tensor(limit)) for name, limit in (("low", 0.0), ("high", 6.0)))
    return call.emit("Clip", real, low, high)


def as_rows(call: Call, on_codes: bool) -> str:
    """The input as a matrix, its rows the leading dimensions; codes are reshaped as codes."""
    value = call.value("input")
    size = value.dims[-1]
    if not isinstance(size, int):
        raise call.unsupported("its features depend on the batch")
    shape = call.integers("rows", [-1, size])
    if not on_codes:
        return call.emit("Reshape", call.walk.real(value), shape)
    rows = call.emit("Reshape", call.walk.codes(value), shape)
    if call.on_codes:
        return rows
    assert value.qparams is not None
    return call.emit("DequantizeLinear", rows, *call.walk.parameters(value.site, value.qparams))


def shape_giver(call: Call, dims: Any) -> Any:
    """A function that gives a value its final shape."""
    if sum(size is None for size in dims) > 1:
        raise call.unsupported("two sizes of its result depend on the batch")
    return lambda name: call.emit(
        "Reshape", name, call.integers("shape", [-1 if size is None else size for size in dims])
    )
