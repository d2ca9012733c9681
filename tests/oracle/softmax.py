"""Softmax as LiteRT computes it, on plain integers: gemmlowp's fixed point for 8 bits, interpolated tables for 16."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .arithmetic import Bounds, Counts, half_away, half_up, parse_format
from .operators import OPERATORS, Array, positions

ONE = 1 << 31
EXP_OF_POWERS = {-2: 1672461947, -1: 1302514674, 0: 790015084, 1: 290630308, 2: 39332535, 3: 720401, 4: 242}


def high(a: int, b: int) -> int:
    """`a * b / 2**31`, ties upwards."""
    return half_up(Fraction(a * b, ONE))


def divided(x: int, bits: int) -> int:
    """`x / 2**bits`, ties away from zero."""
    return half_away(Fraction(x, 1 << bits))


def exp_of_negative(x: int) -> int:
    """exp of a number `<= 0` in steps of 2**-26, in steps of 2**-31."""
    if x == 0:
        return ONE - 1
    quarter = 1 << 24
    low = x % quarter - quarter
    a = (low << 5) + (1 << 28)
    square = high(a, a)
    tail = high(divided(high(square, square), 2) + high(square, a), 715827883) + square
    result = 1895147668 + high(1895147668, a + divided(tail, 1))
    for power, factor in EXP_OF_POWERS.items():
        if (low - x) >> (26 + power) & 1:
            result = high(result, factor)
    return result


def inverse_of_one_plus(x: int) -> int:
    """`1 / (1 + x)`, all in steps of 2**-31."""
    half = (x + ONE) // 2
    guess = 1515870810 + high(half, -1010580540)
    for _ in range(3):
        guess += high(guess, (1 << 29) - high(half, guess)) << 2
    return min(2 * guess, ONE - 1)


def softmax8(row: list[int], multiplier: int, shift: int) -> list[int]:
    farthest = -math.floor(Fraction(31 << 26) / Fraction(2) ** shift)
    below = [x - max(row) for x in row]
    powers = [exp_of_negative(high(d << shift, multiplier)) if d >= farthest else 0 for d in below]
    total = sum(divided(e, 12) for e in powers)
    zeros = 32 - total.bit_length()
    inverse = inverse_of_one_plus((total << zeros) - ONE)
    return [divided(high(inverse, e), 35 - zeros) for e in powers]


def table16(function: Callable[[float], float], first: float, last: float) -> list[int]:
    """513 entries for `[first, last]`, values in steps of 2 / 65535."""
    unit = 65536 / ((2 / 65535) * 32767 - (2 / 65535) * -32768)
    step = (last - first) / 512
    ends = [first + i * step for i in range(513)]

    def away(x: float) -> int:
        return half_away(Fraction(x))

    table = []
    for i in range(512):
        sample = away(function(ends[i]) * unit)
        guess = away((function(ends[i + 1]) * unit + sample) / 2)
        middle = away(function(ends[i] + step / 2) * unit)
        table.append(sample - away((guess - middle) / 2))
    return [min(max(entry, -32768), 32767) for entry in [*table, away(function(last) * unit)]]


def interpolated(code: int, table: list[int]) -> int:
    index, part = (code + 32768) // 128, code % 128
    return table[index] + half_up(Fraction((table[index + 1] - table[index]) * part, 128))


def saturated(code: int) -> int:
    return min(max(code, -32768), 32767)


EXP16 = table16(math.exp, (10.0 / 65535) * (-32768 - 32767), (10.0 / 65535) * 0)
INVERSE16 = table16(lambda x: 1 / (1 + x), (1.0 / 65535) * 0, (1.0 / 65535) * 65535)


def softmax16(row: list[int], multiplier: int, shift: int) -> list[int]:
    def place(d: int) -> int:
        lifted = (d << max(shift, 0)) + ONE
        return divided(high(lifted % (1 << 32) - ONE, multiplier), max(-shift, 0)) + 32767

    powers = [interpolated(saturated(place(x - max(row))), EXP16) for x in row]
    total = sum(powers)
    zeros = 32 - total.bit_length()
    inverse = interpolated(saturated(half_up(Fraction(total << (zeros - 1), 1 << 14)) - 98304), INVERSE16)
    return [min(half_up(Fraction(e * inverse, 1 << (31 - zeros))), 32767) for e in powers]


WORDS = {"int32:wrap/tflite_softmax": softmax8, "int32:wrap/tflite_softmax16": softmax16}


def softmax(
    x: Array,
    multiplier: Array,
    shift: Array,
    *,
    dim: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    zero: int = 0,
    counts: Counts,
) -> Array:
    """Row by row along `dim`."""
    turned = np.moveaxis(x, dim, -1)
    result = np.empty(turned.shape, dtype=object)
    bounds = Bounds(low, high, parse_format(format))
    for start in positions(turned.shape[:-1]):
        steps = WORDS[arithmetic](list(turned[start]), int(multiplier.item()), int(shift.item()))
        for i, value in enumerate(steps):
            result[(*start, i)] = bounds.clamp(value + zero, counts)
    return np.moveaxis(result, -1, dim)


OPERATORS["softmax"] = softmax
