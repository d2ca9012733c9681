"""LiteRT's words against the same formulas on plain integers, at ties, wraps and the ends of formats."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError
from qgraph.numerics import QParams, parse_quantize_rule, parse_rule, qint8, qint16, quantize
from qgraph.numerics.engine_softmax import TfliteSoftmax
from qgraph.numerics.engine_sums import TfliteAdd
from qgraph.numerics.engines import Gemmlowp, MeanRule, TfliteAverage, TfliteInt64, TfliteMean
from qgraph.numerics.gemmlowp import doubling_high_product, leading_zeros, scaled_by_power

CODES = st.integers(-(2**31), 2**31 - 1)
FACTORS = st.floats(2.0**-20, 200.0, allow_nan=False)


def away(value: Fraction) -> int:
    return int(math.copysign(math.floor(abs(value) + Fraction(1, 2)), value)) if value else 0


def wrap32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def encoded(factor: float) -> tuple[int, int]:
    mantissa, shift = math.frexp(factor)
    multiplier = away(Fraction(mantissa) * 2**31)
    return (multiplier // 2, shift + 1) if multiplier == 2**31 else (multiplier, shift)


def gemmlowp(value: int, multiplier: int, shift: int) -> int:
    high = (wrap32(value << max(shift, 0)) * multiplier + 2**30) >> 31
    return away(Fraction(high, 1 << max(-shift, 0)))


def one(value: int) -> torch.Tensor:
    return torch.tensor([value])


@given(CODES, FACTORS)
def test_gemmlowp(value: int, factor: float) -> None:
    rule = Gemmlowp()
    stored = rule.encode(torch.tensor(factor, dtype=torch.float64))
    assert (int(stored.multiplier), int(stored.shifts())) == encoded(factor)
    assert rule.apply(one(value), stored, 3).item() == gemmlowp(value, *encoded(factor)) + 3


@given(st.integers(-(2**46), 2**46), FACTORS)
def test_int64(value: int, factor: float) -> None:
    multiplier, shift = encoded(factor)
    short = (multiplier + 2**15) >> 16 if multiplier < 0x7FFF0000 else 0x7FFF
    expected = wrap32((value * short + (1 << (14 - shift))) >> (15 - shift))
    rule = TfliteInt64()
    assert rule.apply(one(value), rule.encode(torch.tensor(factor, dtype=torch.float64))).item() == expected


def test_int64_refuses_what_the_engine_cannot_shift() -> None:
    with pytest.raises(QuantizationError, match="a rescaling factor is above 16384"):
        TfliteInt64().encode(torch.tensor(16384.0, dtype=torch.float64))


@given(CODES, FACTORS, st.integers(1, 100_000))
def test_mean(value: int, ratio: float, count: int) -> None:
    multiplier, shift = encoded(ratio)
    lift = min(count.bit_length() - 1, 32, 31 + shift)
    expected = gemmlowp(value, (multiplier << lift) // count, shift - lift)
    rule = TfliteMean()
    stored = rule.encode_mean(torch.tensor(ratio, dtype=torch.float64), torch.tensor(float(count)))
    assert rule.apply(one(value), stored).item() == expected


@given(st.integers(-(2**35), 2**35), st.integers(1, 2**20))
def test_average(value: int, count: int) -> None:
    rule = TfliteAverage()
    stored = rule.encode_mean(torch.tensor(1.0, dtype=torch.float64), torch.tensor(count))
    size = (abs(value) + count // 2) // count
    assert rule.apply(one(value), stored).item() == (size if value >= 0 else -size)


def test_an_average_keeps_the_scale() -> None:
    with pytest.raises(QuantizationError, match="keeps the scale") as raised:
        TfliteAverage().encode_mean(torch.tensor(0.5, dtype=torch.float64), torch.tensor(4))
    assert "same_scale = true" in str(raised.value)


@pytest.mark.parametrize("word", ["tflite_mean", "tflite_average"])
def test_means_store_no_single_factor(word: str) -> None:
    rule = parse_rule(word)
    assert isinstance(rule, MeanRule)
    with pytest.raises(QuantizationError, match="computes means only"):
        rule.encode(torch.tensor(0.5, dtype=torch.float64))


def test_a_sum_the_engine_stops_at_is_refused() -> None:
    large, small = torch.tensor(1.0), torch.tensor(2.0**-19)
    for sign in (1.0, -1.0):
        with pytest.raises(QuantizationError, match="tflite_add cannot add scale 1"):
            TfliteAdd().encode(large, small, small, sign, 8)
        TfliteAdd().encode(large, small, torch.tensor(2.0**-18), sign, 8)


def test_a_softmax_of_scales_the_engine_refuses() -> None:
    with pytest.raises(QuantizationError, match="a softmax of values with scale"):
        TfliteSoftmax().encode(torch.tensor(2.0**-27))


@given(CODES, CODES)
def test_high_products(a: int, b: int) -> None:
    expected = 2**31 - 1 if a == b == -(2**31) else math.floor(Fraction(a * b, 2**31) + Fraction(1, 2))
    assert doubling_high_product(one(a), one(b)).item() == expected


def test_the_one_product_that_saturates() -> None:
    assert doubling_high_product(one(-(2**31)), one(-(2**31))).item() == 2**31 - 1
    assert doubling_high_product(one(-(2**15)), one(-(2**15)), 16).item() == 2**15 - 1


@given(st.integers(0, 2**32 - 1))
def test_leading_zeros(value: int) -> None:
    assert leading_zeros(one(value)).item() == 32 - value.bit_length()


@given(CODES, st.integers(-8, 8))
def test_powers(value: int, exponent: int) -> None:
    expected = away(Fraction(value) * Fraction(2) ** exponent)
    assert scaled_by_power(one(value), exponent).item() == min(max(expected, -(2**31)), 2**31 - 1)


@pytest.mark.parametrize(
    ("value", "zero", "code"),
    [
        (1e30, 0, -128),
        (1e30, -5, 127),
        (-1e30, 0, -128),
        (-1e30, -5, 127),
        (math.inf, 3, -128),
        (math.nan, 3, -128),
        (math.nan, -3, 127),
        (0.25, 0, 1),
        (-0.25, 0, -1),
        (1e6, 0, 127),
        (-1e6, 0, -128),
    ],
)
def test_steps_through_an_int32_register(value: float, zero: int, code: int) -> None:
    rule = parse_quantize_rule("divide:half_away:int32")
    assert str(rule) == "divide:half_away:int32"
    qparams = QParams(torch.tensor(0.5), qint8, torch.tensor(zero))
    assert quantize(torch.tensor([value]), qparams, rule).item() == code
    wide = QParams(torch.tensor(0.5), qint16)
    assert quantize(torch.tensor([1.25]), wide, rule).item() == 3
