"""Single steps of float32 arithmetic as processors do them, where torch offers none that is exact everywhere."""

from __future__ import annotations

import torch

_LOWEST_INT32 = float(-(1 << 31))
_HIGHEST_FLOAT32 = float((1 << 31) - (1 << 7))  # the largest float32 below 2**31


def fma32(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a * b + c` in float32, rounded once (fused multiply-add).

    The product of two float32 is exact in float64; the sum is rounded to odd there, which leaves the final rounding to
    float32 exact (Boldo and Melquiond, "When double rounding is odd").

    Args:
        a, b, c: finite float32 or float64 tensors holding float32 values, broadcastable.

    Returns:
        float32 of the broadcast shape.
    """
    product = a.double() * b.double()
    product, addend = torch.broadcast_tensors(product, c.double())
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.contiguous().view(torch.int64)
    odd = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    inexact = (error != 0) & ((bits & 1) == 0) & torch.isfinite(total)
    return torch.where(inexact, odd, bits).view(torch.float64).to(torch.float32)


def to_int32(values: torch.Tensor) -> torch.Tensor:
    """Whole floating numbers as int64, converted as x86 converts to int32: what does not fit, and NaN, is -2**31."""
    wide = values.double()
    fits = (wide >= _LOWEST_INT32) & (wide < -_LOWEST_INT32)
    return torch.where(fits, wide, _LOWEST_INT32).to(torch.int64)


def whole32(values: torch.Tensor) -> torch.Tensor:
    """Floating values as int64, rounded half to even, saturated at 32 bits before the conversion (float32's bounds)."""
    return torch.round(values.clamp(_LOWEST_INT32, _HIGHEST_FLOAT32)).to(torch.int64)


def wrap32(values: torch.Tensor) -> torch.Tensor:
    """int64 values modulo 2**32, in two's complement."""
    return (values << 32) >> 32


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """Floating values to the nearest whole number, ties away from zero, as `std::round`."""
    whole = torch.trunc(values)
    return whole + ((values - whole).abs() >= 0.5).to(values.dtype) * torch.sign(values)
