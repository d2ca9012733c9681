"""Operators that sample, order, and lay windows out: sections 8.1, 8.2, 9.2 and 9.3 of `docs/arithmetic.md`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

import numpy as np

from .arithmetic import Counts, half_even
from .operators import OPERATORS, Array, Position, at, end_of_sum, fill, finish, positions

# --- section 8.1: indices --------------------------------------------------------------------------------------------


def arg_extreme(x: Array, *, dim: int | None, keepdim: bool, largest: bool, counts: Counts) -> Array:
    """The first index of the extreme code."""
    if dim is None:
        found = first_extreme([x[i] for i in positions(x.shape)], largest)
        return np.full([1] * x.ndim if keepdim else [], found, dtype=object)
    axis = dim % x.ndim
    kept = [1 if a == axis else size for a, size in enumerate(x.shape)]
    result = fill(kept, lambda i: first_extreme(line(x, i, axis), largest))
    return result if keepdim else result.reshape([size for a, size in enumerate(x.shape) if a != axis])


def first_extreme(codes: list[int], largest: bool) -> int:
    return codes.index(max(codes) if largest else min(codes))


def line(x: Array, position: Position, axis: int) -> list[int]:
    """The codes along one axis through a position."""
    return [x[(*position[:axis], i, *position[axis + 1 :])] for i in range(x.shape[axis])]


def order(x: Array, *, dim: int, descending: bool, count: int | None, counts: Counts) -> Array:
    """Indices by code, then by position."""
    axis = dim % x.ndim
    shape = [count if a == axis and count is not None else size for a, size in enumerate(x.shape)]

    def index(position: Position) -> int:
        codes = line(x, position, axis)
        ranks = sorted(range(len(codes)), key=lambda i: (-codes[i] if descending else codes[i], i))
        return ranks[position[axis]]

    return fill(shape, index)


def cumsum(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    dim: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Sums up to and with each element."""
    axis = dim % x.ndim
    sums = fill(x.shape, lambda i: sum(code for code in line(x, i, axis)[: i[axis] + 1]))
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


# --- section 8.2: columns --------------------------------------------------------------------------------------------


def window_count(size: int, kernel: int, dilation: int, padding: int, stride: int) -> int:
    """How many windows start such that they end inside the padded length."""
    return len(range(0, size + 2 * padding - dilation * (kernel - 1), stride))


def unfold(
    x: Array,
    *,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    outside: int = 0,
    counts: Counts,
) -> Array:
    """Channel and tap number a column's rows, windows row by row its columns."""
    *outer, channels, height, width = x.shape
    across = [window_count((height, width)[a], kernel_size[a], dilation[a], padding[a], stride[a]) for a in range(2)]
    taps = kernel_size[0] * kernel_size[1]

    def code(position: Position) -> int:
        *image, entry, window = position
        channel, tap = divmod(entry, taps)
        place = divmod(window, across[1])
        step = divmod(tap, kernel_size[1])
        source = [place[a] * stride[a] - padding[a] + step[a] * dilation[a] for a in range(2)]
        found = at(x, (*image, channel, *source))
        return outside if found is None else found

    return fill([*outer, channels * taps, across[0] * across[1]], code)


def fold(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """For each output, every (tap, window) that lies on it."""
    taps = kernel_size[0] * kernel_size[1]
    across = [window_count(output_size[a], kernel_size[a], dilation[a], padding[a], stride[a]) for a in range(2)]

    def total(position: Position) -> int:
        *image, channel, row, column = position
        result = 0
        for tap in positions(kernel_size):
            place = [(row, column)[a] + padding[a] - tap[a] * dilation[a] for a in range(2)]
            if any(place[a] % stride[a] or not 0 <= place[a] // stride[a] < across[a] for a in range(2)):
                continue
            window = place[0] // stride[0] * across[1] + place[1] // stride[1]
            result += x[(*image, channel * taps + tap[0] * kernel_size[1] + tap[1], window)]
        return result

    sums = fill([*x.shape[:-2], x.shape[-2] // taps, *output_size], total)
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


# --- section 9.2: tables of neighbours -----------------------------------------------------------------------------


def resize(
    x: Array,
    depth: Array | None,
    rows: Array | None,
    columns: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """All neighbours at once, each with the product of its weights."""
    tables = [table for table in (depth, rows, columns) if table is not None]

    def total(position: Position) -> int:
        image, channel, *place = position
        result = 0
        for taps in positions([table.shape[1] for table in tables]):
            chosen = [(table[0, tap, i], table[1, tap, i]) for table, tap, i in zip(tables, taps, place, strict=True)]
            code = x[(image, channel, *(index for index, _ in chosen))]
            result += code * math.prod(weight for _, weight in chosen)
        return result

    sums = fill([*x.shape[:2], *(table.shape[2] for table in tables)], total)
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


# --- section 9.3: computed positions -------------------------------------------------------------------------------


def inside(position: Fraction, size: int, padding: str, align_corners: bool) -> Fraction:
    """Where a position is read, in pixels."""
    if padding == "reflection":
        edge = Fraction(0) if align_corners else Fraction(1, 2)
        position = mirrored(position + edge, size - 1 + 2 * edge) - edge
    return position if padding == "zeros" else min(max(position, Fraction(0)), Fraction(size - 1))


def mirrored(position: Fraction, span: Fraction) -> Fraction:
    """A position seen in mirrors at 0 and `span`."""
    if span == 0:
        return Fraction(0)
    crossings, rest = divmod(position, span)
    return rest if crossings % 2 == 0 else span - rest


def sample_bilinear(
    x: Array,
    at_positions: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    position_bits: int,
    padding: str,
    align_corners: bool,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Every element of the map with its weight in units of `2^(-2 * bits)`: most have none."""
    one = 1 << position_bits
    height, width = x.shape[2:]

    def total(position: Position) -> int:
        image, channel, *place = position
        column, row = read_at(at_positions, image, place, (width, height), position_bits, padding, align_corners)
        result = 0
        for i, j in product(range(height), range(width)):
            weight = max(one - abs(row * one - i * one), 0) * max(one - abs(column * one - j * one), 0)
            assert weight.denominator == 1
            result += x[image, channel, i, j] * weight.numerator
        return result

    sums = fill([*x.shape[:2], *at_positions.shape[1:-1]], total)
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


def sample_nearest(
    x: Array,
    at_positions: Array,
    *,
    position_bits: int,
    padding: str,
    align_corners: bool,
    outside: int = 0,
    counts: Counts,
) -> Array:
    """The element at the rounded position, ties to the even one."""
    height, width = x.shape[2:]

    def code(position: Position) -> int:
        image, channel, *place = position
        column, row = read_at(at_positions, image, place, (width, height), position_bits, padding, align_corners)
        found = at(x, (image, channel, half_even(row), half_even(column)))
        return outside if found is None else found

    return fill([*x.shape[:2], *at_positions.shape[1:-1]], code)


def read_at(
    at_positions: Array, image: int, place: list[int], size: tuple[int, int], bits: int, padding: str, align: bool
) -> tuple[Fraction, Fraction]:
    column, row = (
        inside(Fraction(at_positions[(image, *place, axis)], 1 << bits), size[axis], padding, align) for axis in (0, 1)
    )
    return column, row


SAMPLING: dict[str, Callable[..., Array]] = {
    "arg_extreme": arg_extreme,
    "cumsum": cumsum,
    "fold": fold,
    "order": order,
    "resize": resize,
    "sample_bilinear": sample_bilinear,
    "sample_nearest": sample_nearest,
    "unfold": unfold,
}
OPERATORS |= SAMPLING
