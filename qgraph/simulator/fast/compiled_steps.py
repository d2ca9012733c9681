"""Compiled loops of rescalings that `steps` has proven: `clamp(rint(fma(a, m, c)))` in float32.

Arrays are `[rows, columns]`, factors `[columns]`. The bounds hold before `zero` is added.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return, unreachable"
from __future__ import annotations

import numpy as np

from qgraph.simulator.fast.compiled import _compiled, _fused


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
