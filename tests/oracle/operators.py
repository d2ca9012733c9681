"""One function per operator of `docs/arithmetic.md`, with the arguments of the torch operators.

Tensors are numpy object arrays of Python numbers, used as containers only: every sum and product is made by Python
on single numbers. Each function returns the array of results and adds to the counts it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import product

import numpy as np

from .arithmetic import (
    ROUNDINGS,
    Bounds,
    Counts,
    Finish,
    Format,
    add32,
    divide32,
    exact,
    half_even,
    multiply32,
    nearest32,
    parse_format,
    parse_word,
    to_float32,
)

Array = np.ndarray
Position = tuple[int, ...]

# --- helpers -------------------------------------------------------------------------------------------------------


def positions(shape: Sequence[int]) -> Iterator[Position]:
    return product(*(range(size) for size in shape))


def fill(shape: Sequence[int], value: Callable[[Position], object]) -> Array:
    """An array made position by position."""
    result = np.empty(tuple(shape), dtype=object)
    for position in positions(shape):
        result[position] = value(position)
    return result


def spread(values: Array | None, shape: Sequence[int]) -> Array:
    """Values broadcast to a shape; an absent tensor becomes an array of None."""
    return np.broadcast_to(np.array(None, dtype=object) if values is None else values, tuple(shape))


def per_channel(values: Array | None, rank: int, axis: int) -> Array | None:
    """A vector of one value per channel, in the shape that broadcasts along `axis`."""
    if values is None or values.ndim != 1 or values.size == 1:
        return values
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def at(values: Array, position: Position) -> int | None:
    """The element of `values`, or None beyond its borders."""
    inside = all(0 <= index < size for index, size in zip(position, values.shape, strict=True))
    return values[position] if inside else None


def finish(arithmetic: str, low: int, high: int, format: str, zero: int, counts: Counts) -> Finish:
    return Finish(parse_word(arithmetic), Bounds(low, high, parse_format(format)), counts, zero)


OPERANDS = {"x_zero": 0, "y_zero": 1, "residual_zero": 3}
"""Where the operand of a zero point stands among the arguments."""


RAW = ("conv_pairs",)
"""Operators whose codes are not counted from the zero point at once."""


def call(operator: str, arguments: Sequence[Array | None], options: Mapping[str, object], counts: Counts) -> Array:
    """An operator with zero points: codes are counted from theirs before anything else happens."""
    counted, rest = list(arguments), dict(options)
    if operator in RAW:
        return OPERATORS[operator](*counted, **rest, counts=counts)
    for name, position in OPERANDS.items():
        zero = rest.pop(name, 0)
        if zero:
            codes = counted[position]
            counted[position] = fill(codes.shape, lambda i, codes=codes, zero=zero: codes[i] - zero)
    return OPERATORS[operator](*counted, **rest, counts=counts)


# --- section 3: borders --------------------------------------------------------------------------------------------


def quantize(
    x: Array,
    scale: Array,
    *,
    format: str,
    zero: int = 0,
    rounding: str = "reciprocal:half_even",
    counts: Counts,
) -> Array:
    """`sat_F(round(x / s) + zero)`, the quotient in float32; NaN becomes the zero point and counts."""
    target = parse_format(format)
    bounds = Bounds(target.low, target.high, target)
    way, *zero_first, name = rounding.split(":")
    step, inverse = np.float32(scale.item()), np.float32(1) / np.float32(scale.item())

    def code(i: Position) -> int:
        if np.isnan(x[i]):
            counts.saturated += 1
            return bounds.clamp(zero, Counts())
        value = np.float32(x[i])
        if zero_first == ["fused"] and np.isfinite(value):
            return bounds.clamp(ROUNDINGS[name](exact(nearest32(exact(value) * exact(inverse) + zero))), counts)
        quotient = multiply32(value, inverse) if way == "reciprocal" else divide32(value, step)
        if zero_first == ["before"]:
            return bounds.clamp(ROUNDINGS[name](exact(add32(quotient, np.float32(zero)))), counts)
        return bounds.clamp(ROUNDINGS[name](exact(quotient)) + zero, counts)

    return fill(x.shape, code)


def dequantize(x: Array, scale: Array, *, axis: int, counts: Counts) -> Array:
    """`fl(float32(q) * s)`, one scale for each slice of `axis`."""
    scales = spread(per_channel(scale, x.ndim, axis % max(x.ndim, 1)), x.shape)
    return fill(x.shape, lambda i: float(multiply32(to_float32(x[i]), np.float32(scales[i]))))


# --- section 5: products -------------------------------------------------------------------------------------------


def end_of_product(
    sums: Array,
    axis: int,
    bias: Array | None,
    residual: Array | None,
    multiplier: Array | None,
    shift: Array | None,
    residual_multiplier: Array | None,
    end: Finish,
) -> Array:
    """Bias, accumulator, and one of the three ends: rescaled, with a residual, without multiplier."""
    biases, multipliers, shifts, residual_multipliers = (
        spread(per_channel(values, sums.ndim, axis), sums.shape)
        for values in (bias, multiplier, shift, residual_multiplier)
    )
    residuals = spread(residual, sums.shape)

    def result(i: Position) -> int:
        value = end.accumulate(sums[i] + (biases[i] or 0))
        if multiplier is None:
            return end.clamp(value)
        if residual is None:
            return end.rescaled(value, multipliers[i], shifts[i])
        return end.summed([(value, multipliers[i]), (residuals[i], residual_multipliers[i])], shifts[i])

    return fill(sums.shape, result)


def conv(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    multiplier: Array | None,
    shift: Array | None,
    residual_multiplier: Array | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    transposed: bool,
    groups: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Convolution of any rank; a transposed one is gathered by the outputs."""
    if transposed:
        sums = transposed_convolution_sums(x, weight, stride, padding, dilation, output_padding, groups)
    else:
        sums = convolution_sums(x, weight, stride, padding, dilation, groups)
    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_product(sums, 1, bias, residual, multiplier, shift, residual_multiplier, end)


def conv_pairs(
    x: Array,
    weight: Array,
    bias: Array | None,
    multiplier: Array,
    shift: Array | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """A depthwise convolution of raw codes: taps in pairs, every pair held in 16 bits, the zero point off last."""
    filters, _, *kernel = weight.shape
    size = [(x.shape[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in range(2)]
    pair = Format(16)

    def total(position: Position) -> int:
        image, channel, *place = position
        source = channel // (filters // x.shape[1])
        products = []
        for tap in positions(kernel):
            where = [place[a] * stride[a] - padding[a] + tap[a] for a in range(2)]
            code = at(x, (image, source, *where))
            products.append((x_zero if code is None else code) * weight[(channel, 0, *tap)])
        raw = sum(pair.saturate(sum(products[i : i + 2])) for i in range(0, len(products), 2))
        return raw - x_zero * sum(weight[(channel, 0, *tap)] for tap in positions(kernel))

    sums = fill([x.shape[0], filters, *size], total)
    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_product(sums, 1, bias, None, multiplier, shift, None, end)


def convolution_sums(
    x: Array, weight: Array, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Array:
    channels, inputs, *kernel = weight.shape
    size = [
        (x.shape[2 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a in range(len(kernel))
    ]

    def total(position: Position) -> int:
        image, channel, *place = position
        first = channel // (channels // groups) * inputs
        result = 0
        for tap in positions(kernel):
            source = [place[a] * stride[a] - padding[a] + tap[a] * dilation[a] for a in range(len(kernel))]
            for i in range(inputs):
                code = at(x, (image, first + i, *source))
                result += (code or 0) * weight[(channel, i, *tap)]
        return result

    return fill([x.shape[0], channels, *size], total)


def transposed_convolution_sums(
    x: Array,
    weight: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    inputs, channels, *kernel = weight.shape
    inputs //= groups
    size = [
        (x.shape[2 + a] - 1) * stride[a] - 2 * padding[a] + dilation[a] * (kernel[a] - 1) + output_padding[a] + 1
        for a in range(len(kernel))
    ]

    def total(position: Position) -> int:
        image, channel, *place = position
        first = channel // channels * inputs
        result = 0
        for tap in positions(kernel):
            steps = [place[a] + padding[a] - tap[a] * dilation[a] for a in range(len(kernel))]
            if any(steps[a] % stride[a] for a in range(len(kernel))):
                continue
            source = [steps[a] // stride[a] for a in range(len(kernel))]
            for i in range(first, first + inputs):
                code = at(x, (image, i, *source))
                result += (code or 0) * weight[(i, channel % channels, *tap)]
        return result

    return fill([x.shape[0], channels * groups, *size], total)


def linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    multiplier: Array | None,
    shift: Array | None,
    residual_multiplier: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """`x @ weight.T`, channels last."""
    sums = fill(
        [*x.shape[:-1], weight.shape[0]],
        lambda i: sum(x[(*i[:-1], k)] * weight[i[-1], k] for k in range(x.shape[-1])),
    )
    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_product(sums, sums.ndim - 1, bias, residual, multiplier, shift, residual_multiplier, end)


def matmul(
    x: Array,
    y: Array,
    multiplier: Array | None,
    shift: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Products of stacks of matrices with the broadcasting of `torch.matmul`; vectors are rows or columns."""
    left = x[None, :] if x.ndim == 1 else x
    right = y[:, None] if y.ndim == 1 else y
    stack = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left = np.broadcast_to(left, (*stack, *left.shape[-2:]))
    right = np.broadcast_to(right, (*stack, *right.shape[-2:]))
    sums = fill(
        [*stack, left.shape[-2], right.shape[-1]],
        lambda i: sum(left[(*i[:-1], k)] * right[(*i[:-2], k, i[-1])] for k in range(left.shape[-1])),
    )
    if x.ndim == 1:
        sums = np.squeeze(sums, axis=-2)
    if y.ndim == 1:
        sums = np.squeeze(sums, axis=-1)
    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_product(np.asarray(sums, dtype=object), -1, None, None, multiplier, shift, None, end)


# --- section 6: elementwise ----------------------------------------------------------------------------------------


def requantize(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    offset: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """A change of scale or format, with an offset if given."""
    end = finish(arithmetic, low, high, format, zero, counts)
    shape = np.broadcast_shapes(x.shape, *(p.shape for p in (multiplier, shift, offset) if p is not None))
    codes, multipliers, shifts, offsets = (spread(values, shape) for values in (x, multiplier, shift, offset))

    def result(i: Position) -> int:
        if offset is None:
            return end.rescaled(codes[i], multipliers[i], shifts[i])
        return end.summed([(codes[i], multipliers[i])], shifts[i], offsets[i])

    return fill(shape, result)


def add(
    x: Array,
    y: Array,
    multiplier_x: Array,
    multiplier_y: Array,
    shift: Array | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Two terms with one shift; a negative multiplier subtracts."""
    end = finish(arithmetic, low, high, format, zero, counts)
    shape = np.broadcast_shapes(x.shape, y.shape)
    left, right, left_multiplier, right_multiplier, shifts = (
        spread(values, shape) for values in (x, y, multiplier_x, multiplier_y, shift)
    )
    return fill(
        shape, lambda i: end.summed([(left[i], left_multiplier[i]), (right[i], right_multiplier[i])], shifts[i])
    )


def mul(
    x: Array,
    y: Array,
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
    """The product of two codes, accumulated and rescaled."""
    end = finish(arithmetic, low, high, format, zero, counts)
    shape = np.broadcast_shapes(x.shape, y.shape)
    left, right, multipliers, shifts = (spread(values, shape) for values in (x, y, multiplier, shift))
    return fill(shape, lambda i: end.rescaled(end.accumulate(left[i] * right[i]), multipliers[i], shifts[i]))


def clamp(x: Array, *, low: int, high: int, format: str, counts: Counts) -> Array:
    """Codes between two codes."""
    bounds = Bounds(low, high, parse_format(format))
    return fill(x.shape, lambda i: bounds.clamp(x[i], counts))


# --- section 7: tables ---------------------------------------------------------------------------------------------


def lookup(x: Array, table: Array, *, source: str, counts: Counts) -> Array:
    """A full table, or intervals with a straight line in each."""
    codes = parse_format(source)
    return fill(x.shape, lambda i: entry(table, x[i] - codes.low, 1 << codes.bits))


def entry(table: Array, offset: int, codes: int) -> int:
    if table.size == codes:
        return table[offset]
    bits = (codes // (table.size - 1)).bit_length() - 1
    step = 1 << bits
    index, rest = offset >> bits, offset & (step - 1)
    return half_even(Fraction(table[index] * (step - rest) + table[index + 1] * rest, step))


def table_entries(
    function: Callable[[float], float],
    source: Format,
    intervals: int | None,
    source_scale: float,
    target: Format,
    target_scale: float,
) -> list[int]:
    """The entries of a table; `intervals` is None for a full one."""
    step = 1 if intervals is None else (1 << source.bits) // intervals
    count = 1 << source.bits if intervals is None else intervals + 1
    entries = [finite32(function((source.low + i * step) * float(source_scale))) for i in range(count)]
    scale = np.array(np.float32(target_scale).item(), dtype=object)
    result = quantize(np.array(entries, dtype=object), scale, format=f"int{target.bits}", counts=Counts())
    return list(result)


def finite32(value: float) -> float:
    """The float32 a table stores: infinities become the largest finite number, NaN becomes 0."""
    if math.isnan(value):
        return 0.0
    largest = float(np.finfo(np.float32).max)
    if math.isinf(value):
        return math.copysign(largest, value)
    with np.errstate(over="ignore"):
        return float(np.float32(value))


# --- section 8: windows and reductions -----------------------------------------------------------------------------


def max_pool(
    x: Array,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    counts: Counts,
) -> Array:
    """The largest code of each window, codes of the input only."""
    rank = len(kernel_size)
    outer, inner = x.shape[:-rank], x.shape[-rank:]
    size = [pooled_size(inner[a], kernel_size[a], stride[a], padding[a], dilation[a], ceil_mode) for a in range(rank)]

    def largest(position: Position) -> int:
        place = position[-rank:]
        window = [
            at(x, (*position[:-rank], *(place[a] * stride[a] - padding[a] + tap[a] * dilation[a] for a in range(rank))))
            for tap in positions(kernel_size)
        ]
        return max(code for code in window if code is not None)

    return fill([*outer, *size], largest)


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Length of a pooled axis as `torch.nn.MaxPool2d` states it: no window starts in the right padding."""
    span = Fraction(size + 2 * padding - dilation * (kernel - 1) - 1, stride)
    count = (math.ceil(span) if ceil_mode else math.floor(span)) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def avg_pool(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_size: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Sums of windows, rescaled; the divisor is in the multiplier."""
    rank = len(kernel_size)

    def total(position: Position) -> int:
        place = position[-rank:]
        window = [
            at(x, (*position[:-rank], *(place[a] * stride[a] - padding[a] + tap[a] for a in range(rank))))
            for tap in positions(kernel_size)
        ]
        return sum(code for code in window if code is not None)

    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_sum(fill([*x.shape[:-rank], *output_size], total), multiplier, shift, end)


def adaptive_avg_pool(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    output_size: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Sums of the windows that divide each axis into `output_size` parts."""
    rank = len(output_size)
    inner = x.shape[-rank:]

    def total(position: Position) -> int:
        place = position[-rank:]
        window = product(*(adaptive_window(place[a], output_size[a], inner[a]) for a in range(rank)))
        return sum(x[(*position[:-rank], *source)] for source in window)

    end = finish(arithmetic, low, high, format, zero, counts)
    return end_of_sum(fill([*x.shape[:-rank], *output_size], total), multiplier, shift, end)


def adaptive_window(index: int, count: int, length: int) -> range:
    return range(math.floor(Fraction(index * length, count)), math.ceil(Fraction((index + 1) * length, count)))


def reduce_sum(
    x: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    dims: Sequence[int],
    keepdim: bool,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Sums along axes, rescaled."""
    axes = sorted(dim % x.ndim for dim in dims)
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]

    def total(position: Position) -> int:
        return sum(
            x[tuple(place if axis in axes else position[axis] for axis, place in enumerate(source))]
            for source in positions([size if axis in axes else 1 for axis, size in enumerate(x.shape)])
        )

    sums = fill(kept, total)
    if not keepdim:
        sums = sums.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


def end_of_sum(sums: Array, multiplier: Array, shift: Array | None, end: Finish) -> Array:
    """Accumulates and rescales; multiplier and shift broadcast over the results."""
    multipliers, shifts = spread(multiplier, sums.shape), spread(shift, sums.shape)
    return fill(sums.shape, lambda i: end.rescaled(end.accumulate(sums[i]), multipliers[i], shifts[i]))


# --- section 9: resizing -------------------------------------------------------------------------------------------


def resize_bilinear(
    x: Array,
    rows: Array,
    columns: Array,
    multiplier: Array,
    shift: Array | None,
    *,
    weight_bits: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Rows first, then columns; `rows` and `columns` hold the two indices and the weight of the second."""
    one = 1 << weight_bits

    def total(position: Position) -> int:
        image, channel, row, column = position
        a, b, w = rows[:, row]
        c, d, v = columns[:, column]
        plane = x[image, channel]
        at_c = plane[a, c] * (one - w) + plane[b, c] * w
        at_d = plane[a, d] * (one - w) + plane[b, d] * w
        return at_c * (one - v) + at_d * v

    sums = fill([*x.shape[:2], rows.shape[1], columns.shape[1]], total)
    return end_of_sum(sums, multiplier, shift, finish(arithmetic, low, high, format, zero, counts))


# --- numbers made when a graph is lowered --------------------------------------------------------------------------


def bias_code(bias: float, input_scale: float, weight_scale: float) -> int:
    """`sat_int32(rhe(bias / (sx * sw)))` in float64."""
    return Format(32).saturate(half_even(Fraction(float(bias) / (float(input_scale) * float(weight_scale)))))


def relu6_bound(scale: float, target: Format) -> int:
    """`min(rhe(fl(6 * (1 / s))), qmax)`."""
    inverse = np.float32(1) / np.float32(scale)
    return min(half_even(exact(multiply32(np.float32(6), inverse))), target.high)


OPERATORS: dict[str, Callable[..., Array]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "requantize": requantize,
    "conv": conv,
    "conv_pairs": conv_pairs,
    "linear": linear,
    "matmul": matmul,
    "add": add,
    "mul": mul,
    "lookup": lookup,
    "clamp": clamp,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive_avg_pool": adaptive_avg_pool,
    "reduce_sum": reduce_sum,
    "resize_bilinear": resize_bilinear,
}
