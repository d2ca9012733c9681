"""Freeing the batch size: the same forward recorded at two batch sizes, merged into one graph.

Where the two recordings hold different integers, the integer depends on the batch: it becomes an expression of the
first input's size. Reshapes need none, because -1 says the same. Most integers say themselves how they come about
(`qgraph.capture.sizes`); of others a plausible line through the two values is taken, to be confirmed at further sizes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.capture.recording.nodes import describe, same_call
from qgraph.capture.recording.record import Recording
from qgraph.capture.sizes.expressions import CannotMerge, Computed, Condition, Expression, Linear, SizeOf, fit, value_at
from qgraph.capture.sizes.tracked import SizeWatch, expression_of, is_tracked
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op import Op
from qgraph.ir.op_table import EXPAND, RESHAPE, SCALAR, SIZE
from qgraph.ir.values import TensorSpec


@dataclass(frozen=True)
class _Substitution:
    """New arguments of one node, with expressions where numbers depend on the batch."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Merge:
    """What to change in the first recording so that it serves other batch sizes.

    Args:
        substitutions: new arguments.
        conditions: what must hold of a batch size for the forward to take the recorded path.
        doubtful: whether an integer's origin was guessed, or a size went where it could not be followed.
    """

    substitutions: tuple[_Substitution, ...]
    conditions: tuple[Condition, ...]
    doubtful: bool

    def serves(self, batch: int) -> bool:
        """Whether the graph is right at this batch size."""
        return all(condition.holds(batch) for condition in self.conditions)


def merge(first: Recording, second: Recording, watch: SizeWatch) -> Merge:
    """Compares two recordings of one model at the batch sizes of `watch`, which followed the second.

    Raises:
        CannotMerge: control flow, constants or arguments depend on the batch size in a way that is not known.
    """
    comparison = _Comparison(watch.small, watch.large)
    substitutions = []
    for node, other in _pairs(first, second):
        args, kwargs = comparison.of(node, other, node.args, node.kwargs)
        if args is not node.args or kwargs is not node.kwargs:
            substitutions.append(_Substitution(node, args, kwargs))
    return Merge(tuple(substitutions), tuple(watch.conditions), watch.escaped or comparison.guessed)


def confirm(merged: Merge, first: Recording, other: Recording, batch: int) -> None:
    """Checks a merge against a recording at one more batch size.

    Raises:
        CannotMerge: the forward holds other numbers there.
    """
    changed = {substitution.node: substitution for substitution in merged.substitutions}
    comparison = _Confirmation(batch)
    for node, twin in _pairs(first, other):
        expected = changed.get(node)
        args, kwargs = (node.args, node.kwargs) if expected is None else (expected.args, expected.kwargs)
        comparison.of(node, twin, args, kwargs)


def apply_merge(graph: fx.Graph, merged: Merge, batch_source: fx.Node) -> None:
    """Writes the expressions into the graph.

    Args:
        batch_source: the input whose dimension 0 is the batch.
    """
    writer = _ExpressionWriter(graph, batch_source)
    for substitution in merged.substitutions:
        node = substitution.node
        node.args, node.kwargs = substitution.args, substitution.kwargs
        if info(node).op in (RESHAPE, EXPAND) and not info(node).in_place:
            _prefer_minus_one(node)
        node.args, node.kwargs = writer.write(node.args, node), writer.write(node.kwargs, node)


def _pairs(first: Recording, second: Recording) -> list[tuple[fx.Node, fx.Node]]:
    for node, other in zip(first.created, second.created, strict=False):
        if not same_call(node, other):
            raise CannotMerge(f"control flow depends on it: {describe(node)} differs from {describe(other)}")
        if node.op == "get_attr":
            _compare_constants(node, first, second)
    if len(first.created) != len(second.created):
        raise CannotMerge(f"the number of steps depends on it: {len(first.created)} and {len(second.created)}")
    return list(zip(first.created, second.created, strict=True))


class _Comparison:
    """Walks two argument structures; equal parts are returned as they are, by identity."""

    def __init__(self, small: int, large: int) -> None:
        self.small = small
        self.large = large
        self.guessed = False
        self.twin: dict[fx.Node, fx.Node] = {}
        self.place = ""

    def of(self, node: fx.Node, other: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of `node` compared with those of its twin."""
        self.twin[node] = other
        self.place = describe(node)
        return self.compare(args, other.args), self.compare(kwargs, other.kwargs)

    def compare(self, one: Any, two: Any) -> Any:
        if isinstance(one, fx.Node):
            if self.twin.get(one) is not two:
                raise CannotMerge(f"data flow depends on it at {self.place}")
            return one
        if is_tracked(two) or isinstance(one, (int, float, Linear, SizeOf, Computed)):
            return self.number(one, two)
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
        raise CannotMerge(f"{one!r} becomes {two!r} at {self.place}")

    def number(self, one: Any, two: Any) -> Any:
        """A number, or the expression that gives it at every batch size."""
        if is_tracked(two):
            expression = expression_of(two)
            if value_at(expression, self.small) != one:
                raise CannotMerge(f"{one!r} becomes {expression} at {self.place}")
            return expression
        if type(one) is type(two) and (one == two or (one != one and two != two)):
            return one
        line = None
        if type(one) is int and type(two) is int:
            line = fit(one, two, self.small, self.large)
        if line is None:
            raise CannotMerge(f"{one!r} becomes {two!r} at {self.place}")
        self.guessed = True
        return line


class _Confirmation(_Comparison):
    """Compares expressions with the numbers at one more batch size."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch, batch)

    def number(self, one: Any, two: Any) -> Any:
        expected = one
        if isinstance(one, (Linear, Computed)):
            expected = _value(one, self.small)
        known = expected is not None and not isinstance(one, SizeOf)
        if known and not (expected == two or (expected != expected and two != two)):
            raise CannotMerge(f"{expected!r} would be {two!r} at batch {self.small} at {self.place}")
        return one


def _value(expression: Expression, batch: int) -> int | float | None:
    try:
        return expression.at(batch)
    except CannotMerge:  # a size that only the graph can tell
        return None


class _ExpressionWriter:
    """Turns expressions into nodes: of the batch size alone right after the graph's inputs, each once."""

    def __init__(self, graph: fx.Graph, batch_source: fx.Node) -> None:
        self.graph = graph
        self.source = batch_source
        self.size: fx.Node | None = None
        self.last: fx.Node = batch_source
        self.known: dict[Expression, fx.Node] = {}

    def write(self, value: Any, user: fx.Node) -> Any:
        """`value`, an argument of `user`, with nodes for expressions."""
        if isinstance(value, (Linear, SizeOf, Computed)):
            return self._node(value, user)
        if isinstance(value, (tuple, list)):
            return type(value)(self.write(entry, user) for entry in value)
        if isinstance(value, dict):
            return {key: self.write(entry, user) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(*(self.write(bound, user) for bound in (value.start, value.stop, value.step)))
        return value

    def _node(self, expression: Expression, user: fx.Node) -> fx.Node:
        if expression not in self.known:
            self.known[expression] = self._written(expression, user)
        return self.known[expression]

    def _written(self, expression: Expression, user: fx.Node) -> fx.Node:
        if isinstance(expression, SizeOf):
            with self.graph.inserting_after(expression.node):
                return self._create("call_method", "size", (expression.node, expression.axis), SIZE, "size")
        if isinstance(expression, Linear):
            node = self._batch_size()
            steps = ((operator.mul, expression.slope, 1), (operator.add, expression.offset, 0))
            for function, number, neutral in steps:
                if number != neutral:
                    node = self._after_inputs("call_function", function, (node, number), SCALAR, "batch_size_derived")
            return node
        parts = tuple(part if isinstance(part, (int, float)) else self._node(part, user) for part in expression.parts)
        if not _measures(expression):
            return self._after_inputs("call_function", expression.function, parts, SCALAR, "batch_size_derived")
        with self.graph.inserting_before(user):
            return self._create("call_function", expression.function, parts, SCALAR, "size_derived")

    def _batch_size(self) -> fx.Node:
        if self.size is None:
            # Inputs come first; the size must come after the last of them to keep them together.
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            self.last = self.source if self.source.op != "placeholder" else inputs[-1]
            self.size = self._after_inputs("call_method", "size", (self.source, 0), SIZE, "batch_size")
        return self.size

    def _after_inputs(self, kind: str, target: Any, args: tuple[Any, ...], op: Op, name: str) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self._create(kind, target, args, op, name)
        return self.last

    def _create(self, kind: str, target: Any, args: tuple[Any, ...], op: Op, name: str) -> fx.Node:
        node = self.graph.create_node(kind, target, args, {}, name=name)
        set_info(node, NodeInfo(op, node.name))
        return node


def _measures(expression: Expression | float) -> bool:
    """Whether the expression needs the size of a tensor computed on the way."""
    if isinstance(expression, Computed):
        return any(map(_measures, expression.parts))
    return isinstance(expression, SizeOf)


def _prefer_minus_one(node: fx.Node) -> None:
    """`view(batch, 12)` becomes `view(-1, 12)`; `expand(batch, -1)` keeps a size the operand has already."""
    bound = bind(node)
    name = "shape" if bound.op is RESHAPE else "size"
    sizes = list(bound.option(name))
    dependent = [axis for axis, size in enumerate(sizes) if isinstance(size, (Linear, SizeOf, Computed))]
    if bound.op is RESHAPE:
        # Only what grows evenly is sure to be the number that -1 stands for.
        if len(dependent) != 1 or -1 in sizes or not isinstance(sizes[dependent[0]], Linear):
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


def _compare_constants(node: fx.Node, first: Recording, second: Recording) -> None:
    one, two = first.constants.get(str(node.target)), second.constants.get(str(node.target))
    if one is None or two is None:
        return
    if one.shape != two.shape or one.dtype != two.dtype:
        raise CannotMerge(f"the constant {node.target} made in the forward has another shape")
    if two.is_meta:
        raise CannotMerge(f"the constant {node.target} made in the forward cannot be compared")
    if not torch.equal(one, two):
        raise CannotMerge(f"the constant {node.target} made in the forward has other values")
