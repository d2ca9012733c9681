"""Operators on 8-bit codes, for the form "qoperator": those of standard ONNX, and of onnxruntime (`com.microsoft`).

A translator gives the name of the codes, or None where the operator has no such form; then the call is written as
DequantizeLinear, operator, QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from qgraph.export.call import Call, Value
from qgraph.export.products import (
    activation_limits,
    as_rows,
    coded_bias,
    geometry,
    shape_giver,
    weight_codes,
    weighted_module,
)
from qgraph.export.windows import averages_channels, squeeze_all
from qgraph.export.writer import MICROSOFT
from qgraph.nn import Fused
from qgraph.numerics import QParams

QuantizedTranslator: TypeAlias = "Callable[[Call, QParams], str | None]"


def _convolution(call: Call, result: QParams) -> str | None:
    """QLinearConv, then the bounds of an activation."""
    module = weighted_module(call)
    operands = _product_operands(call, module, result)
    if operands is None:
        return None
    x, weight, bias = operands
    inputs = [*x, *weight, *call.walk.parameters(call.site, result), bias]
    call.on_codes = True
    return _bounded(call, module, result, call.emit("QLinearConv", *inputs, **geometry(call, module)))


def _linear(call: Call, result: QParams) -> str | None:
    """QGemm on the rows of the input."""
    module = weighted_module(call)
    operands = _product_operands(call, module, result)
    if operands is None:
        return None
    (codes, *source), weight, bias = operands
    call.on_codes = True
    if call.rank() != 2:
        codes = as_rows(call, True)
        call.then = shape_giver(call, call.dims())
    inputs = [codes, *source, *weight, bias, *call.walk.parameters(call.site, result)]
    return _bounded(call, module, result, call.emit("QGemm", *inputs, domain=MICROSOFT, transB=1))


def _product_operands(call: Call, module: Any, result: QParams) -> tuple[list[str], list[str], str] | None:
    """Input, weight and bias of a product, each value with scale and zero point; None if a format does not fit."""
    source, weight = call.value("input"), weight_codes(call, module)
    if call.bound.operand("residual") is not None or weight is None or not _same_format(source, result):
        return None
    codes, qparams = weight
    if qparams.qtype.bits != 8:
        return None
    bias = coded_bias(call, module)
    names = [call.constant("weight.codes", codes), *call.walk.parameters(f"{call.site}.weight", qparams)]
    return _with_parameters(call, source), names, "" if bias is None else call.constant("bias.codes", bias[0])


def _bounded(call: Call, module: Any, result: QParams, name: str) -> str:
    limits = activation_limits(call, module.activation) if isinstance(module, Fused) else None
    if limits is None:
        return name
    storage = result.qtype.storage
    low, high = (torch.tensor(limit, dtype=storage) for limit in limits)
    return call.emit("Clip", name, call.constant("low", low), call.constant("high", high))


def _matmul(call: Call, result: QParams) -> str | None:
    """QLinearMatMul."""
    operands = _coded_operands(call, ("input", "other"), result)
    if operands is None:
        return None
    return call.emit("QLinearMatMul", *operands, *call.walk.parameters(call.site, result))


def _pair(kind: str) -> QuantizedTranslator:
    def translate(call: Call, result: QParams) -> str | None:
        if call.bound.values.get("alpha", 1) != 1:
            return None
        operands = _coded_operands(call, ("input", "other"), result)
        if operands is None:
            return None
        return call.emit(kind, *operands, *call.walk.parameters(call.site, result), domain=MICROSOFT)

    return translate


def _one(kind: str, **renamed: str) -> QuantizedTranslator:
    def translate(call: Call, result: QParams) -> str | None:
        operands = _coded_operands(call, ("input",), result)
        if operands is None:
            return None
        attributes: dict[str, Any] = {name: float(call.option(option)) for name, option in renamed.items()}
        return call.emit(kind, *operands, *call.walk.parameters(call.site, result), domain=MICROSOFT, **attributes)

    return translate


def _global_average(call: Call, result: QParams) -> str | None:
    """QLinearGlobalAveragePool."""
    operands = _coded_operands(call, ("input",), result)
    if operands is None or not averages_channels(call):
        return None
    parameters = call.walk.parameters(call.site, result)
    squeeze_all(call)
    return call.emit("QLinearGlobalAveragePool", *operands, *parameters, domain=MICROSOFT, channels_last=0)


def _cat(call: Call, result: QParams) -> str | None:
    """QLinearConcat."""
    values = [call.walk.values[part] for part in call.bound.operand("tensors")]
    if not all(_same_format(value, result) for value in values):
        return None
    operands = [name for value in values for name in _with_parameters(call, value)]
    parameters, axis = call.walk.parameters(call.site, result), call.option("dim") % len(values[0].dims)
    return call.emit("QLinearConcat", *parameters, *operands, domain=MICROSOFT, axis=axis)


def _coded_operands(call: Call, names: tuple[str, ...], result: QParams) -> list[str] | None:
    """Codes, scale and zero point of each operand; None if one has other codes than the result."""
    found = []
    for name in names:
        operand = call.bound.operand(name)
        value = call.walk.values.get(operand) if isinstance(operand, fx.Node) else None
        if not isinstance(value, Value) or not _same_format(value, result):
            return None
        found += _with_parameters(call, value)
    return found


def _same_format(value: Value, result: QParams) -> bool:
    return value.qparams is not None and value.qparams.qtype == result.qtype and result.qtype.bits == 8


def _with_parameters(call: Call, value: Value) -> list[str]:
    assert value.qparams is not None
    return [call.walk.codes(value), *call.walk.parameters(value.site, value.qparams)]


QUANTIZED: dict[str, QuantizedTranslator] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "linear": _linear,
    "matmul": _matmul,
    "add": _pair("QLinearAdd"),
    "mul": _pair("QLinearMul"),
    "sigmoid": _one("QLinearSigmoid"),
    "leaky_relu": _one("QLinearLeakyRelu", alpha="negative_slope"),
    "adaptive_avg_pool1d": _global_average,
    "adaptive_avg_pool2d": _global_average,
    "avg_pool1d": _global_average,
    "avg_pool2d": _global_average,
    "mean": _global_average,
    "cat": _cat,
}
