"""Rescaling loops compiled by numba, one pass over memory each; the optional extra `fast`.

Arrays are `[rows, columns]`, factors `[columns]`. `start` is added to the first operand: a bias, or minus a zero point.
A second operand may have one row or one column. `low` and `high` bound what is rounded, before `zero` is added. Integer
loops work in 64 bits and know every rounding as one formula,

    (v + add + ((v >> shift) & even) + ((v >> 63) & away)) >> shift          rounding = [shift, add, even, away]

    half_even  add = half - 1, even = 1         half_up    add = half
    half_away  add = half, away = -1            floor      nothing

with `half = 2**(shift - 1)`; shift 0 rounds nothing. Float loops round half to even by adding 1.5 * 2**23 (2**52 in
float64): there floats are whole numbers, so that the sum is rounded as is wanted, and its low bits are the result in
two's complement. What lies beyond 2**22 stays beyond, and is bounded before the bits are read.
"""

# mypy: disable-error-code="call-arg, var-annotated, no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
# mypy: disable-error-code="unreachable"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from qgraph.numerics import quint8

_BYTE = quint8.qmax


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The loop, compiled at its first call and kept on disk where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder for the cache
        return numba.njit(nogil=True)(function)


@intrinsic
def _fused(context, x, y, z):
    """`x * y + z` with one rounding, all of the kind of `x`."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return x(x, x, x), generate


@intrinsic
def _bits(context, x):
    """The bits of a float as an integer of its width."""
    result = types.int32 if x.bitwidth == _SINGLE_BITS else types.int64

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(result))

    return result(x), generate


_SINGLE_BITS = 32
_TO_WHOLE, _TO_WHOLE_64 = np.float32(3 << 22), np.float64(3 << 51)
_WHOLE_BITS = np.int32(_TO_WHOLE.view(np.int32))


@_compiled
def scale_single(a, start, m, low, high, zero, out):
    """`rint(fl((a + start) * m))`, the float rule, where `a`, `start` and their sum are exact in float32."""
    low, high, base = low + _TO_WHOLE, high + _TO_WHOLE, zero - _WHOLE_BITS
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t = (np.float32(a[i, j]) + start[j]) * m[j] + _TO_WHOLE
            out[i, j] = _bits(min(max(t, low), high)) + base


@_compiled
def scale_f32(a, start, m, low, high, zero, out):
    """`rint(fl(float32(a + start) * m))`, the float rule; integers are added before they are rounded."""
    low, high, base = low + _TO_WHOLE, high + _TO_WHOLE, zero - _WHOLE_BITS
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t = np.float32(a[i, j] + start[j]) * m[j] + _TO_WHOLE
            out[i, j] = _bits(min(max(t, low), high)) + base


@_compiled
def scale_f64(a, start, m, low, high, zero, out):
    """`rint((a + start) * m)` in float64, for products proven exact."""
    low, high = low + _TO_WHOLE_64, high + _TO_WHOLE_64
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t = (np.float64(a[i, j]) + start[j]) * m[j] + _TO_WHOLE_64
            out[i, j] = np.int32(_bits(min(max(t, low), high))) + zero


@_compiled
def scale_int(a, start, m, rounding, low, high, zero, out):
    """One rounding of `(a + start) * m`."""
    shift, add, even, away = rounding[0], rounding[1], rounding[2], rounding[3]
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            v = (np.int64(a[i, j]) + start[j]) * m[j]
            q = (v + add[j] + ((v >> shift[j]) & even[j]) + ((v >> 63) & away[j])) >> shift[j]
            out[i, j] = min(max(q, low), high) + zero


@_compiled
def scale_two(a, start, m, first, second, low, high, zero, out):
    """Two roundings of `(a + start) * m`."""
    shift, add, even, away = first[0], first[1], first[2], first[3]
    shift2, add2, even2, away2 = second[0], second[1], second[2], second[3]
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            v = (np.int64(a[i, j]) + start[j]) * m[j]
            w = (v + add[j] + ((v >> shift[j]) & even[j]) + ((v >> 63) & away[j])) >> shift[j]
            q = (w + add2[j] + ((w >> shift2[j]) & even2[j]) + ((w >> 63) & away2[j])) >> shift2[j]
            out[i, j] = min(max(q, low), high) + zero


@_compiled
def sum_f32(a, start, ma, b, b_zero, mb, offset, low, high, zero, out):
    """`rint(fl(fl(fl(float32(a + start) * ma) + fl((b - b_zero) * mb)) + offset))`, the float rule."""
    low, high, base = low + _TO_WHOLE, high + _TO_WHOLE, zero - _WHOLE_BITS
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        if b.shape[1] == a.shape[1]:
            for j in range(a.shape[1]):
                t = np.float32(a[i, j] + start[j]) * ma[j] + (np.float32(b[k, j]) - b_zero) * mb[j]
                out[i, j] = _bits(min(max(t + offset[j] + _TO_WHOLE, low), high)) + base
        else:
            one = np.float32(b[k, 0]) - b_zero
            for j in range(a.shape[1]):
                t = np.float32(a[i, j] + start[j]) * ma[j] + one * mb[j]
                out[i, j] = _bits(min(max(t + offset[j] + _TO_WHOLE, low), high)) + base


@_compiled
def sum_f64(a, ma, b, mb, offset, low, high, zero, out):
    """`rint(a * ma + b * mb + offset)` in float64, for sums proven exact."""
    low, high = low + _TO_WHOLE_64, high + _TO_WHOLE_64
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        if b.shape[1] == a.shape[1]:
            for j in range(a.shape[1]):
                t = _fused(np.float64(a[i, j]), ma[j], _fused(np.float64(b[k, j]), mb[j], offset[j]))
                out[i, j] = np.int32(_bits(min(max(t + _TO_WHOLE_64, low), high))) + zero
        else:
            one = np.float64(b[k, 0])
            for j in range(a.shape[1]):
                t = _fused(np.float64(a[i, j]), ma[j], _fused(one, mb[j], offset[j]))
                out[i, j] = np.int32(_bits(min(max(t + _TO_WHOLE_64, low), high))) + zero


@_compiled
def sum_int(a, ma, b, mb, offset, rounding, low, high, zero, out):
    """One rounding of `a * ma + b * mb + offset`."""
    shift, add, even, away = rounding[0], rounding[1], rounding[2], rounding[3]
    wide = b.shape[1] == a.shape[1]
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        for j in range(a.shape[1]):
            other = np.int64(b[k, j] if wide else b[k, 0])
            v = np.int64(a[i, j]) * ma[j] + other * mb[j] + offset[j]
            q = (v + add[j] + ((v >> shift[j]) & even[j]) + ((v >> 63) & away[j])) >> shift[j]
            out[i, j] = min(max(q, low), high) + zero


@_compiled
def mul_f32(a, a_zero, b, b_zero, m, low, high, zero, out):
    """`rint(fl(float32((a - a_zero) * (b - b_zero)) * m))`, the float rule; float64 holds the product."""
    wide = b.shape[1] == a.shape[1]
    low, high, base = low + _TO_WHOLE, high + _TO_WHOLE, zero - _WHOLE_BITS
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        for j in range(a.shape[1]):
            other = np.float64(b[k, j] if wide else b[k, 0]) - b_zero
            t = np.float32((np.float64(a[i, j]) - a_zero) * other) * m[j] + _TO_WHOLE
            out[i, j] = _bits(min(max(t, low), high)) + base


@_compiled
def mul_f64(a, a_zero, b, b_zero, m, low, high, zero, out):
    """`rint((a - a_zero) * (b - b_zero) * m)` in float64, for products proven exact."""
    low, high = low + _TO_WHOLE_64, high + _TO_WHOLE_64
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        if b.shape[1] == a.shape[1]:
            for j in range(a.shape[1]):
                t = (np.float64(a[i, j]) - a_zero) * (np.float64(b[k, j]) - b_zero)
                out[i, j] = np.int32(_bits(min(max(t * m[j] + _TO_WHOLE_64, low), high))) + zero
        else:
            one = np.float64(b[k, 0]) - b_zero
            for j in range(a.shape[1]):
                t = (np.float64(a[i, j]) - a_zero) * one
                out[i, j] = np.int32(_bits(min(max(t * m[j] + _TO_WHOLE_64, low), high))) + zero


@_compiled
def mul_int(a, a_zero, b, b_zero, m, first, second, low, high, zero, out):
    """Two roundings of `(a - a_zero) * (b - b_zero) * m`; a shift of 0 makes the second none."""
    shift, add, even, away = first[0], first[1], first[2], first[3]
    shift2, add2, even2, away2 = second[0], second[1], second[2], second[3]
    wide = b.shape[1] == a.shape[1]
    for i in range(a.shape[0]):
        k = i if b.shape[0] > 1 else 0
        for j in range(a.shape[1]):
            other = np.int64(b[k, j] if wide else b[k, 0]) - b_zero
            v = (np.int64(a[i, j]) - a_zero) * other * m[j]
            w = (v + add[j] + ((v >> shift[j]) & even[j]) + ((v >> 63) & away[j])) >> shift[j]
            q = (w + add2[j] + ((w >> shift2[j]) & even2[j]) + ((w >> 63) & away2[j])) >> shift2[j]
            out[i, j] = min(max(q, low), high) + zero


@_compiled
def sum_fused(a, b, ratio_a, ratio_b, start, low, high, out):
    """`rint(fma(a, ratio_a, fma(b, ratio_b, start)))` in float32."""
    low, high = low + _TO_WHOLE, high + _TO_WHOLE
    for i in range(a.shape[0]):
        t = _fused(np.float32(a[i]), ratio_a, _fused(np.float32(b[i]), ratio_b, start)) + _TO_WHOLE
        out[i] = _bits(min(max(t, low), high)) - _WHOLE_BITS


@_compiled
def look_up_pairs(first, second, table, out):
    """`out[i] = table[256 * first[i] + second[i]]`, bytes read as unsigned."""
    for i in range(first.shape[0]):
        out[i] = table[(np.int32(first[i]) << 8) + second[i]]


@_compiled
def count_pairs(first, second, table):
    """How many pairs have a true entry in `table`."""
    count = 0
    for i in range(first.shape[0]):
        count += table[(np.int32(first[i]) << 8) + second[i]]
    return count


@_compiled
def split(codes, flip, out):
    """Low bytes of 16-bit codes, and high bytes xor `flip`."""
    for i in range(codes.shape[0]):
        out[0, i] = codes[i] & _BYTE
        out[1, i] = ((codes[i] >> 8) & _BYTE) ^ flip


@_compiled
def join(low, high, start, out):
    """`low + 256 * high + start` of whole numbers `[rows, columns]`, in the dtype of `out`, which wraps."""
    for i in range(low.shape[0]):
        for j in range(low.shape[1]):
            out[i, j] = np.int32(low[i, j]) + (np.int64(np.int32(high[i, j])) << 8) + start[j]


@_compiled
def look_up(codes, table, out):
    """`out[i] = table[codes[i]]`, codes read as unsigned."""
    for i in range(codes.shape[0]):
        out[i] = table[codes[i]]


@_compiled
def bound(x, low, high, out):
    """`clamp(x)` of integers; returns how many lie outside."""
    outside = 0
    for i in range(x.shape[0]):
        held = min(max(x[i], low), high)
        outside += held != x[i]
        out[i] = held
    return outside


@_compiled
def quantize(x, scale, divides, zero, low, high, out):
    """`clamp(rint(x * scale) + zero)` of float32 reals, NaN as zero; `divides` says that `x / scale` is meant."""
    for i in range(x.shape[0]):
        t = np.rint(x[i] / scale if divides else x[i] * scale)
        t = (t if t == t else np.float32(0)) + zero
        out[i] = np.int32(min(max(t, low), high))


@_compiled
def unquantizable(x, scale, divides, zero, low, high):
    """How many reals have codes beyond the bounds, NaN among them."""
    outside = 0
    for i in range(x.shape[0]):
        t = np.rint(x[i] / scale if divides else x[i] * scale) + zero
        outside += not (low <= t <= high)
    return outside


@_compiled
def column_sums(x, start, out):
    """`start + sum over rows` of integers `[N, rows, columns]`, 32 bits."""
    for n in range(x.shape[0]):
        total = out[n]
        total[:] = start
        for i in range(x.shape[1]):
            codes = x[n, i]
            for j in range(codes.shape[0]):
                total[j] += codes[j]


@_compiled
def interleave(planes, out):
    """`[N, C, pixels]` as `[N, pixels, C]`."""
    for n in range(planes.shape[0]):
        for c in range(planes.shape[1]):
            for i in range(planes.shape[2]):
                out[n, i, c] = planes[n, c, i]


@_compiled
def max_pool(x, kernel, stride, padding, dilation, highest, out):
    """Largest codes of 2-d windows, first down, then across.

    `x` and `out` are `[N, H, W, C]`, and `out` starts with the lowest code; `highest` is memory for one row `[W, C]`.
    """
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            highest[:] = out[n, i, 0, 0]
            for a in range(kernel[0]):
                row = i * stride[0] - padding[0] + a * dilation[0]
                if 0 <= row < x.shape[1]:
                    line, codes = highest.reshape(-1), x[n, row].reshape(-1)
                    for k in range(line.shape[0]):
                        line[k] = max(line[k], codes[k])
            for j in range(out.shape[2]):
                found = out[n, i, j]
                for b in range(kernel[1]):
                    column = j * stride[1] - padding[1] + b * dilation[1]
                    if 0 <= column < x.shape[2]:
                        codes = highest[column]
                        for c in range(found.shape[0]):
                            found[c] = max(found[c], codes[c])
