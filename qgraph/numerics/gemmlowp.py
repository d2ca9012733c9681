"""Fixed-point functions of gemmlowp's `fixedpoint.h`, on int64 tensors that hold int32 values.

A number with `i` integer bits counts in steps of `2**(i - 31)`; Q0.31 has none.
"""

from __future__ import annotations

import torch

from qgraph.numerics.engines import rounding_divide

_LARGEST = (1 << 31) - 1
_EXP_OF_EIGHTH = 1895147668  # exp(-1/8) in Q0.31
_THIRD = 715827883  # 1/3 in Q0.31
# exp(-2**k) in Q0.31, k = -2..4
_EXP_OF_POWERS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
_48_OVER_17, _MINUS_32_OVER_17 = 1515870810, -1010580540  # two integer bits


def doubling_high_product(a: torch.Tensor, b: torch.Tensor | int, bits: int = 32) -> torch.Tensor:
    """SaturatingRoundingDoublingHighMul of `bits` wide numbers: `a * b / 2**(bits - 1)`, ties upwards."""
    other = torch.as_tensor(b, dtype=torch.int64, device=a.device)
    low = -(1 << (bits - 1))
    product = (a * other + (1 << (bits - 2))) >> (bits - 1)
    return torch.where((a == low) & (other == low), -low - 1, product)


def scaled_by_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """SaturatingRoundingMultiplyByPOT: `values * 2**exponent`, saturated to int32, or rounded, ties away from zero."""
    if exponent < 0:
        return rounding_divide(values, -exponent)
    return (values << exponent).clamp(-_LARGEST - 1, _LARGEST)


def exp_of_negative(values: torch.Tensor, integer_bits: int) -> torch.Tensor:
    """Exp of numbers `<= 0` with `integer_bits` integer bits, as Q0.31 (exp_on_negative_values)."""
    fraction = 31 - integer_bits
    quarter = 1 << (fraction - 2)
    low = (values & (quarter - 1)) - quarter
    result = _exp_of_quarter(scaled_by_power(low, integer_bits))
    rest = low - values
    for power, constant in zip(range(-2, integer_bits), _EXP_OF_POWERS, strict=False):
        chosen = (rest & (1 << (fraction + power))) != 0
        result = torch.where(chosen, doubling_high_product(result, constant), result)
    return torch.where(values == 0, _LARGEST, result)


def _exp_of_quarter(values: torch.Tensor) -> torch.Tensor:
    """Exp of Q0.31 numbers in [-1/4, 0): a polynomial around -1/8."""
    x = values + (1 << 28)
    square = doubling_high_product(x, x)
    cube, fourth = doubling_high_product(square, x), doubling_high_product(square, square)
    tail = doubling_high_product(rounding_divide(fourth, 2) + cube, _THIRD) + square
    factor = torch.full_like(x, _EXP_OF_EIGHTH)
    return factor + doubling_high_product(factor, x + rounding_divide(tail, 1))


def one_over_one_plus(values: torch.Tensor) -> torch.Tensor:
    """`1 / (1 + x)` of Q0.31 numbers in [0, 1), as Q0.31 (one_over_one_plus_x_for_x_in_0_1): three Newton steps."""
    half = (values + (1 << 31)) >> 1
    x = _48_OVER_17 + doubling_high_product(half, _MINUS_32_OVER_17)
    for _ in range(3):
        error = (1 << 29) - doubling_high_product(half, x)
        x = x + scaled_by_power(doubling_high_product(x, error), 2)
    return scaled_by_power(x, 1)


def leading_zeros(values: torch.Tensor) -> torch.Tensor:
    """Zeros before the first one of a 32-bit number `>= 0`, int64."""
    return 32 - torch.frexp(values.double()).exponent.to(torch.int64)
