"""Which channel axes of a float graph can only be scaled together.

If the channels of a value are multiplied by positive factors, so are those of everything that is computed from it by
relu, pooling, sums or moves; a convolution or linear can undo it in its weight, and another can cause it. All axes that
must carry the same factors form a group. Nagel et al., "Data-free quantization through weight equalization and bias
correction", 2019, scales pairs of layers; groups are the same for any number of producers and consumers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of, tensor_at
from qgraph.ir.op import Op
from qgraph.ir.shapes import tensor_spec
from qgraph.nn import Activation, Fused

Axis: TypeAlias = tuple[Any, Any]
"""`(node, dimension)` of a value, or `("out" | "in" | "bias", id)` of a parameter."""
Tie: TypeAlias = tuple[fx.Node, int, int, int]
"""Operand, its dimension, the result's dimension, and how often the result repeats each channel."""

_MAX_POOLS = (ops.MAX_POOL1D, ops.MAX_POOL2D, ops.MAX_POOL3D)
_AVG_POOLS = (ops.AVG_POOL1D, ops.AVG_POOL2D, ops.AVG_POOL3D)
_ADAPTIVE = (ops.ADAPTIVE_AVG_POOL1D, ops.ADAPTIVE_AVG_POOL2D, ops.ADAPTIVE_AVG_POOL3D)
_HOMOGENEOUS = (ops.RELU, ops.LEAKY_RELU, ops.PRELU, ops.ABS, ops.NEG, ops.IDENTITY, ops.FAKE_QUANT)
_SPACE = {op: 1 + index % 3 for pools in (_MAX_POOLS, _AVG_POOLS, _ADAPTIVE) for index, op in enumerate(pools)}
_REDUCED = (ops.MEAN, ops.SUM, ops.AMAX, ops.AMIN)
_NORMS = (ops.LAYER_NORM, ops.RMS_NORM, ops.AFFINE)


@dataclass
class Layer:
    """A weight that can take factors up, and the calls of the modules that hold it.

    Args:
        op: the operator.
        module: one of the modules.
        calls: the nodes that use the weight, each with its input.
        scales_in: whether its input channels can be scaled too; a norm's cannot.
    """

    op: Op
    module: nn.Module
    calls: list[fx.Node] = field(default_factory=list)
    scales_in: bool = True


@dataclass
class Group:
    """Axes that share one vector of factors.

    Args:
        size: number of factors.
        pinned: why the factors must be 1, and the node that demands it; None if they are free.
        producers: ids of the weights whose output channels are scaled.
        consumers: ids of the weights whose input channels are scaled back.
    """

    size: int
    pinned: tuple[str, fx.Node] | None = None
    producers: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)


class ChannelAxes:
    """All groups of a graph.

    Args:
        gm: a graph in stage FUSED or PREPARED.
        has_fixed_scale: whether the user or the target fixed the scale of a value, so that it must not change.
    """

    def __init__(self, gm: fx.GraphModule, has_fixed_scale: Callable[[fx.Node], bool]) -> None:
        self.layers: dict[int, Layer] = {}
        self._parents: dict[Axis, tuple[Axis, int]] = {}
        self._sizes: dict[Axis, int] = {}
        self._pins: dict[Axis, tuple[str, fx.Node]] = {}
        for node in gm.graph.nodes:
            if info(node).op is not ops.SIZE:
                self._visit(node)
                if has_fixed_scale(node):
                    self._pin_value(node, "its scale is fixed", node)
        self._pin_tensors_held_elsewhere(gm)

    # --- union-find whose edges repeat channels --------------------------------------------------------------

    def root(self, axis: Axis) -> tuple[Axis, int]:
        """The axis that stands for the group, and how often `axis` repeats each of its factors in a row."""
        repeat = 1
        while axis in self._parents:
            axis, more = self._parents[axis]
            repeat *= more
        return axis, repeat

    def _tie(self, fine: Axis, coarse: Axis, repeat: int, node: fx.Node) -> None:
        """`fine` has the factors of `coarse`, each `repeat` times in a row."""
        first, of_fine = self.root(fine)
        second, of_coarse = self.root(coarse)
        of_coarse *= repeat
        if first == second:
            if of_fine != of_coarse:
                self._pin(first, "its channels meet themselves in another order", node)
            return
        if of_fine > of_coarse:
            first, of_fine, second, of_coarse = second, of_coarse, first, of_fine
        if of_coarse % of_fine or self._sizes[first] * of_fine != self._sizes[second] * of_coarse:
            for axis in (first, second):
                self._pin(axis, "channels of different numbers meet", node)
            return
        self._parents[first] = (second, of_coarse // of_fine)
        pin = self._pins.pop(first, None)
        if pin is not None:
            self._pins.setdefault(second, pin)

    def _pin(self, axis: Axis, reason: str, node: fx.Node) -> None:
        self._pins.setdefault(self.root(axis)[0], (reason, node))

    def _pin_value(self, value: fx.Node, reason: str, node: fx.Node, but: Sequence[int] = ()) -> None:
        for dim in _dims(value):
            if dim not in but:
                self._pin((value, dim), reason, node)

    # --- reading the graph -----------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        spec = tensor_spec(node)
        for dim, size in enumerate(spec.shape if spec is not None else ()):
            self._sizes[(node, dim)] = size
        op, record = info(node).op, info(node)
        reason = f"{op} does not keep the channels apart"
        if record.in_place or record.unstable:
            reason = "it is written to in place"
        elif op in ops.FUSABLE and node.op == "call_module":
            return self._product(node)
        elif op in _NORMS and node.op == "call_module" and _scalable_norm(node):
            return self._norm(node)
        elif op in (ops.RELU6, ops.CLAMP):
            reason = f"{op} has the same bound for every channel"
        elif spec is not None and op in _TIES:
            return self._apply_ties(node, list(_TIES[op](node)))
        elif op is ops.OUTPUT:
            reason = "it is an output of the model"
        elif op is ops.INPUT:
            reason = "it is an input of the model"
        self._apply_ties(node, [], reason)

    def _apply_ties(self, node: fx.Node, ties: list[Tie], reason: str | None = None) -> None:
        """Ties what an operator keeps, and pins every other dimension of its operands and its result."""
        why = reason or f"{info(node).op} mixes it or cannot follow it"
        for operand, of_operand, of_result, repeat in ties:
            self._tie((node, of_result), (operand, of_operand), repeat, node)
        for operand in node.all_input_nodes:
            self._pin_value(operand, why, node, [tie[1] for tie in ties if tie[0] is operand])
        self._pin_value(node, why, node, [tie[2] for tie in ties])

    def _product(self, node: fx.Node) -> None:
        module: Any = module_of(node)
        x, residual = bind(node).operand("input"), bind(node).operand("residual")
        weight, op = module.weight, info(node).op
        space = weight.dim() - 2
        of_input, of_result = (len(_dims(value)) - 1 - space for value in (x, node))
        outputs, inputs = channels(op, module)
        layer = self.layers.setdefault(id(weight), Layer(op, module))
        layer.calls.append(node)
        out, into = ("out", id(weight)), ("in", id(weight))
        self._sizes.update({out: outputs, into: inputs})
        self._tie((node, of_result), out, 1, node)
        self._tie((x, of_input), into, 1, node)
        if module.bias is not None:
            self._sizes[("bias", id(module.bias))] = outputs
            self._tie(("bias", id(module.bias)), out, 1, node)
        if isinstance(residual, fx.Node):
            self._apply_residual(node, residual)
        if isinstance(module, Fused) and module.activation is Activation.RELU6:
            self._pin((node, of_result), "relu6 has the same bound for every channel", node)
        if x is residual:
            self._pin((x, of_input), "it is its own residual", node)
        if channels(layer.op, layer.module) != (outputs, inputs) or layer.op is not op:
            self._pin(out, "its weight is used in different ways", node)
            self._pin(into, "its weight is used in different ways", node)

    def _apply_residual(self, node: fx.Node, residual: fx.Node) -> None:
        for dim in _dims(node):
            if _size(residual, dim) == _size(node, dim):
                self._tie((node, dim), (residual, dim), 1, node)
            else:
                self._pin((node, dim), "a broadcast residual is added", node)

    def _norm(self, node: fx.Node) -> None:
        module: Any = module_of(node)
        weight = module.weight
        layer = self.layers.setdefault(id(weight), Layer(info(node).op, module, scales_in=False))
        layer.calls.append(node)
        out = ("out", id(weight))
        self._sizes[out] = weight.numel()
        last = len(_dims(node)) - 1
        self._tie((node, last), out, 1, node)
        bias = getattr(module, "bias", None)
        if bias is not None:
            self._sizes[("bias", id(bias))] = bias.numel()
            self._tie(("bias", id(bias)), out, 1, node)
        for operand in node.all_input_nodes:
            self._pin_value(operand, f"{info(node).op} mixes the channels", node)
        self._pin_value(node, f"{info(node).op} mixes the channels", node, [last])

    def _pin_tensors_held_elsewhere(self, gm: fx.GraphModule) -> None:
        """A weight that something else reads as well stays as it is."""
        tensors = {id(tensor) for layer in self.layers.values() for tensor in layer.module.parameters(recurse=False)}
        calls = {call for layer in self.layers.values() for call in layer.calls}
        for node in gm.graph.nodes:
            held: list[torch.Tensor] = []
            if node.op == "get_attr":
                held = [tensor_at(gm, str(node.target))]
            elif node.op == "call_module" and node not in calls:
                held = list(module_of(node).parameters())
            for tensor in held:
                for side in ("out", "in", "bias") if id(tensor) in tensors else ():
                    if (side, id(tensor)) in self._sizes:
                        self._pin((side, id(tensor)), "its weight or bias is read by another node", node)

    # --- the result ------------------------------------------------------------------------------------------

    def groups(self) -> dict[Axis, Group]:
        """Groups with at least one producer and one consumer, by their root."""
        found: dict[Axis, Group] = {}
        for weight, layer in self.layers.items():
            sides = [("out", "producers"), ("in", "consumers")] if layer.scales_in else [("out", "producers")]
            for side, role in sides:
                root, _ = self.root((side, weight))
                group = found.setdefault(root, Group(self._sizes[root], self._pins.get(root)))
                getattr(group, role).append(weight)
        return {root: group for root, group in found.items() if group.producers and group.consumers and group.size > 1}


def channels(op: Op, module: Any) -> tuple[int, int]:
    """Numbers of output and input channels of a convolution or linear."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    if op in ops.TRANSPOSED:
        return weight.shape[1] * groups, weight.shape[0]
    return weight.shape[0], weight.shape[1] * groups


def _scalable_norm(node: fx.Node) -> bool:
    weight = getattr(module_of(node), "weight", None)
    return weight is not None and weight.dim() == 1 and weight.numel() == _size(node, len(_dims(node)) - 1)


def _dims(node: fx.Node) -> range:
    spec = tensor_spec(node)
    return range(0 if spec is None else len(spec.shape))


def _size(node: Any, dim: int) -> int | None:
    spec = tensor_spec(node) if isinstance(node, fx.Node) else None
    return None if spec is None or dim >= len(spec.shape) else spec.shape[dim]


def _same(node: fx.Node) -> Iterator[Tie]:
    x = bind(node).operand("input")
    if isinstance(x, fx.Node) and len(_dims(x)) == len(_dims(node)):
        yield from ((x, dim, dim, 1) for dim in _dims(node))


def _pooled(node: fx.Node) -> Iterator[Tie]:
    space = _SPACE[info(node).op]
    yield from (tie for tie in _same(node) if tie[1] < len(_dims(node)) - space)


def _reduced(node: fx.Node) -> Iterator[Tie]:
    bound = bind(node)
    x, dims = bound.operand("input"), bound.values.get("dim")
    rank = len(_dims(x))
    gone = {dim % rank for dim in ((dims,) if isinstance(dims, int) else dims or range(rank))}
    kept = [dim for dim in range(rank) if dim not in gone]
    whole = len(_dims(node)) == rank
    yield from ((x, dim, dim if whole else kept.index(dim), 1) for dim in kept)


def _added(node: fx.Node) -> Iterator[Tie]:
    bound = bind(node)
    operands = [bound.operand(name) for name in bound.op.operands]
    if not all(isinstance(value, fx.Node) and len(_dims(value)) == len(_dims(node)) for value in operands):
        return
    for dim in _dims(node):
        if all(_size(value, dim) == _size(node, dim) for value in operands):
            yield from ((value, dim, dim, 1) for value in operands)


def _multiplied(node: fx.Node) -> Iterator[Tie]:
    """One operand carries the factors, the other (a number, a gate) does not."""
    bound = bind(node)
    first, second = (bound.operand(name) for name in bound.op.operands)
    if first is second:
        return
    for value in (first, second):
        if isinstance(value, fx.Node) and _shape(value) == _shape(node) and info(value).op is not ops.CONSTANT:
            return (yield from ((value, dim, dim, 1) for dim in _dims(node)))


def _divided(node: fx.Node) -> Iterator[Tie]:
    bound = bind(node)
    x = bound.operand("input")
    rounds = bound.values.get("rounding_mode") is not None
    if not rounds and isinstance(x, fx.Node) and x is not bound.operand("other") and _shape(x) == _shape(node):
        yield from _same(node)


def _permuted(node: fx.Node) -> Iterator[Tie]:
    bound = bind(node)
    x, rank = bound.operand("input"), len(_dims(node))
    if bound.op is ops.PERMUTE:
        order = [dim % rank for dim in bound.option("dims")]
    else:
        order = list(range(rank))
        one, two = (bound.option(name) % rank for name in ("dim0", "dim1"))
        order[one], order[two] = order[two], order[one]
    yield from ((x, of_operand, of_result, 1) for of_result, of_operand in enumerate(order))


def _reshaped(node: fx.Node) -> Iterator[Tie]:
    """Dimensions that stay, and blocks of dimensions that become one: each channel of the first is repeated."""
    x = bind(node).operand("input")
    given, wanted = list(_shape(x)), list(_shape(node))
    position = 0
    for of_result, size in enumerate(wanted):
        end = position + 1
        while end < len(given) and prod(given[position:end]) < size:
            end += 1
        if position >= len(given) or prod(given[position:end]) != size:
            return
        if of_result == len(wanted) - 1:
            end = len(given)
            if prod(given[position:end]) != size:
                return
        yield x, position, of_result, prod(given[position + 1 : end])
        position = end


def _padded(node: fx.Node) -> Iterator[Tie]:
    bound = bind(node)
    if bound.option("mode") == "constant" and bound.values.get("value"):
        return
    padded = len(bound.option("pad")) // 2
    yield from (tie for tie in _same(node) if tie[1] < len(_dims(node)) - padded)


def _resized(node: fx.Node) -> Iterator[Tie]:
    yield from (tie for tie in _same(node) if tie[1] < 2)


def _shape(node: Any) -> tuple[int, ...]:
    spec = tensor_spec(node) if isinstance(node, fx.Node) else None
    return () if spec is None else tuple(spec.shape)


_TIES: dict[Op, Callable[[fx.Node], Iterator[Tie]]] = {
    **dict.fromkeys(_HOMOGENEOUS, _same),
    **dict.fromkeys(_SPACE, _pooled),
    **dict.fromkeys(_REDUCED, _reduced),
    **dict.fromkeys((ops.ADD, ops.SUB), _added),
    ops.MUL: _multiplied,
    ops.DIV: _divided,
    **dict.fromkeys((ops.PERMUTE, ops.TRANSPOSE), _permuted),
    **dict.fromkeys((ops.RESHAPE, ops.FLATTEN), _reshaped),
    ops.PAD: _padded,
    ops.INTERPOLATE: _resized,
}
