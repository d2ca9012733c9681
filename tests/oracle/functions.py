"""Functions of one value, comparisons and segment tables: sections 6, 7 and 7.1 of `docs/arithmetic.md`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .arithmetic import Counts, Format, exact, half_even, multiply32
from .operators import OPERATORS, Array, fill, finish, finite32, quantize, spread


def prelu(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    negative_multiplier: Array,
    negative_shift: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """One factor from zero on, another below."""
    end = finish(arithmetic, low, high, format, zero, counts)
    positive, negative = (
        [spread(values, x.shape) for values in pair]
        for pair in ((multiplier, shift), (negative_multiplier, negative_shift))
    )

    def result(i: tuple[int, ...]) -> int:
        multipliers, shifts = negative if x[i] < 0 else positive
        return end.rescaled(end.accumulate(x[i]), multipliers[i], shifts[i])

    return fill(x.shape, result)


def compare(x: Array, y: Array, multiplier_x: Array, multiplier_y: Array, *, relation: str, counts: Counts) -> Array:
    """Exact products, compared."""
    holds = getattr(operator, relation)
    shape = np.broadcast_shapes(x.shape, y.shape)
    left, right = spread(x, shape), spread(y, shape)
    return fill(shape, lambda i: holds(left[i] * multiplier_x.item(), right[i] * multiplier_y.item()))


def lookup_segments(
    x: Array,
    entries: Array,
    starts: Array,
    shifts: Array,
    *,
    source: str,
    fraction_bits: int,
    format: str,
    counts: Counts,
) -> Array:
    """A straight line in each interval of each segment."""
    low = int_format(source).low
    intervals = (entries.size - 1) // starts.size

    def result(i: tuple[int, ...]) -> int:
        offset = x[i] - low
        segment = max(j for j in range(starts.size) if starts[j] <= offset)
        within, width = offset - starts[segment], 1 << shifts[segment]
        index, rest = intervals * segment + within // width, within % width
        total = entries[index] * (width - rest) + entries[index + 1] * rest
        return half_even(Fraction(total, width << fraction_bits))

    return fill(x.shape, result)


def int_format(text: str) -> Format:
    return Format(int(text.removeprefix("u").removeprefix("int")), signed=not text.startswith("u"))


def lookup_two(x: Array, tables: Array, *, source: str, counts: Counts) -> Array:
    """The first table for the first `n // 64 * 64` elements, images counted with their channels last."""
    low = int_format(source).low

    def rank(i: tuple[int, ...]) -> int:
        """Position in memory."""
        order = (i[0], *i[2:], i[1]) if x.ndim == 4 else i
        sizes = (x.shape[0], *x.shape[2:], x.shape[1]) if x.ndim == 4 else x.shape
        result = 0
        for index, size in zip(order, sizes, strict=True):
            result = result * size + index
        return result

    return fill(x.shape, lambda i: tables[0 if rank(i) < x.size // 64 * 64 else 1][x[i] - low])


def lookup_steps(x: Array, thresholds: Array, values: Array, *, counts: Counts) -> Array:
    """The value between two thresholds."""
    return fill(x.shape, lambda i: values[sum(1 for t in thresholds if t <= x[i])])


# --- numbers made when a graph is lowered --------------------------------------------------------------------------


def fine_entry(value: float, scale: float, target: Format, fraction_bits: int) -> int:
    """`clamp(rhe(fl(v * (1 / s)) * 2^F))`; zero points are 0."""
    steps = exact(multiply32(np.float32(finite32(value)), np.float32(1) / np.float32(scale)))
    code = half_even(steps * (1 << fraction_bits))
    return min(max(code, target.low << fraction_bits), target.high << fraction_bits)


def segment_table(
    function: Callable[[float], float],
    source: Format,
    source_scale: float,
    target: Format,
    target_scale: float,
    segments: int,
    intervals: int,
    fraction_bits: int,
) -> tuple[list[int], list[int], list[int]]:
    """Entries, starts and shifts of a table whose break points follow the error."""
    reals = [function(code * float(source_scale)) for code in range(source.low, source.high + 2)]
    fine = [fine_entry(value, target_scale, target, fraction_bits) for value in reals]
    plain = np.array([finite32(value) for value in reals[:-1]], dtype=object)
    scale = np.array(np.float32(target_scale).item(), dtype=object)
    codes = quantize(plain, scale, format=f"int{target.bits}", counts=Counts())

    def ranked(start: int, shift: int) -> tuple[int, int, int, int]:
        width = 1 << shift
        gaps = []
        for offset in range(start, start + intervals * width):
            left, rest = offset - offset % width, offset % width
            total = fine[left] * (width - rest) + fine[left + width] * rest
            gaps.append(abs(half_even(Fraction(total, width << fraction_bits)) - codes[offset]))
        return -max(gaps), -sum(gap > 0 for gap in gaps), start, shift

    found = [ranked(0, (len(codes) // intervals).bit_length() - 1)]
    while len(found) < segments:
        open_ones = [segment for segment in found if segment[0] < 0 and segment[3] > 0]
        if not open_ones:
            break
        worst = min(open_ones)
        found.remove(worst)
        _, _, start, shift = worst
        found += [ranked(start, shift - 1), ranked(start + (intervals << (shift - 1)), shift - 1)]
    pieces = sorted((start, shift) for _, _, start, shift in found)
    entries = [fine[start + (i << shift)] for start, shift in pieces for i in range(intervals)]
    return [*entries, fine[-1]], [start for start, _ in pieces], [shift for _, shift in pieces]


OPERATORS |= {
    "compare": compare,
    "lookup_segments": lookup_segments,
    "lookup_steps": lookup_steps,
    "lookup_two": lookup_two,
    "prelu": prelu,
}
