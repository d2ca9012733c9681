"""Formats, roundings, the arithmetic word and rescaling: sections 1, 2 and 4 of `docs/arithmetic.md`.

Whole numbers are Python integers, everything between them is a `Fraction`; where the page asks for float32, the one
operation it names is done with `numpy.float32` scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce

import numpy as np

# --- formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """Codes of an integer of `bits` bits."""

    bits: int
    signed: bool = True

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    def holds(self, value: int) -> bool:
        return self.low <= value <= self.high

    def saturate(self, value: int) -> int:
        return min(max(value, self.low), self.high)

    def wrap(self, value: int) -> int:
        return (value - self.low) % (1 << self.bits) + self.low


def parse_format(text: str) -> Format:
    signed = text.removeprefix("u")
    if not signed.startswith("int"):
        raise ValueError(f"the page knows integer formats only, not {text!r}")
    return Format(int(signed.removeprefix("int")), signed=signed == text)


# --- rounding ------------------------------------------------------------------------------------------------------


def half_even(value: Fraction) -> int:
    below = math.floor(value)
    rest = value - below
    if rest == Fraction(1, 2):
        return below if below % 2 == 0 else below + 1
    return below if rest < Fraction(1, 2) else below + 1


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def half_away(value: Fraction) -> int:
    magnitude = math.floor(abs(value) + Fraction(1, 2))
    return magnitude if value >= 0 else -magnitude


def floor(value: Fraction) -> int:
    return math.floor(value)


Rounding = Callable[[Fraction], int]

ROUNDINGS: dict[str, Rounding] = {
    "half_even": half_even,
    "half_up": half_up,
    "half_away": half_away,
    "floor": floor,
}

# --- float32 -------------------------------------------------------------------------------------------------------

BEYOND = Fraction(1 << 200)
"""Stands for infinity where an infinite product is rounded: outside every format."""


def to_float32(code: int) -> np.float32:
    """A whole number in single precision, rounded once (numpy would go through double)."""
    surplus = max(abs(code).bit_length() - 24, 0)
    return np.float32(math.ldexp(half_even(Fraction(code, 1 << surplus)), surplus))


def exact(value: np.float32) -> Fraction:
    if math.isnan(value):
        raise ValueError("the page does not say what becomes of NaN")
    if math.isinf(value):
        return BEYOND if value > 0 else -BEYOND
    return Fraction(float(value))


def nearest32(value: Fraction) -> np.float32:
    """An exact number in single precision, rounded once."""
    if value == 0:
        return np.float32(0)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    last = max(exponent - 23, -149)
    with np.errstate(over="ignore"):
        return np.float32(math.ldexp(half_even(value / Fraction(2) ** last), last))


def multiply32(a: np.float32, b: np.float32) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(a * b)


def divide32(a: np.float32, b: np.float32) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(a / b)


def add32(a: np.float32, b: np.float32) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(a + b)


# --- the arithmetic word -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """`int32:wrap/fixed_point:24:half_even`, taken apart."""

    accumulator: Format
    saturating: bool
    rule: str
    bits: int | None
    roundings: tuple[Rounding, ...]

    @property
    def in_float(self) -> bool:
        return self.rule == "float"


RULES = {"fixed_point": (True, 1), "fixed_point_two": (True, 2), "power_of_two": (False, 1), "float": (False, 1)}
"""Per rule: whether it names a number of bits, and how many roundings it names."""


def parse_word(text: str) -> Word:
    before, after = text.split("/")
    accumulator, overflow = before.split(":")
    rule, *rest = after.split(":")
    has_bits, roundings = RULES[rule]
    if len(rest) != has_bits + roundings or overflow not in ("wrap", "saturate"):
        raise ValueError(f"not an arithmetic word: {text!r}")
    bits = int(rest.pop(0)) if has_bits else None
    return Word(parse_format(accumulator), overflow == "saturate", rule, bits, tuple(ROUNDINGS[name] for name in rest))


# --- counts and bounds ---------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What section 4 counts: results outside their format, and sums the accumulator could not hold.

    `widest` is for those who choose cases: the bits of the widest whole number met between operands and result.
    """

    saturated: int = 0
    overflowed: int = 0
    widest: int = 0

    def met(self, number: int) -> int:
        self.widest = max(self.widest, abs(number).bit_length())
        return number


@dataclass(frozen=True)
class Bounds:
    """The clamp at the end of an operator."""

    low: int
    high: int
    format: Format

    def clamp(self, value: int, counts: Counts) -> int:
        below = value < self.format.low and self.low <= self.format.low
        above = value > self.format.high and self.high >= self.format.high
        counts.saturated += below or above
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Finish:
    """Everything that follows the exact sum of an operator: accumulator, rescaling, zero point, clamp."""

    word: Word
    bounds: Bounds
    counts: Counts = field(default_factory=Counts)
    zero: int = 0

    def accumulate(self, total: int) -> int:
        """Brings an exact sum into the accumulator, once."""
        accumulator = self.word.accumulator
        self.counts.met(total)
        self.counts.overflowed += not accumulator.holds(total)
        return accumulator.saturate(total) if self.word.saturating else accumulator.wrap(total)

    def clamp(self, value: int) -> int:
        return self.bounds.clamp(value + self.zero, self.counts)

    def rescaled(self, value: int, multiplier: int | float, shift: int | None) -> int:
        """One term, by the table of section 2, and the clamp."""
        return self.clamp(rescale(self.word, value, multiplier, shift, self.counts))

    def summed(self, terms: Sequence[tuple[int, int | float]], shift: int | None, offset: int | float = 0) -> int:
        """Terms with factors of their own and one shift, and the clamp."""
        return self.clamp(rescale_sum(self.word, terms, shift, offset, self.counts))


# --- rescaling -----------------------------------------------------------------------------------------------------


def rescale(word: Word, value: int, multiplier: int | float, shift: int | None, counts: Counts) -> int:
    if word.in_float:
        return round_once(word, exact(multiply32(to_float32(value), np.float32(multiplier))), counts)
    if word.rule == "fixed_point_two":
        return rescale_in_two_steps(word, value, multiplier, shift, counts)
    return round_once(word, Fraction(counts.met(value * multiplier), 1 << shift), counts)


def round_once(word: Word, value: Fraction, counts: Counts) -> int:
    return counts.met(word.roundings[0](value))


def rescale_in_two_steps(word: Word, value: int, multiplier: int, shift: int, counts: Counts) -> int:
    first, second = word.roundings
    high = first(Fraction(counts.met(value * multiplier), 1 << min(shift, 31)))
    return second(Fraction(high, 1 << max(shift - 31, 0)))


def rescale_sum(
    word: Word, terms: Sequence[tuple[int, int | float]], shift: int | None, offset: int | float, counts: Counts
) -> int:
    """One shift and one rounding; in float32 the terms are added in the order given, the offset last."""
    if word.rule == "fixed_point_two":
        raise ValueError("the page defines no sum in two steps")
    if word.in_float:
        products = [multiply32(to_float32(value), np.float32(multiplier)) for value, multiplier in terms]
        return round_once(word, exact(add32(reduce(add32, products), np.float32(offset))), counts)
    total = sum(counts.met(value * multiplier) for value, multiplier in terms) + counts.met(offset)
    return round_once(word, Fraction(counts.met(total), 1 << shift), counts)


# --- section 2.1: encoding a real factor ---------------------------------------------------------------------------


def encode(factor: float, bits: int) -> tuple[int, int]:
    """The integer and the shift that stand for one real factor."""
    if factor == 0.0:
        return 0, 0
    exponent = math.frexp(abs(factor))[1]
    shift = min(bits - exponent, 62)
    multiplier = scaled(factor, shift)
    if abs(multiplier) >= 1 << bits:
        multiplier, shift = multiplier // 2, shift - 1
    return multiplier, shift


def encode_sum(factors: Sequence[float], bits: int) -> tuple[list[int], int]:
    """Integers with one common shift, that of the largest factor."""
    _, shift = encode(max(factors, key=abs), bits)
    return [scaled(factor, shift) for factor in factors], shift


def scaled(factor: float, shift: int) -> int:
    """`rhe(factor * 2^shift)`."""
    return half_even(Fraction(factor) * Fraction(2) ** shift)
