"""A `Finish` as one compiled loop over rows: its constants as arrays with one entry per column."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from qgraph.numerics import Rounding
from qgraph.simulator.fast.exact import SINGLE, largest
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.steps import Rescaling, fitted

if TYPE_CHECKING:
    from qgraph.simulator.fast.finish import Finish

# (first operand, second or None, result), arrays of rows
Loop: TypeAlias = Callable[[Any, Any, Any], None]
_HIGH_BITS = 31
_WHOLE = 1 << 22  # products `rescale_exactly` rounds to whole numbers; those beyond stay beyond all bounds


def bound_loop(finish: Finish, columns: int, wide: bool) -> Loop:
    """The loop that computes what `finish` says, for arrays of so many columns."""
    low, high, _ = finish.limits(wide)
    if finish.factors is not None:
        return _product(finish, columns, low, high)
    if finish.is_sum:
        return _sum(finish, columns, low, high)
    return _scale(finish, columns, low, high, finish.zero)


def rescaling(finish: Finish, columns: int) -> Rescaling | None:
    """The one term of `finish` in float32 with one rounding, if that is exact or proven equal."""
    if finish.is_sum or finish.factors is not None:
        return None
    bounds, seen, term = finish.limits(False)[:2], finish.limits(True)[:2], finish.terms[0]
    multiplier = _spread(term.multiplier, columns)
    scale = multiplier.astype(np.float64)
    if finish.way != "f32":
        scale = np.ldexp(scale, -_spread(finish.shift, columns).astype(np.int32))
    start = _spread(term.start, columns).astype(np.int64) - term.zero
    small = max(term.bound, largest(term.start) + abs(term.zero)) <= SINGLE
    single = finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN and largest(term.multiplier) <= SINGLE
    if small and single and max(map(abs, seen)) < _WHOLE:
        factors = start.astype(np.float32), scale.astype(np.float32)
        return Rescaling("rescale_exactly", factors, bounds, seen, finish.zero)
    found = fitted(_scale(finish, columns, *seen, 0), scale, start, term.bound, *seen)
    return None if found is None else Rescaling("rescale", found, bounds, seen, finish.zero)


def _scale(finish: Finish, columns: int, low: int, high: int, zero: int) -> Loop:
    compiled, term = loops(), finish.terms[0]
    start = _spread(term.start, columns).astype(np.int64) - term.zero
    f32 = (np.float32(low), np.float32(high), np.int32(zero))
    if finish.way == "f32":
        m = _spread(term.multiplier, columns).astype(np.float32)
        if term.bound + largest(term.start) + abs(term.zero) <= SINGLE:
            moved = start.astype(np.float32)
            return lambda a, b, out: compiled.scale_single(a, moved, m, *f32, out)
        starts = _starts(start)
        return lambda a, b, out: compiled.scale_f32(a, starts[a.dtype == np.float32], m, *f32, out)
    first, second = _roundings(finish, columns)
    whole = _spread(term.multiplier, columns).astype(np.int64)
    if finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
        m, reals = whole * np.ldexp(1.0, -first[0]), start.astype(np.float64)
        return lambda a, b, out: compiled.scale_f64(a, reals, m, float(low), float(high), np.int32(zero), out)
    if finish.rule.first_rounding is None:
        return lambda a, b, out: compiled.scale_int(a, start, whole, first, low, high, zero, out)
    return lambda a, b, out: compiled.scale_two(a, start, whole, first, second, low, high, zero, out)


def _sum(finish: Finish, columns: int, low: int, high: int) -> Loop:
    compiled, terms, zero = loops(), finish.terms, finish.zero
    whole = [_spread(term.multiplier, columns) for term in terms]
    nothing = np.zeros((1, 1), np.int8)  # where there is one term and an offset, a second of zeros
    other_zero = terms[1].zero if len(terms) > 1 else 0
    if len(terms) == 1:
        whole.append(whole[0] * 0)
    if finish.way == "f32":
        starts = _starts(_spread(terms[0].start, columns).astype(np.int64) - terms[0].zero)
        ma, mb = (m.astype(np.float32) for m in whole)
        offset = _spread(finish.offset, columns).astype(np.float32)
        f32 = (np.float32(low), np.float32(high), np.int32(zero))
        zb = np.float32(other_zero)
        return lambda a, b, out: compiled.sum_f32(
            a, starts[a.dtype == np.float32], ma, nothing if b is None else b, zb, mb, offset, *f32, out
        )
    first, _ = _roundings(finish, columns)
    constant = _spread(finish.constant(), columns).astype(np.int64)
    ma, mb = (m.astype(np.int64) for m in whole)
    if finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
        power = np.ldexp(1.0, -first[0])
        ra, rb, offset = ma * power, mb * power, constant * power
        f64 = (float(low), float(high), np.int32(zero))
        return lambda a, b, out: compiled.sum_f64(a, ra, nothing if b is None else b, rb, offset, *f64, out)
    return lambda a, b, out: compiled.sum_int(
        a, ma, nothing if b is None else b, mb, constant, first, low, high, zero, out
    )


def _product(finish: Finish, columns: int, low: int, high: int) -> Loop:
    compiled, zero = loops(), finish.zero
    assert finish.factors is not None
    za, zb = (factor.zero for factor in finish.factors)
    multiplier = _spread(finish.terms[0].multiplier, columns)
    if finish.way == "f32":
        m, f32 = multiplier.astype(np.float32), (np.float32(low), np.float32(high), np.int32(zero))
        return lambda a, b, out: compiled.mul_f32(a, float(za), b, float(zb), m, *f32, out)
    first, second = _roundings(finish, columns)
    whole = multiplier.astype(np.int64)
    if finish.way == "f64" and finish.rule.rounding is Rounding.HALF_EVEN:
        real, f64 = whole * np.ldexp(1.0, -first[0]), (float(low), float(high), np.int32(zero))
        return lambda a, b, out: compiled.mul_f64(a, float(za), b, float(zb), real, *f64, out)
    return lambda a, b, out: compiled.mul_int(a, za, b, zb, whole, first, second, low, high, zero, out)


def _spread(values: torch.Tensor | None, columns: int) -> Any:
    if values is None:
        return np.zeros(columns, np.int64)
    return np.ascontiguousarray(values.reshape(-1).expand(columns).numpy())


def _starts(start: Any) -> tuple[Any, Any]:
    """What is added to integers before they are rounded to float32, and to what is float32 already."""
    return start.astype(np.int32), start.astype(np.float32)


def _roundings(finish: Finish, columns: int) -> tuple[Any, Any]:
    """The only rounding and one that does nothing, or the first and the second of two."""
    shift, rule = _spread(finish.shift, columns).astype(np.int64), finish.rule
    if rule.first_rounding is None:
        return _rounding(shift, rule.rounding), _rounding(shift * 0, rule.rounding)
    first = np.minimum(shift, _HIGH_BITS)
    return _rounding(first, rule.first_rounding), _rounding(shift - first, rule.rounding)


def _rounding(shift: Any, rounding: Rounding) -> Any:
    """`[shift, add, even, away]` as the compiled loops take them."""
    some = (shift > 0).astype(np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    none = np.zeros_like(some)
    add = {Rounding.HALF_EVEN: half - some, Rounding.FLOOR: none}.get(rounding, half)
    even = some if rounding is Rounding.HALF_EVEN else none
    away = -some if rounding is Rounding.HALF_AWAY else none
    return np.stack([shift, add, even, away])
