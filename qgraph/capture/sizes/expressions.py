"""Expressions of the batch size, and conditions on it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from qgraph.ir.node_info import SourceLine, info

Number: TypeAlias = "int | float"
_HUGE = 10**15
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"}
_SYMBOLS |= {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class CannotMerge(Exception):
    """Two recordings differ in more than sizes; the message is the reason, for the user."""


@dataclass(frozen=True)
class Linear:
    """The integer `slope * batch + offset`."""

    slope: int
    offset: int

    def at(self, batch: int) -> Number:
        """The value at a batch size."""
        return self.slope * batch + self.offset

    def __str__(self) -> str:
        text = "batch" if self.slope == 1 else f"{self.slope} * batch"
        return f"{text} {'+' if self.offset > 0 else '-'} {abs(self.offset)}" if self.offset else text


@dataclass(frozen=True)
class SizeOf:
    """A size that does not grow evenly with the batch; the graph reads it where it is.

    Args:
        node: the node, in the first recording, whose value is measured.
        axis: its dimension.
        known: batch size and value in the recordings.
    """

    node: fx.Node
    axis: int
    known: tuple[tuple[int, int], ...]

    def at(self, batch: int) -> Number:
        """The value at a batch size that was recorded.

        Raises:
            CannotMerge: it was not.
        """
        for size, value in self.known:
            if size == batch:
                return value
        raise CannotMerge(f"{self} at batch {batch} is not known")

    def __str__(self) -> str:
        return f"the size of {info(self.node).site} along dimension {self.axis}"


@dataclass(frozen=True)
class Computed:
    """A Python function of sizes and numbers."""

    function: Callable[..., Any]
    parts: tuple[Expression | Number, ...]

    def at(self, batch: int) -> Number:
        """The value at a batch size."""
        value: Number = self.function(*(value_at(part, batch) for part in self.parts))
        return value

    def __str__(self) -> str:
        return _format(self.function, self.parts)


Expression: TypeAlias = "Linear | SizeOf | Computed"


@dataclass(frozen=True)
class Condition:
    """A comparison that the forward made, and how it came out."""

    function: Callable[[Any, Any], bool]
    left: Expression | Number
    right: Expression | Number
    outcome: bool = True
    source: SourceLine | None = field(default=None, compare=False)

    def holds(self, batch: int) -> bool:
        """Whether it comes out the same at this batch size."""
        try:
            return self._compare(batch) == self.outcome
        except (ArithmeticError, ValueError):
            return False

    @property
    def always(self) -> bool:
        """Whether it is known to come out the same at every batch size."""
        if not all(isinstance(side, (int, float, Linear)) for side in (self.left, self.right)):
            return self.left == self.right
        if self.function not in (operator.eq, operator.ne):
            return self._compare(1) == self._compare(_HUGE)  # linear functions cross once at most
        slope = _slope(self.left) - _slope(self.right)
        gap = value_at(self.right, 0) - value_at(self.left, 0)
        return gap % slope != 0 or gap // slope < 1 if slope else True

    def _compare(self, batch: int) -> bool:
        return bool(self.function(value_at(self.left, batch), value_at(self.right, batch)))

    def __str__(self) -> str:
        text = _format(self.function, (self.left, self.right))
        return f"`{text}` is {self.outcome}" + (f" at {self.source}" if self.source else "")


def fit(one: int, two: int, small: int, large: int) -> Linear | None:
    """The plausible linear function through two values; None if there is none."""
    slope, rest = divmod(two - one, large - small)
    offset = one - slope * small
    # A square seen at two sizes lies on a line too, but on one with a large negative offset.
    return None if rest or abs(offset) * 2 >= large else Linear(slope, offset)


def value_at(part: Expression | Number, batch: int) -> Number:
    """The value of an expression or number at a batch size."""
    return part if isinstance(part, (int, float)) else part.at(batch)


def number_of_parts(length: int, part: int) -> int:
    """How many parts of at most `part` make `length`."""
    return -(-length // part)


def _format(function: Callable[..., Any], parts: tuple[Expression | Number, ...]) -> str:
    name = getattr(function, "__name__", "function")
    texts = list(map(str, parts))
    if name not in _SYMBOLS:
        return f"{name.rstrip('_')}({', '.join(texts)})"
    left, right = (f"({text})" if " " in text else text for text in texts)
    return f"{left} {_SYMBOLS[name]} {right}"


def _slope(part: Expression | Number) -> int:
    return part.slope if isinstance(part, Linear) else 0
