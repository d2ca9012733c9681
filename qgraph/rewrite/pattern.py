"""Patterns: objects that describe a piece of a graph and are the keys of its matches.

    x, residual = any_value(), any_value()
    conv = call(FUSABLE)
    root = call(ADD, conv, residual)          # operands of a commutative operator match in either order

Patterns speak of canonical operators, so one pattern covers every spelling. A pattern that occurs twice must match the
same value both times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qgraph.errors import InternalError, PassError, UserError
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.node_info import info
from qgraph.ir.op import Op
from qgraph.ir.op_table import CONSTANT


@dataclass(eq=False)
class Pattern:
    """Base of all patterns; compared by identity."""

    def accepts(self, value: Any) -> bool:
        """Whether the value itself fits, its operands aside."""
        return True


@dataclass(eq=False)
class AnyValue(Pattern):
    """Any node or number."""


@dataclass(eq=False)
class ConstantValue(Pattern):
    """A number or a tensor the module holds."""

    def accepts(self, value: Any) -> bool:
        if isinstance(value, fx.Node):
            return info(value).op is CONSTANT
        return isinstance(value, (int, float))


@dataclass(eq=False)
class OptionalValue(Pattern):
    """A pattern, or an absent operand."""

    inner: Pattern

    def accepts(self, value: Any) -> bool:
        return value is None or self.inner.accepts(value)


@dataclass(eq=False)
class Call(Pattern):
    """A call of one of `ops` whose leading operands match `operands`; further operands are not looked at."""

    ops: tuple[Op, ...]
    operands: tuple[Pattern, ...] = ()

    def accepts(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and info(value).op in self.ops


def any_value() -> AnyValue:
    """A pattern for any node or number."""
    return AnyValue()


def constant() -> ConstantValue:
    """A pattern for a number or a tensor the module holds."""
    return ConstantValue()


def optional(inner: Pattern) -> OptionalValue:
    """A pattern for an operand that may be absent."""
    return OptionalValue(inner)


def call(ops: Op | tuple[Op, ...], *operands: Pattern) -> Call:
    """A pattern for a call of one of `ops`; options are for the rule's check to look at.

    Raises:
        UserError: `ops` are no operators, or there are more operands than any of them has.
    """
    known = (ops,) if isinstance(ops, Op) else ops
    if not isinstance(known, tuple) or not known or not all(isinstance(op, Op) for op in known):
        raise UserError(
            f"a pattern cannot call {ops!r}", fix="give operators of qgraph.ir.op_table, such as RESHAPE, or a tuple"
        )
    wrong = next((operand for operand in operands if not isinstance(operand, Pattern)), None)
    if wrong is not None:
        raise UserError(
            f"the operand {wrong!r} of a pattern is no pattern",
            fix="give any_value(), constant(), optional(...) or call(...), and look at values in the rule's check",
        )
    most = max(len(op.operands) for op in known)
    if len(operands) > most:
        raise UserError(
            f"a call of {' or '.join(map(str, known))} has {most} operand(s), and the pattern has {len(operands)}",
            fix="look at options in the rule's check: match.bound(pattern).option(name)",
        )
    return Call(known, operands)


@dataclass(frozen=True)
class Match:
    """What each pattern matched."""

    root: fx.Node
    bindings: dict[Pattern, Any] = field(default_factory=dict)

    def __getitem__(self, pattern: Call) -> fx.Node:
        """The node a call pattern matched."""
        value = self.value(pattern)
        if not isinstance(value, fx.Node):
            raise InternalError("a call pattern is bound to something other than a node")
        return value

    def value(self, pattern: Pattern) -> Any:
        """What any pattern matched: a node, a number or None."""
        if pattern not in self.bindings:
            raise PassError(
                f"{pattern!r} is not part of the match",
                fix="ask with the pattern objects that root is made of: match.value(self.x)",
            )
        return self.bindings[pattern]

    def bound(self, pattern: Call) -> Bound:
        """The arguments of the node a call pattern matched."""
        return bind(self[pattern])

    def calls(self) -> list[fx.Node]:
        """All nodes matched by call patterns, the root last."""
        nodes = [value for pattern, value in self.bindings.items() if isinstance(pattern, Call)]
        return [node for node in nodes if node is not self.root] + [self.root]


def matches(root: Call, node: fx.Node) -> Iterator[Match]:
    """Every way in which `root` matches at `node`."""
    for bindings in _match(root, node, {}):
        yield Match(node, bindings)


def _match(pattern: Pattern, value: Any, bindings: dict[Pattern, Any]) -> Iterator[dict[Pattern, Any]]:
    if pattern in bindings:
        if bindings[pattern] is value:
            yield bindings
        return
    if not pattern.accepts(value):
        return
    bindings = {**bindings, pattern: value}
    if isinstance(pattern, OptionalValue) and value is not None:
        yield from _match(pattern.inner, value, bindings)
    elif isinstance(pattern, Call) and pattern.operands:
        yield from _match_operands(pattern, value, bindings)
    else:
        yield bindings


def _match_operands(pattern: Call, node: fx.Node, bindings: dict[Pattern, Any]) -> Iterator[dict[Pattern, Any]]:
    bound = bind(node)
    values = [bound.operand(name) for name in bound.op.operands if name not in _held(bound)]
    if len(values) < len(pattern.operands):
        return
    orders = [values]
    if bound.op.commutative and len(pattern.operands) > 1 and values[0] is not values[1]:
        orders.append([values[1], values[0], *values[2:]])
    for order in orders:
        yield from _match_all(pattern.operands, order, bindings)


def _match_all(
    patterns: tuple[Pattern, ...], values: list[Any], bindings: dict[Pattern, Any]
) -> Iterator[dict[Pattern, Any]]:
    if not patterns:
        yield bindings
        return
    for extended in _match(patterns[0], values[0], bindings):
        yield from _match_all(patterns[1:], values[1:], extended)


def _held(bound: Bound) -> tuple[str, ...]:
    return bound.op.parameters if bound.module is not None else ()
