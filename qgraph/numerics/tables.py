"""Tables for nonlinear functions: one entry per code, or interpolated between evenly spaced entries.

A full table holds `f` at every code of its input format. An interpolated table holds `f` at every `2**k`-th
code and one entry past the end; between two entries the device interpolates linearly in integers:

    offset = code - qmin,  i = offset >> k,  r = offset & (2**k - 1)
    y = round_half_even((entry[i] * (2**k - r) + entry[i + 1] * r) / 2**k)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qgraph.errors import UserError
from qgraph.numerics.formats import QType
from qgraph.numerics.qparams import QParams
from qgraph.numerics.quantize import RECIPROCAL, QuantizeRule, dequantize, quantize
from qgraph.numerics.rounding import Rounding, rounding_shift_right

ScalarFunction = Callable[[torch.Tensor], torch.Tensor]


def build_table(
    function: ScalarFunction,
    source: QParams,
    result: QParams,
    *,
    entries: int | None = None,
    rule: QuantizeRule = RECIPROCAL,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The table of an elementwise `function` between two formats.

    The function is evaluated on the dequantized codes, then quantized. Where it is infinite the
    entry saturates; where it is NaN (outside its domain) the entry is code of real zero.

    Args:
        function: maps tensors elementwise.
        source: parameters of the input, one scale per tensor.
        result: parameters of the output, one scale per tensor.
        entries: number of intervals, a power of two; None for one entry per code.
        rule: how values become codes.
        dtype: precision in which the function sees the codes' reals.

    Returns:
        Integer tensor in the output's storage dtype: `[2**bits]` entries of a full table, or
        `[entries + 1]` of an interpolated one.

    Raises:
        UserError: `entries` is no power of two below the number of codes, or there are scales per channel.
    """
    qtype = source.qtype
    if entries is not None:
        check_intervals(entries, qtype)
    step = 1 if entries is None else (1 << qtype.bits) // entries
    # Interpolation needs the entry at qmax + 1, which is a real number though not a code.
    codes = torch.arange(qtype.qmin, qtype.qmax + (1 if step == 1 else 2), step, dtype=dtype)
    return quantize(evaluated(function, codes, source, result), result, rule)


def build_steps(function: ScalarFunction, source: QParams, result: QParams) -> tuple[torch.Tensor, torch.Tensor]:
    """A function that is constant between jumps, as the codes at which it jumps and the values between them.

    The function sees float32 reals, `float32(code - zero_point) * scale`: a jump lies where fake quantization has it.

    Args:
        function: maps float64 tensors elementwise.
        source, result: parameters of input and output, one scale per tensor.

    Returns:
        Thresholds, int32 `[n]`, rising, and values, `[n + 1]` in the result's storage dtype: the value of a code is
        `values[number of thresholds not above it]`.

    Raises:
        UserError: there are scales per channel.
    """
    codes = torch.arange(source.qtype.qmin, source.qtype.qmax + 1)
    one = QParams(torch.ones_like(source.scale), source.qtype)
    full = quantize(evaluated(function, dequantize(codes, source).double(), one, result), result)
    jumps = torch.nonzero(full[1:] != full[:-1]).flatten() + 1
    return codes[jumps].to(torch.int32), full[torch.cat([jumps.new_zeros(1), jumps])]


def evaluated(function: ScalarFunction, codes: torch.Tensor, source: QParams, result: QParams) -> torch.Tensor:
    """`function` at `codes` (float64 or float32, any shape): float32 of the same shape, without infinities and NaN.

    Raises:
        UserError: there are scales per channel.
    """
    if source.per_channel or result.per_channel:
        raise UserError("a table has one scale for its input and one for its result", fix="observe per tensor")
    zero_point = source.zero_points().to(codes)
    values = function((codes - zero_point) * source.scale.to(codes))
    limit = torch.finfo(torch.float32).max
    return torch.nan_to_num(values, nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit).to(torch.float32)


def check_intervals(intervals: int, source: QType) -> None:
    """Refuses a number of intervals that does not divide the codes of `source` evenly.

    Raises:
        UserError: it is no power of two below the number of codes.
    """
    if not 0 < intervals < 1 << source.bits or intervals & (intervals - 1):
        raise UserError(
            f"a table of {source} codes cannot have {intervals} intervals",
            why="the position within an interval is the low bits of the code",
            fix=f"use a power of two below {1 << source.bits}",
        )


def lookup(codes: torch.Tensor, table: torch.Tensor, source: QType) -> torch.Tensor:
    """Looks integer `codes` (any shape) up in a full or interpolated table; int64 of the same shape.

    Raises:
        UserError: the table has a number of entries that goes with no number of intervals.
    """
    offset = codes.to(torch.int64) - source.qmin
    size = 1 << source.bits
    if table.numel() == size:
        return table.to(torch.int64)[offset]
    check_intervals(table.numel() - 1, source)
    width = (size // (table.numel() - 1)).bit_length() - 1
    index, rest = offset >> width, offset & ((1 << width) - 1)
    entries = table.to(torch.int64)
    blend = entries[index] * ((1 << width) - rest) + entries[index + 1] * rest
    return rounding_shift_right(blend, width, Rounding.HALF_EVEN)
