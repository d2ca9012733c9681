"""Reference kernels of functions of one value, and of comparisons: tables, steps, lines of two slopes, masks."""

from __future__ import annotations

import torch

from qgraph.numerics import in_vector_loop, parse_qtype
from qgraph.numerics import lookup_segments as look_up
from qgraph.simulator.reference.common import requantized, wide
from qgraph.simulator.trace import KernelTrace


def lookup_segments(
    x: torch.Tensor,
    entries: torch.Tensor,
    starts: torch.Tensor,
    shifts: torch.Tensor,
    *,
    source: str,
    fraction_bits: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The value of a segment table (`qgraph.numerics.segment_tables`) for every code of `x`."""
    looked_up = look_up(x, entries, starts, shifts, parse_qtype(source), fraction_bits)
    return looked_up.to(parse_qtype(format).storage)


def lookup_two(x: torch.Tensor, tables: torch.Tensor, *, source: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """The entry of the first of two full tables where torch's vector loop takes the element, else of the second."""
    offset = wide(x) - parse_qtype(source).qmin
    return torch.where(in_vector_loop(x), tables[0][offset], tables[1][offset])


def lookup_steps(
    x: torch.Tensor, thresholds: torch.Tensor, values: torch.Tensor, *, trace: KernelTrace | None = None
) -> torch.Tensor:
    """`values[n]`, where `n` of the rising `thresholds` are not above the code."""
    return torch.take(values, torch.searchsorted(wide(thresholds), wide(x).contiguous(), right=True))


def prelu(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    negative_multiplier: torch.Tensor,
    negative_shift: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """`saturate(rescale(x))` by one factor where `x` is not negative, by another where it is."""
    codes = wide(x, x_zero)
    below = codes < 0
    factors = torch.where(below, negative_multiplier, multiplier)
    shifts = None if shift is None or negative_shift is None else torch.where(below, negative_shift, shift)
    return requantized(codes, factors, shifts, arithmetic, low, high, format, zero, trace)


_RELATIONS = {"gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le, "eq": torch.eq, "ne": torch.ne}


def compare(
    x: torch.Tensor,
    y: torch.Tensor,
    multiplier_x: torch.Tensor,
    multiplier_y: torch.Tensor,
    *,
    relation: str,
    x_zero: int = 0,
    y_zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Where `x * Mx` stands in `relation` (`gt`, `ge`, ...) to `y * My`: bool, operands broadcast."""
    return _RELATIONS[relation](wide(x, x_zero) * wide(multiplier_x), wide(y, y_zero) * wide(multiplier_y))
