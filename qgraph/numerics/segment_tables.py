"""Segment tables: interpolated tables that are fine where the function bends and coarse where it does not.

The codes are cut into segments of `entries` intervals each; the intervals of one segment all hold `2**k` codes. The
entries of all segments lie in one list, in which a segment's last interval ends at the first entry of the next:

    o = code - qmin,  j = the last segment with start[j] <= o,  d = o - start[j],  k = shift[j]
    i = entries * j + (d >> k),  r = d & (2**k - 1)
    y = round_half_even((entry[i] * (2**k - r) + entry[i + 1] * r) / 2**(k + fraction_bits))

so that index and weight are bits of the code. Entries may carry fraction bits, because two rounded entries put a
straight line up to half a step off.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from qgraph.errors import UserError
from qgraph.numerics.formats import QType
from qgraph.numerics.qparams import QParams
from qgraph.numerics.quantize import quantize
from qgraph.numerics.rounding import Rounding, rounding_shift_right
from qgraph.numerics.tables import ScalarFunction, evaluated

_MOST_FRACTION_BITS = 8


@dataclass(frozen=True)
class SegmentForm:
    """What a device's segment tables look like.

    Args:
        segments: how many segments there may be.
        entries: intervals of each.
        curvature: whether break points follow the function; else all segments are equally long.
        fraction_bits: bits of an entry below one step of the result.

    Raises:
        UserError: a number is no power of two (segments chosen by curvature may be any number), or out of range.
    """

    segments: int
    entries: int
    curvature: bool
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        for name, value, free in (("segments", self.segments, self.curvature), ("entries", self.entries, False)):
            if value < 1 or (not free and value & (value - 1)):
                raise UserError(
                    f"a segment table cannot have {value} {name}",
                    why="the position within a segment is the low bits of the code",
                    fix="use a power of two",
                )
        if not 0 <= self.fraction_bits <= _MOST_FRACTION_BITS:
            raise UserError(
                f"entries cannot have {self.fraction_bits} fraction bits",
                fix=f"use a number from 0 to {_MOST_FRACTION_BITS}",
            )

    def check(self, source: QType) -> None:
        """Refuses a form with more intervals than `source` has codes.

        Raises:
            UserError: it has.
        """
        least = self.entries if self.curvature else self.entries * self.segments
        if least > 1 << source.bits:
            raise UserError(
                f"a segment table of {source} codes cannot have {least} intervals",
                fix=f"use fewer segments or entries: {1 << source.bits} intervals are one per code",
            )


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """A segment table of one function.

    Args:
        entries: int32 `[segments * intervals + 1]`.
        starts: int32 `[segments]`, where segments start, counted from the lowest code; rising from 0.
        shifts: int32 `[segments]`, each interval of segment `j` holds `2**shifts[j]` codes.
    """

    entries: torch.Tensor
    starts: torch.Tensor
    shifts: torch.Tensor


def build_segments(function: ScalarFunction, source: QParams, result: QParams, form: SegmentForm) -> SegmentTable:
    """The segment table of an elementwise `function` between two formats.

    The function is evaluated as for `build_table`. With break points by curvature the range is halved again and again
    where interpolation is worst: where a code differs most from the function's own, or, among equals, where most codes
    differ, or else at the lowest code. Halving the worst is the best choice among all tables whose segments are halves
    of halves: any table with a smaller largest error must have halved it too.

    Args:
        function: maps float64 tensors elementwise.
        source, result: parameters of input and output, one scale per tensor.
        form: what the table may be.

    Raises:
        UserError: the form has more intervals than there are codes, or there are scales per channel.
    """
    form.check(source.qtype)
    qtype = source.qtype
    codes = torch.arange(qtype.qmin, qtype.qmax + 2, dtype=torch.float64)
    values = evaluated(function, codes, source, result)
    fine = _fine_codes(values, result, form.fraction_bits)
    widest = qtype.bits - (form.entries.bit_length() - 1)  # shift of one segment over all codes
    if form.curvature:
        segments = _by_error(quantize(values[:-1], result).to(torch.int64), fine, widest, form)
    else:
        shift = widest - (form.segments.bit_length() - 1)
        segments = [(index * form.entries << shift, shift) for index in range(form.segments)]
    at = [start + (index << shift) for start, shift in segments for index in range(form.entries)]
    starts, shifts = (torch.tensor(column, dtype=torch.int32) for column in zip(*segments, strict=True))
    return SegmentTable(fine[[*at, fine.numel() - 1]].to(torch.int32), starts, shifts)


def lookup_segments(
    codes: torch.Tensor,
    entries: torch.Tensor,
    starts: torch.Tensor,
    shifts: torch.Tensor,
    source: QType,
    fraction_bits: int,
) -> torch.Tensor:
    """Looks integer `codes` (any shape) up in a segment table; int64 of the same shape.

    Raises:
        UserError: the number of entries does not go with the number of segments.
    """
    per_segment, rest = divmod(entries.numel() - 1, starts.numel())
    if rest or not per_segment:
        raise UserError(
            f"{entries.numel()} entries do not make {starts.numel()} segments",
            fix="give every segment the same number of entries, and one entry past the end",
        )
    offset = codes.to(torch.int64).contiguous() - source.qmin
    segment = torch.searchsorted(starts.to(torch.int64), offset, right=True) - 1
    shift = shifts.to(torch.int64)[segment]
    within = offset - starts.to(torch.int64)[segment]
    index = segment * per_segment + (within >> shift)
    rest_of_code = within & ((torch.ones_like(shift) << shift) - 1)
    table = entries.to(torch.int64)
    blend = table[index] * ((1 << shift) - rest_of_code) + table[index + 1] * rest_of_code
    return rounding_shift_right(blend, shift + fraction_bits, Rounding.HALF_EVEN)


def _fine_codes(values: torch.Tensor, result: QParams, fraction_bits: int) -> torch.Tensor:
    """Codes with fraction bits, int64: `clamp(rhe(fl(x * (1 / s)) * 2**bits) + zero * 2**bits)`."""
    steps = (values * (1.0 / result.scale)).double() * 2.0**fraction_bits
    codes = torch.round(steps.nan_to_num(0.0, float("inf"), float("-inf")))
    codes = codes + result.zero_points().double() * 2.0**fraction_bits
    qtype = result.qtype
    return codes.clamp(qtype.qmin << fraction_bits, qtype.qmax << fraction_bits).to(torch.int64)


def _by_error(exact: torch.Tensor, fine: torch.Tensor, widest: int, form: SegmentForm) -> list[tuple[int, int]]:
    """Start and shift of the segments, halved at the worst one until there are enough."""
    errors = {shift: _errors(exact, fine, shift, form) for shift in range(widest + 1)}

    def ranked(start: int, shift: int) -> tuple[int, int, int, int]:
        largest, differing = errors[shift]
        index = start // (form.entries << shift)
        return -largest[index], -differing[index], start, shift

    leaves = [ranked(0, widest)]
    done: list[tuple[int, int, int, int]] = []
    while leaves and len(leaves) + len(done) < form.segments:
        largest, _, start, shift = worst = heapq.heappop(leaves)
        if largest == 0 or shift == 0:
            done.append(worst)
            continue
        for half in (start, start + (form.entries << (shift - 1))):
            heapq.heappush(leaves, ranked(half, shift - 1))
    return sorted((start, shift) for _, _, start, shift in (*leaves, *done))


def _errors(exact: torch.Tensor, fine: torch.Tensor, shift: int, form: SegmentForm) -> tuple[list[int], list[int]]:
    """Largest difference from `exact`, and how many codes differ, of every segment with this shift."""
    width = 1 << shift
    rest = torch.arange(width)
    before, after = fine[:-1:width, None], fine[width::width, None]
    blend = before * (width - rest) + after * rest
    looked_up = rounding_shift_right(blend, shift + form.fraction_bits, Rounding.HALF_EVEN)
    gap = (looked_up.reshape(-1, form.entries * width) - exact.reshape(-1, form.entries * width)).abs()
    return gap.amax(1).tolist(), (gap > 0).sum(1).tolist()
