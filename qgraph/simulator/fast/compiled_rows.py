"""Compiled sums and maxima of the rows of `[rows, columns]`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return, unreachable"
from __future__ import annotations

import numpy as np

from qgraph.simulator.fast.compiled import _compiled


@_compiled
def row_sums(x, start, out):
    """`start + sum(x[i])` of integers, in 32 bits: with 64 it would be half as fast."""
    for i in range(x.shape[0]):
        row, total = x[i], np.int32(start)
        for j in range(row.shape[0]):
            total = np.int32(total + np.int32(row[j]))
        out[i] = total


@_compiled
def row_maxima(x, out):
    """The largest of every row, which has one entry at least."""
    for i in range(x.shape[0]):
        row, highest = x[i], x[i, 0]
        for j in range(row.shape[0]):
            highest = max(highest, row[j])
        out[i] = highest
