"""Arithmetic, functions of one value, comparisons, choices and norms on real numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from qgraph.export.call import Call, translates
from qgraph.ir.node_info import module_of
from qgraph.lowering.base import bounds

_SIMPLE = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "reciprocal": "Reciprocal",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "log": "Log",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "atan": "Atan",
    "asinh": "Asinh",
    "abs": "Abs",
    "neg": "Neg",
    "sign": "Sign",
    "floor": "Floor",
    "ceil": "Ceil",
    "softsign": "Softsign",
    "selu": "Selu",
}
_PAIRS = {
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "lt": "Less",
    "le": "LessOrEqual",
    "eq": "Equal",
    "maximum": "Max",
    "minimum": "Min",
    "pow": "Pow",
}


@translates(*_SIMPLE)
def simple(call: Call) -> str:
    """One ONNX operator of one value."""
    return call.emit(_SIMPLE[call.bound.op.name], call.read("input"))


@translates(*_PAIRS)
def pair(call: Call) -> str:
    """One ONNX operator of two values."""
    names = call.bound.op.operands[:2] if len(call.bound.op.operands) > 1 else ("input", "exponent")
    return call.emit(_PAIRS[call.bound.op.name], *(call.read_of(call.bound.values[name], name) for name in names))


@translates("ne")
def not_equal(call: Call) -> str:
    """Not of Equal."""
    return call.emit("Not", call.emit("Equal", call.read("input"), call.read("other")))


@translates("add", "sub")
def total(call: Call) -> str:
    """Add and Sub, with `alpha`."""
    second, alpha = call.bound.operand("other"), call.option("alpha")
    kind = "Add" if call.bound.op.name == "add" else "Sub"
    if alpha == 1:
        return call.emit(kind, call.read("input"), call.read("other"))
    if isinstance(second, (int, float)):
        return call.emit(kind, call.read("input"), call.read_of(second * alpha, "other"))
    return call.emit(kind, call.read("input"), call.emit("Mul", call.read("other"), call.read_of(alpha, "alpha")))


@translates("mul")
def product(call: Call) -> str:
    """Mul."""
    return call.emit("Mul", call.read("input"), call.read("other"))


@translates("div")
def quotient(call: Call) -> str:
    """Div, rounded where asked for."""
    mode, name = call.option("rounding_mode"), call.emit("Div", call.read("input"), call.read("other"))
    if mode == "trunc":
        raise call.unsupported("it rounds its quotient towards zero")
    return name if mode is None else call.emit("Floor", name)


@translates("relu", moves=True)
def relu(call: Call) -> str:
    """Relu; on codes, bounds."""
    if not call.on_codes:
        return call.emit("Relu", call.read("input"))
    qparams = call.value("input").qparams
    assert qparams is not None
    low = torch.tensor(bounds(qparams, low=0.0)["low"], dtype=qparams.qtype.storage)
    return call.emit("Clip", call.read("input"), call.constant("low", low))


@translates("relu6", "clamp")
def clamp(call: Call) -> str:
    """Clip."""
    limits = (0.0, 6.0) if call.bound.op.name == "relu6" else (call.option("min"), call.option("max"))
    names = [
        "" if limit is None else call.constant(role, torch.tensor(limit, dtype=call.value("input").dtype))
        for role, limit in zip(("low", "high"), limits, strict=True)
    ]
    return call.emit("Clip", call.read("input"), *names)


@translates("silu")
def silu(call: Call) -> str:
    """`x * sigmoid(x)`."""
    x = call.read("input")
    return call.emit("Mul", x, call.emit("Sigmoid", x))


@translates("gelu")
def gelu(call: Call) -> str:
    """Gelu, from opset 20 on one operator; written out before."""
    x, approximate = call.read("input"), call.option("approximate")
    if call.opset >= 20:
        return call.emit("Gelu", x, approximate=approximate)
    if approximate != "none":
        raise call.unsupported("its tanh form needs opset 20")
    half, one = _number(call, "half", 0.5), _number(call, "one", 1.0)
    inner = call.emit("Erf", call.emit("Mul", x, _number(call, "root_half", math.sqrt(0.5))))
    return call.emit("Mul", call.emit("Mul", half, x), call.emit("Add", inner, one))


@translates("hardswish")
def hardswish(call: Call) -> str:
    """HardSwish; written out before opset 14."""
    if call.opset >= 14:
        return call.emit("HardSwish", call.read("input"))
    return call.emit("Mul", call.read("input"), hardsigmoid(call))


@translates("hardsigmoid")
def hardsigmoid(call: Call) -> str:
    """HardSigmoid with torch's slope."""
    return call.emit("HardSigmoid", call.read("input"), alpha=1.0 / 6.0, beta=0.5)


@translates("leaky_relu")
def leaky_relu(call: Call) -> str:
    """LeakyRelu."""
    return call.emit("LeakyRelu", call.read("input"), alpha=float(call.option("negative_slope")))


@translates("elu", "celu")
def elu(call: Call) -> str:
    """Elu and Celu."""
    kind = "Elu" if call.bound.op.name == "elu" else "Celu"
    return call.emit(kind, call.read("input"), alpha=float(call.option("alpha")))


@translates("mish")
def mish(call: Call) -> str:
    """`x * tanh(softplus(x))`."""
    x = call.read("input")
    return call.emit("Mul", x, call.emit("Tanh", call.emit("Softplus", x)))


@translates("softplus")
def softplus(call: Call) -> str:
    """Softplus with slope 1."""
    if call.option("beta") != 1:
        raise call.unsupported("its beta is not 1")
    return call.emit("Softplus", call.read("input"))


@translates("round")
def nearest(call: Call) -> str:
    """Round, half to even in torch and ONNX."""
    if call.option("decimals"):
        raise call.unsupported("it rounds to decimals")
    return call.emit("Round", call.read("input"))


@translates("rsqrt")
def rsqrt(call: Call) -> str:
    """`1 / sqrt(x + eps)`."""
    x, eps = call.read("input"), call.option("eps")
    return call.emit("Reciprocal", call.emit("Sqrt", call.emit("Add", x, _number(call, "eps", eps)) if eps else x))


@translates("where")
def where(call: Call) -> str:
    """Where."""
    return call.emit("Where", *(call.read(name) for name in ("condition", "input", "other")))


@translates("masked_fill")
def masked_fill(call: Call) -> str:
    """Where with a number."""
    return call.emit("Where", call.read("mask"), call.read("value"), call.read("input"))


@translates("prelu")
def prelu(call: Call) -> str:
    """PRelu; slopes per channel broadcast over the positions."""
    if call.node.op != "call_module":
        raise call.unsupported("its slopes are computed in the forward")
    module: Any = module_of(call.node)
    shape = [-1, *[1] * (call.rank() - 2)] if module.weight.numel() > 1 else [1]
    return call.emit("PRelu", call.read("input"), call.constant("weight", module.weight.reshape(shape)))


@translates("affine")
def affine(call: Call) -> str:
    """Scale and shift per channel."""
    module: Any = module_of(call.node)
    scaled = call.emit("Mul", call.read("input"), call.constant("weight", module.weight))
    return call.emit("Add", scaled, call.constant("bias", module.bias))


@translates("batch_norm")
def batch_norm(call: Call) -> str:
    """BatchNormalization with the running statistics."""
    if call.node.op != "call_module":
        raise call.unsupported("its statistics are computed in the forward")
    module: Any = module_of(call.node)
    if module.running_mean is None:
        raise call.unsupported("it uses the statistics of the batch")
    ones = torch.ones_like(module.running_mean)
    weight, bias = (ones, ones * 0.0) if module.weight is None else (module.weight, module.bias)
    tensors = {"weight": weight, "bias": bias, "mean": module.running_mean, "var": module.running_var}
    names = [call.constant(role, tensor) for role, tensor in tensors.items()]
    return call.emit("BatchNormalization", call.read("input"), *names, epsilon=float(module.eps))


@translates("layer_norm")
def layer_norm(call: Call) -> str:
    """LayerNormalization; written out before opset 17."""
    if call.node.op != "call_module":
        raise call.unsupported("its weights are computed in the forward")
    module: Any = module_of(call.node)
    x, axes = call.read("input"), list(range(-len(module.normalized_shape), 0))
    weight = torch.ones(module.normalized_shape) if module.weight is None else module.weight
    scale = call.constant("weight", weight)
    shift = "" if module.bias is None else call.constant("bias", module.bias)
    if call.opset >= 17:
        return call.emit("LayerNormalization", x, scale, shift, axis=axes[0], epsilon=float(module.eps))
    centred = call.emit("Sub", x, call.reduced("ReduceMean", x, axes, keep=True, axes_input=18))
    squares = call.emit("Mul", centred, centred)
    variance = call.reduced("ReduceMean", squares, axes, keep=True, axes_input=18)
    spread = call.emit("Sqrt", call.emit("Add", variance, _number(call, "eps", module.eps)))
    scaled = call.emit("Mul", call.emit("Div", centred, spread), scale)
    return call.emit("Add", scaled, shift) if shift else scaled


@translates("softmax")
def softmax(call: Call) -> str:
    """Softmax."""
    if call.option("dim") is None:
        raise call.unsupported("it leaves its dimension to torch's deprecated default")
    if call.option("dtype") not in (None, torch.float32):
        raise call.unsupported(f"it computes in {call.option('dtype')}")
    return call.emit("Softmax", call.read("input"), axis=int(call.option("dim")))


@translates("cast")
def cast(call: Call) -> str:
    """Cast."""
    if call.bound.operand("other") is not None or call.option("dtype") is None:
        raise call.unsupported("it does not name a dtype")
    return call.emit("Cast", call.read("input"), to=call.writer.element_type(call.option("dtype")))


def _number(call: Call, role: str, value: float) -> str:
    return call.constant(role, torch.tensor(value, dtype=torch.float32))
