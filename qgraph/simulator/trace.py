"""What a kernel tells about its run, for those who ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KernelTrace:
    """Counts of one operator's run.

    Args:
        saturated: results that did not fit the format, bounds of an activation aside.
        overflowed: sums that did not fit the accumulator.
    """

    saturated: int = 0
    overflowed: int = 0
