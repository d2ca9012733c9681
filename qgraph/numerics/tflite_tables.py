"""LiteRT's interpolated tables of 16-bit functions: 512 intervals, ends of which are shifted towards the middles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qgraph.numerics.float_steps import round_half_away
from qgraph.numerics.formats import qint16

_INTERVALS = 512
_FRACTION_BITS = 7


def sampled_table(
    function: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    zero: int,
    result_scale: float,
    result_zero: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The table of a function (LiteRT's `LUTPopulate` for 16 bits).

    Args:
        function: maps tensors of `dtype`.
        scale, zero: of the input.
        result_scale, result_zero: of the result; the zero point enters the range only.
        dtype: float32 or float64; all arithmetic is in it.

    Returns:
        int64 `[513]`; entry `i` belongs to code `128 * i - 32768`.
    """
    source, result = torch.tensor(scale, dtype=dtype), torch.tensor(result_scale, dtype=dtype)
    low, high = source * (qint16.qmin - zero), source * (qint16.qmax - zero)
    step = (high - low) / _INTERVALS
    per_code = 65536 / (result * (qint16.qmax - result_zero) - result * (qint16.qmin - result_zero))
    ends = low + torch.arange(_INTERVALS + 1, dtype=dtype) * step
    values = function(ends) * per_code
    middles = round_half_away(function(ends[:-1] + step / 2) * per_code)
    samples = round_half_away(values[:-1])
    guesses = round_half_away((values[1:] + samples) / 2)
    shifted = samples - round_half_away((guesses - middles) / 2)
    last = round_half_away(function(high.reshape(1)) * per_code)
    return qint16.saturate(torch.cat([shifted, last])).to(torch.int64)


def interpolated(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Values of a table of 513 entries at 16-bit `codes` (int64), int64; ties upwards."""
    index = (codes >> _FRACTION_BITS) + _INTERVALS // 2
    base = table[index]
    slope = qint16.wrap(table[index + 1] - base)
    part = codes & ((1 << _FRACTION_BITS) - 1)
    return qint16.wrap(base + ((slope * part + (1 << (_FRACTION_BITS - 1))) >> _FRACTION_BITS))
