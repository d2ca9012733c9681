"""Sizes and arithmetic with them: numbers of the graph are 0-d int64 tensors in ONNX."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qgraph.export.call import Call, translates

_ARITHMETIC: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.floordiv: "Div",  # of sizes, which are not negative
}


@translates("size")
def size(call: Call) -> str:
    """One size of a tensor."""
    dim = call.option("dim")
    if not isinstance(dim, int):
        raise call.unsupported("it takes all sizes at once")
    value = call.value("input")
    shape = call.emit("Shape", value.codes or call.walk.real(value))
    axis = call.constant("axis", torch.tensor(dim % len(value.dims)))
    return call.emit("Gather", shape, axis, axis=0)


@translates("scalar")
def scalar(call: Call) -> str:
    """Integer arithmetic on sizes."""
    node = call.node
    kind = _ARITHMETIC.get(node.target) if node.op == "call_function" else None
    if kind is None:
        raise call.unsupported(f"{node.target} of sizes has no ONNX form here")
    names = []
    for position, value in enumerate(node.args):
        if isinstance(value, fx.Node):
            names.append(call.walk.real(call.value_of(value)))
        elif isinstance(value, int):
            names.append(call.constant(f"number{position}", torch.tensor(value, dtype=torch.int64)))
        else:
            raise call.unsupported(f"it computes with {value!r}")
    return call.emit(kind, *names)
