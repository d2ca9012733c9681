"""Rescaling rules against plain integers and fractions, written from docs/arithmetic.md section 2."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError, UserError
from qgraph.numerics import (
    Factor,
    RequantizeRule,
    Rounding,
    ScaleForm,
    encode_common_shift,
    encode_fixed_point,
    parse_rule,
    qint8,
)
from tests.numerics.exact import (
    double,
    exact,
    float32_exact,
    fractions,
    int32s,
    long,
    round_exact,
    single,
)

MODES = list(Rounding)
BITS = [2, 8, 15, 16, 24, 31]
INT32_ENDS = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]
GEMMLOWP = RequantizeRule(ScaleForm.FIXED_POINT_TWO, Rounding.HALF_AWAY, first_rounding=Rounding.HALF_UP)
RULES = [
    *(RequantizeRule(ScaleForm.FLOAT, mode) for mode in MODES),
    *(RequantizeRule(ScaleForm.POWER_OF_TWO, mode) for mode in MODES),
    *(RequantizeRule(ScaleForm.FIXED_POINT, mode, bits) for mode in MODES for bits in BITS),
    *(RequantizeRule(ScaleForm.FIXED_POINT_TWO, last, 31, first) for first, last in product(MODES, MODES)),
]
TWO_STEP = [rule for rule in RULES if rule.form is ScaleForm.FIXED_POINT_TWO]


def fixed_point(bits: int, rounding: Rounding = Rounding.HALF_EVEN) -> RequantizeRule:
    return RequantizeRule(ScaleForm.FIXED_POINT, rounding, bits)


def encode_exact(factor: float, bits: int) -> tuple[int, int]:
    """`M` and `s` of section 2.1."""
    if factor == 0:
        return 0, 0
    shift = min(bits - math.frexp(factor)[1], 62)
    multiplier = round(Fraction(factor) * Fraction(2) ** shift)
    return (multiplier // 2, shift - 1) if abs(multiplier) == 2**bits else (multiplier, shift)


def two_step_exact(accumulator: int, multiplier: int, shift: int, rule: RequantizeRule) -> int:
    assert rule.first_rounding is not None
    up, down = max(31 - shift, 0), max(shift - 31, 0)
    first = round_exact(Fraction(accumulator * 2**up * multiplier, 2**31), rule.first_rounding)
    return round_exact(Fraction(first, 2**down), rule.rounding)


def factors(low: int, high: int) -> st.SearchStrategy[float]:
    """Positive float64 factors within powers of two: anything, and the powers, which make ties."""
    return st.floats(2.0**low, 2.0**high) | st.integers(low, high).map(lambda power: 2.0**power)


def encodable(factor: float, bits: int) -> bool:
    return encode_exact(factor, bits)[1] >= 0


# Encoding


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@exact()
def test_encoding_follows_the_specification(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(factors(-80, bits - 1), min_size=1, max_size=8))
    signed = [value * data.draw(st.sampled_from([1, -1])) for value in values]
    assume(all(encodable(value, bits) for value in signed))
    factor = encode_fixed_point(double(signed), bits)
    pairs = list(zip(factor.multiplier.tolist(), factor.shifts().tolist(), strict=True))
    assert pairs == [encode_exact(value, bits) for value in signed]


@pytest.mark.parametrize("bits", range(2, 32))
def test_mantissas_are_normalized_and_close(bits: int) -> None:
    values = [sign * (0.5 + step / 1001) * 2.0**power for sign in (1, -1) for step in (0, 1, 333, 500) for power in
              range(bits - 61, bits - 1)]  # fmt: skip
    factor = encode_fixed_point(double(values), bits)
    for value, multiplier, shift in zip(values, factor.multiplier.tolist(), factor.shifts().tolist(), strict=True):
        assert 2 ** (bits - 1) <= abs(multiplier) < 2**bits
        assert 0 <= shift <= 62
        assert abs(Fraction(multiplier, 2**shift) - Fraction(value)) <= abs(Fraction(value)) / 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_factor_zero(bits: int) -> None:
    factor = encode_fixed_point(double([0.0, -0.0]), bits)
    assert factor.multiplier.tolist() == [0, 0]
    assert factor.shifts().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "multiplier"),
    [
        (2.0**-39, 2**23),
        (2.0**-40, 2**22),
        (1.5 * 2.0**-61, 3),
        (2.0**-62, 1),
        (0.75 * 2.0**-62, 1),
        (2.0**-63, 0),
        (1.5 * 2.0**-62, 2),
        (2.5 * 2.0**-62, 2),
        (1e-300, 0),
        (5e-324, 0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_tiny_factors_keep_what_62_bits_of_shift_leave(value: float, multiplier: int, sign: int) -> None:
    factor = encode_fixed_point(double(sign * value), 24)
    assert (factor.multiplier.item(), factor.shifts().item()) == (sign * multiplier, 62)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power", [-20, 0, 1])
def test_a_mantissa_that_rounds_up_is_halved(bits: int, power: int) -> None:
    value = (1 - 2.0 ** -(bits + 2)) * 2.0**power
    factor = encode_fixed_point(double([value, -value]), bits)
    assert factor.multiplier.tolist() == [2 ** (bits - 1), -(2 ** (bits - 1))]
    assert factor.shifts().tolist() == [bits - 1 - power] * 2


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_factor(bits: int) -> None:
    largest = 2.0**bits - 1
    factor = encode_fixed_point(double(largest), bits)
    assert (factor.multiplier.item(), factor.shifts().item()) == (2**bits - 1, 0)
    for value in (2.0**bits, -(2.0**bits), math.nextafter(2.0**bits, 0), 2.0**bits - 0.25, 1e300):
        with pytest.raises(QuantizationError, match=f"factor is 2\\*\\*{bits} or more"):
            encode_fixed_point(double([1.0, value]), bits)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_factors_must_be_finite(rule: RequantizeRule, bad: float) -> None:
    with pytest.raises(QuantizationError, match="not finite"):
        rule.encode(double([1.0, bad]))
    with pytest.raises(QuantizationError, match="not finite"):
        encode_common_shift(double([1.0, bad]), 24)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("rule", [RULES[0], RULES[4], fixed_point(24), GEMMLOWP], ids=str)
def test_encoding_keeps_the_shape(rule: RequantizeRule, shape: tuple[int, ...]) -> None:
    factor = rule.encode(torch.full(shape, 0.25, dtype=torch.float64))
    assert factor.multiplier.shape == shape
    if rule.form is ScaleForm.FLOAT:
        assert factor.shift is None
        assert factor.multiplier.dtype is torch.float32
    else:
        assert factor.shifts().shape == shape
        assert factor.multiplier.dtype is factor.shifts().dtype is torch.int64
    assert torch.equal(factor.real(), torch.full(shape, 0.25, dtype=torch.float64))


@given(value=st.floats(-(2.0**31), 2.0**31, exclude_min=True, exclude_max=True))
@exact()
def test_float_factors_are_the_nearest_float32(value: float) -> None:
    factor = parse_rule("float:half_even").encode(double(value))
    assert fractions(factor.multiplier) == fractions(factor.real()) == [float32_exact(Fraction(value))]


@pytest.mark.parametrize("value", [1e39, 2.0**31, -(2.0**31)])
def test_a_large_float_factor_is_refused(value: float) -> None:
    with pytest.raises(QuantizationError):
        parse_rule("float:half_even").encode(double(value))


def test_a_float_factor_has_no_shift() -> None:
    with pytest.raises(UserError, match="has no shift"):
        Factor(single(0.5), None).shifts()


@pytest.mark.parametrize("power", range(-31, 32))
def test_powers_of_two(power: int) -> None:
    factor = parse_rule("power_of_two:half_even").encode(double(2.0**power))
    assert (factor.multiplier.item(), factor.shifts().item()) == (2 ** max(power, 0), max(-power, 0))
    assert factor.real().item() == 2.0**power


@pytest.mark.parametrize("value", [0.0, -1.0, -0.5, 3.0, 0.75, 1 + 2**-52, 1 - 2**-53, 1e-300])
def test_other_factors_are_no_power_of_two(value: float) -> None:
    with pytest.raises(QuantizationError, match="not a power of two"):
        parse_rule("power_of_two:half_even").encode(double([1.0, value]))


@pytest.mark.parametrize("power", [-1074, -1022, -32, 32, 1023])
def test_powers_of_two_out_of_reach(power: int) -> None:
    with pytest.raises(QuantizationError, match="beyond"):
        parse_rule("power_of_two:half_even").encode(double(2.0**power))


# Factors of a sum


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@exact()
def test_common_shift_follows_the_specification(bits: int, data: st.DataObject) -> None:
    magnitude = st.just(0.0) | factors(-80, bits - 1)
    values = data.draw(st.lists(st.tuples(magnitude, st.sampled_from([1, -1])), min_size=1, max_size=4))
    signed = [value * sign for value, sign in values]
    largest = max(signed, key=abs)
    assume(encodable(largest, bits))
    factor = encode_common_shift(double(signed), bits)
    shift = encode_exact(abs(largest), bits)[1]
    assert factor.shifts().tolist() == shift
    expected = [round(Fraction(value) * 2**shift) for value in signed]
    assert factor.multiplier.tolist() == expected
    assert max(map(abs, expected)) < 2**bits
    if largest and shift < 62:
        assert abs(round(Fraction(largest) * 2 ** (shift + 1))) >= 2**bits, "a larger shift would fit as well"


def test_common_shift_per_channel() -> None:
    values = double([0.5, 3.0, 0.0, 0.1, -0.25, 0.0]).reshape(2, 3)
    factor = encode_common_shift(values, 24)
    assert factor.multiplier.shape == (2, 3)
    columns = [encode_common_shift(values[:, channel], 24) for channel in range(3)]
    assert factor.shifts().tolist() == [column.shifts().item() for column in columns] == [24, 22, 0]
    assert torch.equal(factor.multiplier, torch.stack([column.multiplier for column in columns], dim=1))


@pytest.mark.parametrize("large", [2.0**24, -(2.0**24), 1e300])
def test_common_shift_refuses_large_factors(large: float) -> None:
    with pytest.raises(QuantizationError, match=r"factor is 2\*\*24 or more"):
        encode_common_shift(double([0.5, large]), 24)


# One rescaled value


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@exact(40)
def test_fixed_point(rounding: Rounding, bits: int, data: st.DataObject) -> None:
    factor = data.draw(factors(-66, bits - 1)) * data.draw(st.sampled_from([1, -1]))
    assume(encodable(factor, bits))
    values = INT32_ENDS + data.draw(st.lists(int32s(), max_size=8))
    multiplier, shift = encode_exact(factor, bits)
    rule = fixed_point(bits, rounding)
    result = rule.apply(long(values), rule.encode(double(factor)))
    assert result.dtype is torch.int64
    assert result.tolist() == [round_exact(Fraction(value * multiplier, 2**shift), rounding) for value in values]


@pytest.mark.parametrize("rounding", MODES)
def test_fixed_point_of_every_multiplier_and_shift_extreme(rounding: Rounding) -> None:
    for multiplier, shift in product([-(2**31) + 1, -1, 0, 1, 2**31 - 1], [0, 1, 31, 61, 62]):
        result = fixed_point(31, rounding).apply(long(INT32_ENDS), Factor(long(multiplier), long(shift)))
        expected = [round_exact(Fraction(value * multiplier, 2**shift), rounding) for value in INT32_ENDS]
        assert result.tolist() == expected


def test_fixed_point_of_the_widest_bilinear_sum() -> None:
    """int48 accumulators of `bpu` hold at most int16 codes times 2**22."""
    values = [-(2**37), -(2**37) + 1, 2**37 - 1]
    multiplier = 2**24 - 1
    result = fixed_point(24).apply(long(values), Factor(long(multiplier), long(40)))
    assert result.tolist() == [round(Fraction(value * multiplier, 2**40)) for value in values]


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("power", [-31, -30, -8, -1, 0, 1, 8, 31])
@given(values=st.lists(int32s(), min_size=1, max_size=8), ties=st.lists(st.integers(-9, 9), max_size=4))
@exact(25)
def test_power_of_two(rounding: Rounding, power: int, values: list[int], ties: list[int]) -> None:
    half = max(2 ** (-power - 1), 1) if power < 0 else 1
    values = [*values, *(min(max(tie * half, -(2**31)), 2**31 - 1) for tie in ties), *INT32_ENDS]
    rule = RequantizeRule(ScaleForm.POWER_OF_TWO, rounding)
    result = rule.apply(long(values), rule.encode(double(2.0**power)))
    assert result.tolist() == [round_exact(value * Fraction(2) ** power, rounding) for value in values]


@pytest.mark.parametrize("rounding", MODES)
@given(
    values=st.lists(int32s() | st.integers(-(2**25), 2**25), min_size=1, max_size=8),
    factor=st.floats(-(2.0**20), 2.0**20) | st.integers(-40, 20).map(lambda power: 2.0**power),
)
@exact()
def test_float(rounding: Rounding, values: list[int], factor: float) -> None:
    rule = RequantizeRule(ScaleForm.FLOAT, rounding)
    values = INT32_ENDS + values
    result = rule.apply(long(values), rule.encode(double(factor)))
    assert result.dtype is torch.int64
    stored = float32_exact(Fraction(factor))
    assert result.tolist() == [round_exact(float32_exact(float32_exact(v) * stored), rounding) for v in values]


def test_float_rounds_the_accumulator_to_even() -> None:
    rule = parse_rule("float:half_even")
    values = [2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1]
    assert rule.apply(long(values), rule.encode(double(1.0))).tolist() == [2**24, 2**24 + 4, -(2**24), 2**31]


@pytest.mark.parametrize("sign", [1, -1])
def test_float_results_beyond_int64_saturate_on_their_side(sign: int) -> None:
    """2**70 has no int64."""
    rule = parse_rule("float:half_even")
    result = rule.apply(long(sign * 2**30), Factor(single(2.0**40), None))
    assert qint8.saturate(result).item() == (qint8.qmax if sign > 0 else qint8.qmin)


@pytest.mark.parametrize("rule", TWO_STEP, ids=str)
@given(factor=factors(-60, 10), sign=st.sampled_from([1, -1]), values=st.lists(int32s(), min_size=1, max_size=8))
@exact(30)
def test_two_steps(rule: RequantizeRule, factor: float, sign: int, values: list[int]) -> None:
    multiplier, shift = encode_exact(sign * factor, 31)
    limit = int(2**31 / max(factor, 1))  # results within 32 bits
    values = [value for value in INT32_ENDS + values if abs(value) <= limit]
    result = rule.apply(long(values), rule.encode(double(sign * factor)))
    assert result.tolist() == [two_step_exact(value, multiplier, shift, rule) for value in values]


@pytest.mark.parametrize(("value", "power"), [(2**20, 13), (-(2**20), 13), (2**31 - 1, 2), (4, 30), (-(2**31), 30)])
def test_two_steps_with_a_result_beyond_32_bits(value: int, power: int) -> None:
    multiplier, shift = encode_exact(2.0**power, 31)
    result = GEMMLOWP.apply(long(value), GEMMLOWP.encode(double(2.0**power)))
    expected = two_step_exact(value, multiplier, shift, GEMMLOWP)
    assert qint8.saturate(result).item() == min(max(expected, qint8.qmin), qint8.qmax)


def truncating_division(dividend: int, divisor: int) -> int:
    """`/` of C on integers."""
    quotient = abs(dividend) // divisor
    return quotient if dividend >= 0 else -quotient


def saturating_rounding_doubling_high_mul(a: int, b: int) -> int:
    """gemmlowp, fixedpoint/fixedpoint.h."""
    if a == b == -(2**31):
        return 2**31 - 1
    nudge = 1 << 30 if a * b >= 0 else 1 - (1 << 30)
    return truncating_division(a * b + nudge, 1 << 31)


def rounding_divide_by_pot(x: int, exponent: int) -> int:
    """gemmlowp, fixedpoint/fixedpoint.h."""
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if (x & mask) > threshold else 0)


@given(factor=factors(-31, -1) | st.floats(0.5, 1 - 2**-30), values=st.lists(int32s(), max_size=16))
@exact(200)
def test_two_steps_are_those_of_gemmlowp(factor: float, values: list[int]) -> None:
    multiplier, shift = encode_exact(factor, 31)
    assert shift >= 31
    ties = [sign * count * 2 ** (shift - 31) for count in (1, 2, 3, 5) for sign in (1, -1)]
    values = [*INT32_ENDS, *(tie for tie in ties if abs(tie) < 2**31), *values]
    expected = [
        rounding_divide_by_pot(saturating_rounding_doubling_high_mul(value, multiplier), shift - 31) for value in values
    ]
    assert GEMMLOWP.apply(long(values), GEMMLOWP.encode(double(factor))).tolist() == expected


def test_ties_of_gemmlowp() -> None:
    """Step one (factor 1/2) sends ties up, step two (an even product, then 1/2) away from zero."""
    values = long([-5, -3, -1, 1, 3, 5])
    assert GEMMLOWP.apply(values, GEMMLOWP.encode(double(0.5))).tolist() == [-2, -1, 0, 1, 2, 3]
    assert GEMMLOWP.apply(values * 2, GEMMLOWP.encode(double(0.25))).tolist() == [-3, -2, -1, 1, 2, 3]


@pytest.mark.parametrize("rule", [RULES[0], RULES[4], fixed_point(24), GEMMLOWP], ids=str)
def test_factors_broadcast(rule: RequantizeRule) -> None:
    accumulator = torch.randint(-(2**31), 2**31, (2, 3, 4))
    values = double([0.5, 2.0**-20, 2.0**-5]).reshape(3, 1)
    result = rule.apply(accumulator, rule.encode(values))
    assert result.shape == (2, 3, 4)
    for channel in range(3):
        one = rule.apply(accumulator[:, channel], rule.encode(values[channel]))
        assert torch.equal(result[:, channel], one)


@pytest.mark.parametrize("rule", [RULES[0], RULES[4], fixed_point(24), GEMMLOWP], ids=str)
def test_nothing_rescales_to_nothing(rule: RequantizeRule) -> None:
    result = rule.apply(torch.empty(0, 3, dtype=torch.int64), rule.encode(double(0.5)))
    assert (result.shape, result.dtype) == ((0, 3), torch.int64)


# A sum rounded once


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("form", [ScaleForm.FIXED_POINT, ScaleForm.POWER_OF_TWO])
@given(data=st.data())
@exact(40)
def test_sum(rounding: Rounding, form: ScaleForm, data: st.DataObject) -> None:
    multiplier = st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(0, 30).map(lambda power: 2**power)
    first, second = data.draw(multiplier), data.draw(multiplier)
    shift, offset = data.draw(st.integers(0, 62)), data.draw(st.none() | int32s())
    pairs = [(-(2**31), -(2**31)), (1, -1), *data.draw(st.lists(st.tuples(int32s(), int32s()), max_size=8))]
    left, right = zip(*pairs, strict=True)
    result = RequantizeRule(form, rounding).apply_sum(
        [long(left), long(right)],
        [long(first), long(second)],
        long(shift),
        None if offset is None else long(offset),
    )
    assert result.dtype is torch.int64
    totals = [x * first + y * second + (offset or 0) for x, y in pairs]
    assert result.tolist() == [round_exact(Fraction(total, 2**shift), rounding) for total in totals]


@given(data=st.data())
@exact()
def test_sum_of_encoded_factors_is_rounded_once(data: st.DataObject) -> None:
    values = [data.draw(factors(-20, 4)) for _ in range(3)]
    codes = [data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=4, max_size=4)) for _ in range(3)]
    rule, factor = fixed_point(31), encode_common_shift(double(values), 31)
    result = rule.apply_sum([long(code) for code in codes], list(factor.multiplier), factor.shifts())
    shift = encode_exact(max(values), 31)[1]
    multipliers = [round(Fraction(value) * 2**shift) for value in values]
    columns = zip(*codes, strict=True)
    totals = [sum(code * m for code, m in zip(column, multipliers, strict=True)) for column in columns]
    assert result.tolist() == [round(Fraction(total, 2**shift)) for total in totals]


@pytest.mark.parametrize("rounding", MODES)
@given(data=st.data())
@exact()
def test_float_sum_rounds_every_step_in_order(rounding: Rounding, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    terms = [data.draw(int32s()) for _ in range(count)]
    stored = [data.draw(st.floats(-(2.0**10), 2.0**10, width=32)) for _ in range(count)]
    offset = data.draw(st.none() | st.floats(-(2.0**20), 2.0**20, width=32))
    rule = RequantizeRule(ScaleForm.FLOAT, rounding)
    result = rule.apply_sum(
        [long([term]) for term in terms],
        [single(value) for value in stored],
        None,
        None if offset is None else single(offset),
    )
    total = Fraction(0)
    for term, value in zip(terms, stored, strict=True):
        total = float32_exact(total + float32_exact(float32_exact(term) * Fraction(value)))
    if offset is not None:
        total = float32_exact(total + Fraction(offset))
    assert result.dtype is torch.int64
    assert result.tolist() == [round_exact(total, rounding)]


def test_float_sum_depends_on_the_order() -> None:
    rule = parse_rule("float:half_even")
    ones = [single(1.0)] * 3
    big, small, minus = long(2**24), long(1), long(-(2**24))
    assert rule.apply_sum([big, small, minus], ones, None).item() == 0
    assert rule.apply_sum([big, minus, small], ones, None).item() == 1


def test_sum_broadcasts() -> None:
    left, right = torch.randint(-128, 128, (2, 1, 4)), torch.randint(-128, 128, (3, 1))
    offset = long([[1], [2], [3]])
    result = fixed_point(31).apply_sum([left, right], [long(3), long(-5)], long(2), offset)
    assert result.shape == (2, 3, 4)
    total = left * 3 + right * -5 + offset
    expected = [round(Fraction(value, 4)) for value in total.flatten().tolist()]
    assert result.flatten().tolist() == expected


@pytest.mark.parametrize("rule", TWO_STEP[:2], ids=str)
def test_two_steps_define_no_sum(rule: RequantizeRule) -> None:
    with pytest.raises(UserError, match="no sum of terms"):
        rule.apply_sum([long(1)], [long(1)], long(0))


# Words


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_read_their_words_back(rule: RequantizeRule) -> None:
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("float:half_away", RequantizeRule(ScaleForm.FLOAT, Rounding.HALF_AWAY)),
        ("power_of_two:floor", RequantizeRule(ScaleForm.POWER_OF_TWO, Rounding.FLOOR)),
        ("fixed_point:24:half_even", fixed_point(24)),
        ("fixed_point_two:31:half_up:half_away", GEMMLOWP),
    ],
)
def test_words(word: str, rule: RequantizeRule) -> None:
    assert parse_rule(word) == rule
    assert str(rule) == word


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "unknown scale form ''"),
        ("fixed", "unknown scale form 'fixed'"),
        (" float:floor", "unknown scale form ' float'"),
        ("Float:floor", "unknown scale form 'Float'"),
        ("float", "should have 1 fields after 'float'"),
        ("float:24:half_even", "should have 1 fields after 'float'"),
        ("fixed_point", "should have 2 fields after 'fixed_point'"),
        ("fixed_point:24", "should have 2 fields after 'fixed_point'"),
        ("fixed_point:24:floor:floor", "should have 2 fields after 'fixed_point'"),
        ("fixed_point_two:31:floor", "should have 3 fields after 'fixed_point_two'"),
        ("fixed_point:x:floor", "'x' in 'fixed_point:x:floor' is not a number of bits"),
        ("fixed_point:-3:floor", "'-3' in 'fixed_point:-3:floor' is not a number of bits"),
        ("fixed_point::floor", "'' in 'fixed_point::floor' is not a number of bits"),
        ("fixed_point:1:floor", "multiplier of 1 bits is not supported"),
        ("fixed_point:32:floor", "multiplier of 32 bits is not supported"),
        ("fixed_point_two:24:floor:floor", "fixed_point_two has no multiplier of 24 bits"),
        ("fixed_point:24:half", "unknown rounding 'half' in 'fixed_point:24:half'"),
        ("float:", "unknown rounding '' in 'float:'"),
        ("fixed_point_two:31:up:half_up", "unknown rounding 'up'"),
        ("fixed_point:²:floor", "not a number of bits"),
    ],
)
def test_words_that_name_no_rule(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule(word)
    assert message in caught.value.what


@pytest.mark.parametrize(
    ("word", "close"),
    [("fixed_pont:24:floor", "fixed_point"), ("float:half_evn", "half_even"), ("flot:floor", "float")],
)
def test_unknown_names_suggest_close_ones(word: str, close: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule(word)
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("did you mean")
    assert repr(close) in caught.value.fix


@pytest.mark.parametrize("form", ScaleForm)
def test_only_two_steps_have_a_first_rounding(form: ScaleForm) -> None:
    two_step = form is ScaleForm.FIXED_POINT_TWO
    with pytest.raises(UserError, match="needs first_rounding" if two_step else "has no first_rounding"):
        RequantizeRule(form, Rounding.FLOOR, first_rounding=None if two_step else Rounding.FLOOR)


@pytest.mark.parametrize("bits", [-1, 0, 1, 32, 64])
def test_multipliers_of_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"multiplier of {bits} bits is not supported"):
        fixed_point(bits)
