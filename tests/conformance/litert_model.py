"""A TFLite model in the making, with shorthands for what moves codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from qgraph.ir.arguments import Bound
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import info
from qgraph.numerics import QParams
from tests.conformance.tflite_model import Op, Tensor

Value = Any  # name of a tensor, or a tuple of names


class Model:
    """Tensors and operators so far, the value of every node, and the tensor of every site."""

    def __init__(self, gm: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
        self.gm = gm
        self.inputs = list(inputs)
        self.tensors: dict[str, Any] = {}
        self.ops: list[Any] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.values: dict[fx.Node, Value] = {}
        self.sites: dict[str, str] = {}
        self.shapes: dict[fx.Node, Any] = {}
        evaluate(gm, inputs, observe=self._see)

    def _see(self, node: fx.Node, value: Any) -> None:
        several = isinstance(value, (tuple, list))
        self.shapes[node] = [tuple(v.shape) for v in value] if several else tuple(getattr(value, "shape", ()))

    # --- tensors and operators ---

    def tensor(self, shape: tuple[int, ...], dtype: str, qparams: QParams | None = None, **more: Any) -> str:
        """A new tensor's name."""
        name = f"t{len(self.tensors)}"
        if qparams is not None:
            more = {"scale": qparams.scale.numpy(), "zero": qparams.zero, "axis": qparams.axis or 0, **more}
        self.tensors[name] = Tensor(name, tuple(shape), dtype, **more)
        return name

    def constant(self, data: Any, qparams: QParams | None = None, **more: Any) -> str:
        """A constant tensor's name."""
        array = np.ascontiguousarray(data)
        return self.tensor(array.shape, array.dtype.name, qparams, data=array, **more)

    def like(self, name: str, shape: tuple[int, ...]) -> str:
        """A new tensor with the codes of another, in another shape."""
        old = self.tensors[name]
        return self.tensor(shape, old.dtype, scale=old.scale, zero=old.zero)

    def op(self, code: str, inputs: list[str], result: str, **options: Any) -> str:
        """Adds an operator; returns its result."""
        self.ops.append(Op(code, tuple(inputs), (result,), options))
        return result

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        shape: tuple[int, ...] = self.tensors[name].shape
        return shape

    def reshape(self, name: str, shape: tuple[int, ...]) -> str:
        """The same codes in another shape."""
        if self.shape(name) == tuple(shape):
            return name
        target = self.constant(np.array(shape, np.int32))
        return self.op("RESHAPE", [name, target], self.like(name, shape), newShape=np.array(shape, np.int32))

    def permute(self, name: str, order: tuple[int, ...]) -> str:
        """The same codes with dimensions in another order."""
        shape = tuple(self.shape(name)[axis] for axis in order)
        return self.op("TRANSPOSE", [name, self.constant(np.array(order, np.int32))], self.like(name, shape))

    def channels_last(self, name: str) -> str:
        """`[N, C, H, W]` as `[N, H, W, C]`."""
        assert len(self.shape(name)) == 4, "images have four dimensions here"
        return self.permute(name, (0, 2, 3, 1))

    def channels_first(self, name: str) -> str:
        """`[N, H, W, C]` as `[N, C, H, W]`."""
        return self.permute(name, (0, 3, 1, 2))

    def pad(self, name: str, amounts: list[tuple[int, int]], code: int | None = None) -> str:
        """Padding per dimension with real zero, or with a code."""
        if not any(map(any, amounts)):
            return name
        shape = tuple(n + a + b for n, (a, b) in zip(self.shape(name), amounts, strict=True))
        pads = self.constant(np.array(amounts, np.int32))
        if code is None:
            return self.op("PAD", [name, pads], self.like(name, shape))
        old = self.tensors[name]
        fill = self.tensor((), old.dtype, scale=old.scale, zero=old.zero, data=np.array(code, old.dtype))
        return self.op("PADV2", [name, pads, fill], self.like(name, shape))

    def requantize(self, name: str, qparams: QParams) -> str:
        """The same values at another scale; the tensor itself if it is there already."""
        old = self.tensors[name]
        there = (old.dtype, float(old.scale), old.zero)
        if there == (str(qparams.qtype), qparams.scale.item(), qparams.zero):
            return name
        return self.op("QUANTIZE", [name], self.tensor(old.shape, str(qparams.qtype), qparams))

    def result(self, node: fx.Node, shape: tuple[int, ...] | None = None) -> str:
        """A tensor for a node's codes."""
        qparams = info(node).qparams
        assert qparams is not None, node
        return self.tensor(self.shapes[node] if shape is None else shape, str(qparams.qtype), qparams)

    def operand(self, bound: Bound, name: str = "input") -> str:
        """Tensor of an operand."""
        found: str = self.values[bound.operand(name)]
        return found
