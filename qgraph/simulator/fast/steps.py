"""A rescaling as one fused multiply-add in float32, proven by looking at both sides of every step.

Codes are a monotone function of a sum: they go up by one at certain sums. `clamp(rint(fma(float32(a), m, c)))` is
monotone too, because each of its parts is. Two such functions are equal if they agree at the sums just before and just
after every step, and at the ends of the sums there can be. So `m` and `c` need not be derived: the nearest float32
numbers are tried, then their neighbours, and what agrees is right.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np

from qgraph.numerics import qint32
from qgraph.simulator.fast.loops import loops

_AROUND = np.arange(-1, 3)  # the sums looked at, beside the one estimated to be the last before a step
_MOVE = 2.0**-18  # of the offset between two tries, in codes
# Neighbours of the multiplier (in float32 numbers) and moves of the offset, the smallest first.
_TRIES = sorted(((i, j) for i in range(-2, 3) for j in range(-6, 7)), key=lambda t: 3 * abs(t[0]) + abs(t[1]))
_MOST = 1 << 9  # steps of a column; more take longer to look at than they save


class Rescaling:
    """A compiled form in float32 with its factors and bounds.

    Args:
        name: of the compiled loop; the one that counts too is `<name>_counted`.
        factors: two arrays `[columns]`; one column stands for any number.
        bounds: of the codes without zero point.
        seen: those bounds, with one code more on the sides where what lies beyond counts as saturated.
        zero: the zero point of the codes.
    """

    def __init__(
        self, name: str, factors: tuple[Any, Any], bounds: tuple[int, int], seen: tuple[int, int], zero: int
    ) -> None:
        compiled = loops("compiled_steps")
        self.loop, self.counting = getattr(compiled, name), getattr(compiled, f"{name}_counted")
        self.factors, self.zero = factors, np.int32(zero)
        self.bounds = np.float32(bounds[0]), np.float32(bounds[1])
        nowhere = -np.inf, np.inf
        self.fitting = tuple(
            np.float32(bound if bound != further else never)
            for bound, further, never in zip(bounds, seen, nowhere, strict=True)
        )

    def spread(self, columns: int) -> Rescaling:
        """The same with so many columns."""
        other = copy(self)
        other.factors = tuple(np.ascontiguousarray(np.broadcast_to(v, columns)) for v in self.factors)  # type: ignore[assignment]
        return other

    def fill(self, sums: Any, _: Any, out: Any) -> None:
        """Codes of sums `[rows, columns]` into `out`."""
        self.loop(sums, *self.factors, *self.bounds, self.zero, out)

    def count(self, sums: Any, out: Any) -> int:
        """As `fill`; how many did not fit."""
        return int(self.counting(sums, *self.factors, *self.bounds, *self.fitting, self.zero, out))


def fitted(
    exact: Callable[[Any, Any, Any], None], scale: Any, start: Any, bound: int, low: int, high: int
) -> tuple[Any, Any] | None:
    """Float32 `m` and `c` `[columns]` with which the fused form equals `exact`; None if none were found.

    Args:
        exact: computes codes of int32 sums `[rows, columns]`, without zero point, as `exact(sums, None, out)`.
        scale: float64 `[columns]`, about the codes per sum.
        start: int64 `[columns]`, what `exact` adds to a sum.
        bound: of `abs(sum + start)`.
        low, high: bounds of the codes.
    """
    if high - low > _MOST or high <= low or not (scale > 0).all():
        return None
    ends = np.clip(np.stack([-bound - start, bound - start]), qint32.qmin, qint32.qmax)
    codes = np.arange(low + 1, high + 1).reshape(-1, 1)
    sums = _sums_at(codes, scale, start, ends)
    expected = _computed(exact, sums)
    around, (first, last) = expected[:-2].reshape(len(_AROUND), *codes.shape[:1], -1), expected[-2:]
    steps = (first < codes) & (codes <= last)
    if not np.all(~steps | ((around[0] < codes) & (codes <= around[-1]))):
        return None  # a step is not where it was estimated to be
    return _search(sums, expected, scale, start * scale, low, high)


def _sums_at(codes: Any, scale: Any, start: Any, ends: Any) -> Any:
    """Sums around every step, then the ends, int32 `[rows, columns]`."""
    before = np.clip(np.floor((codes - 0.5) / scale) - start, *ends).astype(np.int64)
    around = np.clip(_AROUND.reshape(-1, 1, 1) + before, *ends)
    return np.concatenate([around.reshape(-1, scale.size), ends]).astype(np.int32)


def _computed(function: Callable[[Any, Any, Any], None], sums: Any) -> Any:
    out = np.empty(sums.shape, np.int32)
    function(sums, None, out)
    return out


def _search(sums: Any, expected: Any, scale: Any, offset: Any, low: int, high: int) -> tuple[Any, Any] | None:
    """The first of the tries that gives the expected codes, for every column."""
    compiled = loops("compiled_steps")
    nearest = scale.astype(np.float32)
    m, c = nearest.copy(), offset.astype(np.float32)
    left = np.arange(scale.size)
    for neighbour, moves in _TRIES:
        sums, expected = np.ascontiguousarray(sums), np.ascontiguousarray(expected)
        m[left] = (nearest[left].view(np.int32) + neighbour).astype(np.int32).view(np.float32)
        c[left] = (offset[left] + moves * _MOVE).astype(np.float32)
        found = np.empty(sums.shape, np.int32)
        compiled.rescale(sums, m[left], c[left], np.float32(low), np.float32(high), np.int32(0), found)
        wrong = (found != expected).any(0)
        if not wrong.any():
            return m, c
        left, sums, expected = left[wrong], sums[:, wrong], expected[:, wrong]
    return None
