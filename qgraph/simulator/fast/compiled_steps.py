"""Compiled loops of rescalings that `steps` has proven: `clamp(rint(fma(a, m, c)))` in float32,
and of exact products rounded once.

Arrays are `[rows, columns]`, factors `[columns]`. The bounds hold before `zero` is added.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return, unreachable"
# mypy: disable-error-code="call-arg, var-annotated, assignment"
from __future__ import annotations

import numpy as np

from qgraph.simulator.fast.compiled import _compiled, _fused

_MANY = 3.0 * 2**22
_BITS = np.float32(_MANY).view(np.int32)


@_compiled
def rescale(a, m, c, low, high, zero, out):
    """Codes of sums."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t = _fused(np.float32(a[i, j]), m[j], c[j])
            out[i, j] = np.int32(np.rint(min(max(t, low), high))) + zero


@_compiled
def rescale_counted(a, m, c, low, high, lowest, highest, zero, out):
    """As `rescale`; returns how many rounded values lie outside `lowest` to `highest`."""
    outside = 0
    for i in range(a.shape[0]):
        count = np.int32(0)
        for j in range(a.shape[1]):
            t = np.rint(_fused(np.float32(a[i, j]), m[j], c[j]))
            count += np.int32((t < lowest) | (t > highest))
            out[i, j] = np.int32(min(max(t, low), high)) + zero
        outside += count
    return outside


@_compiled
def rescale_exactly(a, start, m, low, high, zero, out):
    """`rint((a + start) * m)`, the exact product rounded once, half to even.

    Within 2**22 of 3 * 2**22 the float32 numbers are whole, and their bits count up by one. `low` and `high` are moved
    there, too; products further away stay beyond them, because every step keeps order.
    """
    many = np.float32(_MANY)
    low, high = low + many, high + many
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t = _fused(np.float32(a[i, j]) + start[j], m[j], many)
            out[i, j] = np.float32(min(max(t, low), high)).view(np.int32) - _BITS + zero


@_compiled
def rescale_exactly_counted(a, start, m, low, high, lowest, highest, zero, out):
    """As `rescale_exactly`; returns how many rounded values lie outside `lowest` to `highest`."""
    outside, many = 0, np.float32(_MANY)
    low, high, lowest, highest = low + many, high + many, lowest + many, highest + many
    for i in range(a.shape[0]):
        count = np.int32(0)
        for j in range(a.shape[1]):
            t = _fused(np.float32(a[i, j]) + start[j], m[j], many)
            count += np.int32((t < lowest) | (t > highest))
            out[i, j] = np.float32(min(max(t, low), high)).view(np.int32) - _BITS + zero
        outside += count
    return outside
