"""Freeing the batch size: the same forward recorded at two batch sizes, merged into one graph.

Where the two recordings hold different integers, the integer depends on the batch: it becomes an expression of the
first input's size. Reshapes need none, because -1 says the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.capture.recorder import Recording
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op_table import EXPAND, RESHAPE, SCALAR, SIZE
from qgraph.ir.values import TensorSpec


@dataclass(frozen=True)
class BatchExpression:
    """The integer `numerator * batch // denominator + offset`."""

    numerator: int
    denominator: int
    offset: int

    def __str__(self) -> str:
        text = "batch" if self.numerator == 1 else f"{self.numerator} * batch"
        text += f" // {self.denominator}" if self.denominator != 1 else ""
        return text + (f" + {self.offset}" if self.offset else "")


class CannotMerge(Exception):
    """The recordings differ in more than integers; the message is the reason, for the user."""


@dataclass(frozen=True)
class _Substitution:
    """New arguments of one node, with expressions where integers depend on the batch."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Merge:
    """What to change in the first recording so that it serves every batch size."""

    substitutions: tuple[_Substitution, ...]


def merge(first: Recording, second: Recording, small: int, large: int) -> Merge:
    """Compares two recordings of one model at batch sizes `small` and `large`.

    Raises:
        CannotMerge: control flow, constants or non-integer arguments depend on the batch size.
    """
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    twin: dict[fx.Node, fx.Node] = {}
    comparison = _Comparison(twin, small, large)
    substitutions = []
    for node, other in zip(nodes, others, strict=False):
        if not _same_call(node, other):
            raise CannotMerge(f"control flow depends on it: {_place(node)} differs from {_place(other)}")
        twin[node] = other
        if node.op == "get_attr":
            _compare_constants(node, first, second)
        comparison.place = _place(node)
        args = comparison.compare(node.args, other.args)
        kwargs = comparison.compare(node.kwargs, other.kwargs)
        if args is not node.args or kwargs is not node.kwargs:
            substitutions.append(_Substitution(node, args, kwargs))
    if len(nodes) != len(others):
        raise CannotMerge(f"the number of steps depends on it: {len(nodes)} and {len(others)}")
    return Merge(tuple(substitutions))


def apply_merge(graph: fx.Graph, merged: Merge, batch_source: fx.Node) -> None:
    """Writes the expressions into the graph.

    Args:
        batch_source: the input whose dimension 0 is the batch.
    """
    writer = _ExpressionWriter(graph, batch_source)
    for substitution in merged.substitutions:
        node = substitution.node
        node.args, node.kwargs = substitution.args, substitution.kwargs
        if info(node).op in (RESHAPE, EXPAND):
            _prefer_minus_one(node)
        node.args = writer.write(node.args)
        node.kwargs = writer.write(node.kwargs)


class _Comparison:
    """Walks two argument structures; equal parts are returned as they are, by identity."""

    def __init__(self, twin: dict[fx.Node, fx.Node], small: int, large: int) -> None:
        self.twin = twin
        self.small = small
        self.large = large
        self.place = ""

    def compare(self, one: Any, two: Any) -> Any:
        if isinstance(one, fx.Node):
            if self.twin.get(one) is not two:
                raise CannotMerge(f"data flow depends on it at {self.place}")
            return one
        if type(one) is not type(two):
            raise CannotMerge(f"an argument changes its type with it at {self.place}")
        if isinstance(one, (tuple, list)):
            if len(one) != len(two):
                raise CannotMerge(f"an argument changes its length with it at {self.place}")
            parts = [self.compare(a, b) for a, b in zip(one, two, strict=True)]
            return one if all(p is a for p, a in zip(parts, one, strict=True)) else type(one)(parts)
        if isinstance(one, dict):
            if one.keys() != two.keys():
                raise CannotMerge(f"the options depend on it at {self.place}")
            values = {key: self.compare(one[key], two[key]) for key in one}
            return one if all(values[key] is one[key] for key in one) else values
        if isinstance(one, slice):
            bounds = [self.compare(getattr(one, k), getattr(two, k)) for k in ("start", "stop", "step")]
            return one if bounds == [one.start, one.stop, one.step] else slice(*bounds)
        if one == two or (one != one and two != two) or isinstance(one, torch.device):
            return one
        if isinstance(one, int) and not isinstance(one, bool):
            return self._expression(one, two)
        raise CannotMerge(f"{one!r} becomes {two!r} at {self.place}")

    def _expression(self, one: int, two: int) -> BatchExpression:
        if one * self.large == two * self.small:
            whole, rest = divmod(one, self.small)
            return BatchExpression(one, self.small, 0) if rest else BatchExpression(whole, 1, 0)
        slope, rest = divmod(two - one, self.large - self.small)
        if rest:
            raise CannotMerge(f"the integer {one} becomes {two} at {self.place}")
        return BatchExpression(slope, 1, one - slope * self.small)


class _ExpressionWriter:
    """Turns expressions into nodes right after the graph's inputs, each once."""

    def __init__(self, graph: fx.Graph, batch_source: fx.Node) -> None:
        self.graph = graph
        self.source = batch_source
        self.size: fx.Node | None = None
        self.last: fx.Node = batch_source
        self.known: dict[BatchExpression, fx.Node] = {}

    def write(self, value: Any) -> Any:
        if isinstance(value, BatchExpression):
            if value not in self.known:
                self.known[value] = self._nodes(value)
            return self.known[value]
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.write, value))
        if isinstance(value, dict):
            return {key: self.write(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(self.write(value.start), self.write(value.stop), self.write(value.step))
        return value

    def _nodes(self, expression: BatchExpression) -> fx.Node:
        if self.size is None:
            # Inputs come first; the size must come after the last of them to keep them together.
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            self.last = self.source if self.source.op != "placeholder" else inputs[-1]
            self.size = self._create("call_method", "size", (self.source, 0), SIZE, "batch_size")
        node = self.size
        steps: tuple[tuple[Callable[..., Any], int, int], ...] = (
            (operator.mul, expression.numerator, 1),
            (operator.floordiv, expression.denominator, 1),
            (operator.add, expression.offset, 0),
        )
        for function, number, neutral in steps:
            if number != neutral:
                node = self._create("call_function", function, (node, number), SCALAR, "batch_size_derived")
        return node

    def _create(self, kind: str, target: Any, args: tuple[Any, ...], op: Any, name: str) -> fx.Node:
        with self.graph.inserting_after(self.last):
            node = self.graph.create_node(kind, target, args, {}, name=name)
        set_info(node, NodeInfo(op, node.name))
        self.last = node
        return node


def _prefer_minus_one(node: fx.Node) -> None:
    """`view(batch, 12)` becomes `view(-1, 12)`; `expand(batch, -1)` keeps a size the operand has already."""
    bound = bind(node)
    name = "shape" if bound.op is RESHAPE else "size"
    sizes = list(bound.option(name))
    dependent = [axis for axis, size in enumerate(sizes) if isinstance(size, BatchExpression)]
    if bound.op is RESHAPE:
        if len(dependent) != 1 or -1 in sizes:
            return
        sizes[dependent[0]] = -1
    else:
        source = bound.operand("input")
        spec = info(source).value if isinstance(source, fx.Node) else None
        target = info(node).value
        if not isinstance(spec, TensorSpec) or not isinstance(target, TensorSpec):
            return
        lead = len(target.shape) - len(spec.shape)
        for axis in dependent:
            if axis >= lead and spec.shape[axis - lead] == target.shape[axis] != 1:
                sizes[axis] = -1
    node.args = (node.args[0], *sizes) if node.op == "call_method" else (node.args[0], tuple(sizes))
    node.kwargs = {}


def _same_call(node: fx.Node, other: fx.Node) -> bool:
    if node.op != other.op:
        return False
    if node.target == other.target:
        return True
    # Builders of output structures are made anew in each recording.
    return getattr(node.target, "kind", node) is getattr(other.target, "kind", other)


def _compare_constants(node: fx.Node, first: Recording, second: Recording) -> None:
    one, two = first.constants.get(str(node.target)), second.constants.get(str(node.target))
    if one is None or two is None:
        return
    if one.shape != two.shape or one.dtype != two.dtype:
        raise CannotMerge(f"the constant {node.target} made in the forward has another shape")
    if not two.is_meta and not torch.equal(one, two):
        raise CannotMerge(f"the constant {node.target} made in the forward has other values")


def _place(node: fx.Node) -> str:
    record = info(node)
    return f"{record.site} ({record.source})" if record.source else record.site
