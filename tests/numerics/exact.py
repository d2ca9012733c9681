"""Exact references in plain integers and fractions; nothing here calls torch arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from hypothesis import settings
from hypothesis import strategies as st

from qgraph.numerics import QType, Rounding

INT64 = QType(64)
FORMATS = [QType(bits, signed) for bits in (2, 4, 7, 8, 12, 16, 24, 31, 32, 33, 48, 62) for signed in (True, False)]
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
SMALLEST_SUBNORMAL = 2.0**-149


def exact(examples: int = 50) -> settings:
    """Deterministic property tests of a stated size."""
    return settings(derandomize=True, deadline=None, max_examples=examples)


def int64s() -> st.SearchStrategy[int]:
    return st.integers(INT64.qmin, INT64.qmax)


def int32s() -> st.SearchStrategy[int]:
    return st.integers(-(2**31), 2**31 - 1)


def floats32() -> st.SearchStrategy[float]:
    return st.floats(width=32, allow_nan=False, allow_infinity=False)


def scales() -> st.SearchStrategy[float]:
    return st.floats(2.0**-100, 2.0**100, width=32)


def round_exact(value: Fraction | int, rounding: Rounding) -> int:
    value = Fraction(value)
    if rounding is Rounding.FLOOR:
        return math.floor(value)
    if rounding is Rounding.HALF_UP:
        return math.floor(value + Fraction(1, 2))
    if rounding is Rounding.HALF_AWAY:
        return int(math.copysign(1, value)) * math.floor(abs(value) + Fraction(1, 2))
    return round(value)


def saturate_exact(code: int, qtype: QType) -> int:
    return min(max(code, qtype.qmin), qtype.qmax)


def wrap_exact(code: int, qtype: QType) -> int:
    rest = code % 2**qtype.bits
    return rest - 2**qtype.bits if rest > qtype.qmax else rest


def binary_exponent(value: Fraction) -> int:
    """Largest `e` with `2**e <= abs(value)`."""
    numerator, denominator = abs(value.numerator), value.denominator
    guess = numerator.bit_length() - denominator.bit_length()
    return guess if abs(value) >= Fraction(2) ** guess else guess - 1


def float32_exact(value: Fraction | int) -> Fraction:
    """IEEE single precision, round to nearest even, without overflow."""
    value = Fraction(value)
    if value == 0:
        return value
    unit = Fraction(2) ** (max(binary_exponent(value), -126) - 23)
    rounded = round(value / unit) * unit
    assert abs(rounded) <= Fraction(LARGEST_FLOAT32), "the reference does not overflow"
    return rounded


def near_halves(dtype: torch.dtype) -> torch.Tensor:
    """Ties of every size up to the end of the fraction bits, and their neighbours on both sides."""
    bits = round(-math.log2(torch.finfo(dtype).eps))
    whole = [*range(6), *(2**power + odd for power in range(3, bits) for odd in (-1, 0))]
    ties = torch.tensor([float(value) + 0.5 for value in whole], dtype=dtype)
    around = [torch.nextafter(ties, torch.full_like(ties, bound)) for bound in (-math.inf, math.inf)]
    positive = torch.cat([ties, *around])
    return torch.cat([positive, -positive])


def fractions(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.flatten().tolist()]


def integers(values: torch.Tensor) -> list[int]:
    """A flat tensor of whole numbers as Python integers; fails on fractions, NaN and infinities."""
    exact_values = fractions(values)
    assert all(value.denominator == 1 for value in exact_values)
    return [int(value) for value in exact_values]


def long(values: Iterable[int] | int) -> torch.Tensor:
    return torch.tensor(values if isinstance(values, int) else list(values), dtype=torch.int64)


def double(values: Iterable[float] | float) -> torch.Tensor:
    return torch.tensor(values if isinstance(values, (int, float)) else list(values), dtype=torch.float64)


def single(values: Iterable[float] | float) -> torch.Tensor:
    return torch.tensor(values if isinstance(values, (int, float)) else list(values), dtype=torch.float32)


def bits_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two float32 tensors hold the same bits, signs of zero included."""
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))
