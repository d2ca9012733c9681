"""Rescaling and sums of existing engines, on exact numbers: integers and fractions, rounded where the engine rounds.

Written from the engines' own descriptions: gemmlowp's `fixedpoint.h`, TFLite's `quantization_util.cc`, and what is
known of onnxruntime's MLAS, fbgemm, oneDNN and torch's own loops.
"""

from __future__ import annotations

import math
from fractions import Fraction

from .arithmetic import half_away, half_even

WORD = 1 << 32
LOWEST = -(1 << 31)
SMALLEST_EXPONENT = -149


def single(value: Fraction | int | float) -> Fraction:
    """A number rounded to float32, ties to even."""
    exact = Fraction(value)
    if exact == 0:
        return exact
    exponent = math.frexp(float(abs(exact)))[1]
    while abs(exact) >= Fraction(2) ** exponent:
        exponent += 1
    while abs(exact) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    step = Fraction(2) ** max(exponent - 24, SMALLEST_EXPONENT)
    return half_even(exact / step) * step


def double(value: Fraction) -> Fraction:
    """A number rounded to float64."""
    return Fraction(float(value))


def as_int32(value: int) -> int:
    """A whole float as x86 converts it."""
    return value if LOWEST <= value < -LOWEST else LOWEST


def wrapped(value: int) -> int:
    return (value - LOWEST) % WORD + LOWEST


# --- one term ------------------------------------------------------------------------------------------------------


def mlas_mul(acc: int, factor: Fraction, zero: int) -> int:
    return as_int32(half_even(single(single(single(acc) * factor) + zero)))


def fbgemm(acc: int, factor: Fraction, zero: int, bias: Fraction | None = None) -> int:
    held = single(acc) if bias is None else single(single(acc) + bias)
    return as_int32(half_even(single(held * factor))) + zero


def onednn(acc: int, factors: tuple[Fraction, Fraction, Fraction], zero: int, bias: Fraction | None = None) -> int:
    source, weight, result = factors
    real = single(single(single(acc) * source) * weight)
    if bias is not None:
        real = single(real + bias)
    return half_even(min(max(single(single(real * result) + zero), Fraction(LOWEST)), Fraction(-LOWEST - 128)))


def onednn_factors(
    source: Fraction, weight: Fraction, result: Fraction, *, linear: bool
) -> tuple[Fraction, Fraction, Fraction]:
    """What is stored for three scales: torch hands them over as reciprocals, which rounds twice."""

    def again(scale: Fraction) -> Fraction:
        return single(1 / single(1 / scale))

    return again(source), again(weight) if linear else weight, single(1 / again(result))


def quantize_multiplier(factor: Fraction) -> tuple[int, int]:
    """`QuantizeMultiplier`: 31 bits and an exponent."""
    if factor == 0:
        return 0, 0
    exponent = 0
    mantissa = factor
    while abs(mantissa) >= 1:
        mantissa, exponent = mantissa / 2, exponent + 1
    while abs(mantissa) < Fraction(1, 2):
        mantissa, exponent = mantissa * 2, exponent - 1
    fixed = half_away(mantissa * (1 << 31))
    if abs(fixed) == 1 << 31:
        fixed, exponent = fixed // 2, exponent + 1
    return (0, 0) if exponent < -31 else (fixed, exponent)


def doubling_high_mul(a: int, b: int) -> int:
    """`SaturatingRoundingDoublingHighMul`, whose division cuts towards zero."""
    product = a * b
    nudged = product + ((1 << 30) if product >= 0 else 1 - (1 << 30))
    return int(Fraction(nudged, 1 << 31))


def gemmlowp(acc: int, multiplier: int, shift: int, zero: int = 0) -> int:
    lifted = wrapped(acc << max(shift, 0))
    return half_away(Fraction(doubling_high_mul(lifted, multiplier), 1 << max(-shift, 0))) + zero


def tflite_int64(acc: int, factor: Fraction, zero: int) -> int:
    multiplier, shift = quantize_multiplier(factor)
    short = 0x7FFF if multiplier >= 0x7FFF0000 else math.floor(Fraction(multiplier, 1 << 16) + Fraction(1, 2))
    return wrapped(math.floor(Fraction(acc * short, 1 << (15 - shift)) + Fraction(1, 2))) + zero


def tflite_double(acc: int, factor: Fraction, zero: int) -> int:
    return as_int32(half_away(double(acc * factor))) + zero


# --- two terms: codes, scales and zero points of x, y and the result ------------------------------------------------

Side = tuple[int, Fraction, int]


def mlas_add(x: Side, y: Side, scale: Fraction, zero: int) -> int:
    (a, scale_a, zero_a), (b, scale_b, zero_b) = x, y
    ratio_a, ratio_b = single(scale_a / scale), single(scale_b / scale)
    fixed = single(zero - single(ratio_a * zero_a + single(ratio_b * zero_b)))
    return as_int32(half_even(single(a * ratio_a + single(b * ratio_b + fixed))))


def aten_add(x: Side, y: Side, scale: Fraction, zero: int, *, vector: bool) -> int:
    inverse = single(1 / scale)
    if not vector:
        parts = [single(s * (code - z)) for code, s, z in (x, y)]
        return as_int32(half_even(single(single(single(sum(parts)) * inverse) + zero)))
    parts = [single(s * code + single(s * -z)) for code, s, z in (x, y)]
    return half_even(single(single(sum(parts)) * inverse)) + zero


def tflite_add(x: Side, y: Side, scale: Fraction, zero: int, *, bits: int, sign: int) -> int:
    lift = 20 if bits == 8 else 15
    twice = 2 * max(x[1], y[1])
    parts = [gemmlowp((code - z) << lift, *quantize_multiplier(double(s / twice))) for code, s, z in (x, y)]
    total = wrapped(parts[0] + sign * parts[1])
    return gemmlowp(total, *quantize_multiplier(double(twice / (scale * (1 << lift))))) + zero
