"""Python numbers that remember how they follow from the batch size.

When a model is recorded again at another batch size, `x.shape[0]` is a `TrackedInt`: arithmetic with it is noted as an
expression, a comparison as a condition under which the recording holds. Where a number goes on a way that cannot be
followed (`int()`, `len()`, `math.sqrt`, a key of a dictionary), that is noted as an escape.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from qgraph.capture.model.source import user_line
from qgraph.capture.sizes.expressions import (
    CannotMerge,
    Computed,
    Condition,
    Expression,
    Linear,
    Number,
    SizeOf,
    fit,
    number_of_parts,
)


class SizeWatch:
    """What the forward does with sizes in one recording at another batch size.

    Args:
        small: the batch size of the first recording.
        large: the batch size of this one.
        paused: whether a torch function runs, whose own decisions are made again whenever the graph calls it.
    """

    def __init__(self, small: int, large: int, paused: Callable[[], bool]) -> None:
        self.small = small
        self.large = large
        self.paused = paused
        self.conditions: dict[Condition, None] = {}
        self.escaped = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hears of comparisons and escapes."""
        _running.watch = self
        try:
            yield
        finally:
            _running.watch = None

    def size(self, small: int, large: int, node: fx.Node | None, axis: int) -> int:
        """A size read from a tensor, known at both batch sizes.

        Raises:
            CannotMerge: it does not grow evenly and belongs to no node that the graph could ask.
        """
        if small == large:
            return large
        found = fit(small, large, self.small, self.large)
        if found is None and node is None:
            raise CannotMerge(f"a size grows unevenly with it: {small} becomes {large} at {user_line()}")
        expression = found or SizeOf(node, axis, ((self.small, small), (self.large, large)))  # type: ignore[arg-type]
        return TrackedInt(large, expression)

    def decide(self, condition: Condition) -> None:
        """Notes a comparison.

        Raises:
            CannotMerge: it came out otherwise in the first recording.
        """
        if self.paused() or condition in self.conditions or condition.always:
            return
        placed = Condition(condition.function, condition.left, condition.right, condition.outcome, user_line())
        if not placed.holds(self.small):
            raise CannotMerge(f"control flow depends on it: {placed} only at some sizes")
        self.conditions[placed] = None

    def escape(self) -> None:
        """Notes that a number left what can be followed."""
        if not self.paused():
            self.escaped = True


class _Running(threading.local):
    watch: SizeWatch | None = None


_running = _Running()


def is_tracked(value: object) -> bool:
    """Whether a number carries an expression."""
    return isinstance(value, (TrackedInt, TrackedFloat))


def expression_of(value: Number) -> Expression | Number:
    """The expression of a tracked number; another number as Python's own."""
    if isinstance(value, (TrackedInt, TrackedFloat)):
        return value.expression
    return float(value) if isinstance(value, float) else int(value)


def bare(value: Any) -> Any:
    """An ordinary number for a tracked one; anything else as it is."""
    if isinstance(value, TrackedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, TrackedFloat) else value


def number_of(length: int, part: int) -> int:
    """`number_of_parts` of sizes that may be tracked."""
    number: int = _tracked(number_of_parts(bare(length), bare(part)), _combined(number_of_parts, length, part))
    return number


def escape() -> None:
    """Tells the running watch, if there is one, that a number escaped."""
    if _running.watch is not None:
        _running.watch.escape()


def _tracked(value: Any, expression: Expression | Number) -> Any:
    if isinstance(expression, Computed):
        escape()  # two such numbers say little about how often a loop over `range` of them runs elsewhere
    if isinstance(value, bool) or isinstance(expression, (int, float)):
        return value
    if isinstance(value, int):
        return TrackedInt(value, expression)
    return TrackedFloat(value, expression) if isinstance(value, float) else value


def _combined(function: Callable[..., Any], *values: Number) -> Expression | Number:
    parts = tuple(map(expression_of, values))
    if len(parts) == 2 and all(isinstance(part, (int, Linear)) for part in parts):
        found = _linear(function, *parts)  # type: ignore[arg-type]
        if found is not None:
            return found if found.slope else found.offset
    return Computed(function, parts)


def _linear(function: Callable[..., Any], left: int | Linear, right: int | Linear) -> Linear | None:
    one = left if isinstance(left, Linear) else Linear(0, left)
    two = right if isinstance(right, Linear) else Linear(0, right)
    if function is operator.add:
        return Linear(one.slope + two.slope, one.offset + two.offset)
    if function is operator.sub:
        return Linear(one.slope - two.slope, one.offset - two.offset)
    if function is operator.mul and not (one.slope and two.slope):
        factor, other = (one.offset, two) if not one.slope else (two.offset, one)
        return Linear(factor * other.slope, factor * other.offset)
    if function is operator.floordiv and not two.slope and two.offset and one.slope % two.offset == 0:
        return Linear(one.slope // two.offset, one.offset // two.offset)
    return None


class TrackedInt(int):
    """An integer with the expression it comes from."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> TrackedInt:
        number = super().__new__(cls, value)
        number.expression = expression
        return number


class TrackedFloat(float):
    """A floating-point number with the expression it comes from."""

    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> TrackedFloat:
        number = super().__new__(cls, value)
        number.expression = expression
        return number


def _binary(function: Callable[..., Any], *, reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        return _tracked(function(bare(left), bare(right)), _combined(function, left, right))

    return method


def _escaping(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *options: Any) -> Any:
        escape()
        return function(bare(self), *options)

    return method


def _ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    escape()
    return getattr(ufunc, method)(*map(bare, inputs), **options)


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *digits: Any) -> Any:
        return _tracked(function(bare(self), *digits), Computed(function, (expression_of(self), *digits)))

    return method


def _comparison(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        outcome = function(bare(self), bare(other))
        if _running.watch is not None:
            _running.watch.decide(Condition(function, expression_of(self), expression_of(other), outcome))
        return outcome

    return method


def _truth(self: Any) -> bool:
    return bool(self != 0)


def _divmod(one: Any, two: Any) -> tuple[Any, Any]:
    return one // two, one % two


def _reduced(self: Any) -> tuple[type[Any], tuple[Any]]:
    value = bare(self)
    return type(value), (value,)


def _same(self: Any, memo: object = None) -> Any:
    return self


def _install(kind: Any, native: type[Any]) -> None:
    """Gives a tracked class Python's arithmetic, comparisons and copies."""
    binary = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
    binary += ["and_", "or_", "xor", "lshift", "rshift"] if native is int else []
    for name in binary:
        function, plain = getattr(operator, name), name.rstrip("_")
        setattr(kind, f"__{plain}__", _binary(function, reflected=False))
        setattr(kind, f"__r{plain}__", _binary(function, reflected=True))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
    unary: dict[str, Callable[..., Any]] = {"abs": operator.abs}
    if native is float:
        unary |= {"neg": operator.neg, "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "round": round}
    for name, function in unary.items():
        setattr(kind, f"__{name}__", _unary(function))
    kind.__divmod__ = _divmod
    kind.__rdivmod__ = lambda self, other: _divmod(other, self)
    kind.__bool__ = _truth
    kind.__pos__ = kind.__copy__ = kind.__deepcopy__ = _same
    if native is int:
        kind.bit_length = _escaping(int.bit_length)
        kind.__neg__ = lambda self: 0 - self
        kind.__ceil__ = kind.__floor__ = kind.__trunc__ = kind.__round__ = _same
    for name in ("int", "float", "hash", "str", "repr", "format"):
        setattr(kind, f"__{name}__", _escaping(getattr(native, f"__{name}__")))
    kind.__array_ufunc__ = _ufunc
    kind.__reduce__ = _reduced


_install(TrackedInt, int)
_install(TrackedFloat, float)
