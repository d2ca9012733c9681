"""Rounding shifts, float rounding and overflow against exact fractions and plain integers."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.numerics import Overflow, QType, Rounding, round_float, rounding_shift_right
from tests.numerics.exact import (
    FORMATS,
    INT64,
    LARGEST_FLOAT32,
    SMALLEST_SUBNORMAL,
    exact,
    fractions,
    int64s,
    integers,
    long,
    near_halves,
    round_exact,
    saturate_exact,
    wrap_exact,
)

MODES = list(Rounding)
DECIMAL_MODES = {
    Rounding.HALF_EVEN: decimal.ROUND_HALF_EVEN,
    Rounding.HALF_AWAY: decimal.ROUND_HALF_UP,
    Rounding.FLOOR: decimal.ROUND_FLOOR,
}
EXTREMES = [INT64.qmin, INT64.qmin + 1, -(2**62) - 1, -(2**62), 2**62 - 1, 2**62, INT64.qmax - 1, INT64.qmax]


def around_ties(shift: int) -> list[int]:
    """Multiples of half of `2**shift`, both neighbours of each, and the ends of int64."""
    half = Fraction(2**shift, 2)
    near = {int(half * count) + offset for count in range(-9, 10) for offset in (-1, 0, 1)}
    return sorted(value for value in {*near, *EXTREMES} if INT64.qmin <= value <= INT64.qmax)


def values_of_dtype(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    edges = [0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.smallest_normal / 2, 1 / info.eps, 3 / info.eps]
    return torch.cat([near_halves(dtype), torch.tensor(edges, dtype=dtype)])


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("shift", range(63))
def test_shift_around_ties_and_extremes(rounding: Rounding, shift: int) -> None:
    values = around_ties(shift)
    expected = [round_exact(Fraction(value, 2**shift), rounding) for value in values]
    assert rounding_shift_right(long(values), shift, rounding).tolist() == expected


@pytest.mark.parametrize("rounding", DECIMAL_MODES)
@pytest.mark.parametrize("shift", [0, 1, 2, 7, 31, 61, 62])
def test_shift_agrees_with_decimal(rounding: Rounding, shift: int) -> None:
    values = around_ties(shift)
    with decimal.localcontext() as context:
        context.prec = 200
        quotients = [Decimal(value) / Decimal(2**shift) for value in values]
        expected = [int(quotient.quantize(Decimal(1), DECIMAL_MODES[rounding])) for quotient in quotients]
    assert rounding_shift_right(long(values), shift, rounding).tolist() == expected


@pytest.mark.parametrize("rounding", MODES)
@given(pairs=st.lists(st.tuples(int64s(), st.integers(0, 62)), min_size=1, max_size=16))
@exact()
def test_shift_per_element(rounding: Rounding, pairs: list[tuple[int, int]]) -> None:
    values, shifts = zip(*pairs, strict=True)
    expected = [round_exact(Fraction(value, 2**shift), rounding) for value, shift in pairs]
    assert rounding_shift_right(long(values), long(shifts), rounding).tolist() == expected


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        (Rounding.HALF_EVEN, [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]),
        (Rounding.HALF_UP, [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3]),
        (Rounding.HALF_AWAY, [-3, -2, -2, -1, -1, 0, 1, 1, 2, 2, 3]),
        (Rounding.FLOOR, [-3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_halves_of_small_numbers(rounding: Rounding, expected: list[int]) -> None:
    values = torch.arange(-5, 6)
    assert rounding_shift_right(values, 1, rounding).tolist() == expected
    assert integers(round_float(values.to(torch.float32) / 2, rounding)) == expected


@pytest.mark.parametrize("rounding", MODES)
def test_shift_broadcasts_and_leaves_its_input(rounding: Rounding) -> None:
    values, shifts = long([-7, 9]).reshape(2, 1), long([0, 1, 2])
    result = rounding_shift_right(values, shifts, rounding)
    assert result.dtype is torch.int64
    expected = [[round_exact(Fraction(value, 2**shift), rounding) for shift in range(3)] for value in (-7, 9)]
    assert result.tolist() == expected
    assert values.flatten().tolist() == [-7, 9]
    assert shifts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("rounding", MODES)
def test_shift_of_nothing_and_of_one_number(rounding: Rounding) -> None:
    assert rounding_shift_right(torch.empty(0, 3, dtype=torch.int64), 5, rounding).shape == (0, 3)
    single = rounding_shift_right(long(12), long(2), rounding)
    assert (single.shape, single.item()) == ((), 3)


@pytest.mark.parametrize("rounding", MODES)
def test_every_half_precision_number(rounding: Rounding) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[torch.isfinite(every)]
    result = round_float(finite, rounding)
    assert result.dtype is torch.float16
    assert integers(result) == [round_exact(value, rounding) for value in fractions(finite)]


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_float_around_ties(rounding: Rounding, dtype: torch.dtype) -> None:
    values = values_of_dtype(dtype)
    result = round_float(values, rounding)
    assert result.dtype is dtype
    assert integers(result) == [round_exact(value, rounding) for value in fractions(values)]


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_just_beside_one_half(rounding: Rounding, dtype: torch.dtype) -> None:
    """Adding one half to these rounds up to a whole number, so `floor(x + 0.5)` is wrong for them."""
    half = torch.tensor(0.5, dtype=dtype)
    below, above = torch.nextafter(half, torch.zeros_like(half)), torch.nextafter(half, torch.ones_like(half))
    odd = torch.tensor(1 / torch.finfo(dtype).eps + 1, dtype=dtype)
    results = [integers(round_float(value, rounding))[0] for value in (below, -below, above, -above, odd, -odd)]
    down, whole = rounding is Rounding.FLOOR, int(1 / torch.finfo(dtype).eps) + 1
    assert results == [0, -1 if down else 0, 0 if down else 1, -1, whole, -whole]


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float64, 64)], ids=["single", "double"])
@given(data=st.data())
@exact()
def test_any_finite_float(rounding: Rounding, dtype: torch.dtype, width: int, data: st.DataObject) -> None:
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
    close = st.integers(-(2**22), 2**22).map(lambda count: count / 4)
    values = torch.tensor(data.draw(st.lists(finite | close, min_size=1, max_size=16)), dtype=dtype)
    expected = [round_exact(value, rounding) for value in fractions(values)]
    assert integers(round_float(values, rounding)) == expected


@pytest.mark.parametrize("rounding", MODES)
def test_float_and_shift_agree_where_both_apply(rounding: Rounding) -> None:
    values = torch.arange(-(2**12), 2**12)
    assert torch.equal(round_float(values.double() / 16, rounding).long(), rounding_shift_right(values, 4, rounding))


@pytest.mark.parametrize("rounding", MODES)
def test_float_of_nothing_keeps_shape_and_input(rounding: Rounding) -> None:
    assert round_float(torch.empty(2, 0), rounding).shape == (2, 0)
    values = torch.tensor([[0.5, -1.5]])
    assert round_float(values, rounding).shape == (1, 2)
    assert values.tolist() == [[0.5, -1.5]]


@pytest.mark.parametrize("values", [[LARGEST_FLOAT32, -LARGEST_FLOAT32], [SMALLEST_SUBNORMAL, -SMALLEST_SUBNORMAL]])
@pytest.mark.parametrize("rounding", MODES)
def test_float_extremes(rounding: Rounding, values: list[float]) -> None:
    expected = [round_exact(Fraction(value), rounding) for value in values]
    assert integers(round_float(torch.tensor(values), rounding)) == expected


REFERENCES = {Overflow.SATURATE: saturate_exact, Overflow.WRAP: wrap_exact}


def around_bounds(qtype: QType) -> list[int]:
    span = 2**qtype.bits
    anchors = [0, qtype.qmin, qtype.qmax, qtype.qmin - span, qtype.qmax + span, 3 * span, -3 * span, *EXTREMES]
    near = {anchor + offset for anchor in anchors for offset in (-1, 0, 1)}
    return sorted(value for value in near if INT64.qmin <= value <= INT64.qmax)


@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("qtype", [*FORMATS, INT64], ids=str)
def test_overflow_around_the_bounds(overflow: Overflow, qtype: QType) -> None:
    values = around_bounds(qtype)
    result = overflow.apply(long(values), qtype)
    assert result.dtype is torch.int64
    assert result.tolist() == [REFERENCES[overflow](value, qtype) for value in values]
    assert bool(qtype.contains(result).all())


@pytest.mark.parametrize("qtype", [QType(63), QType(63, signed=False)], ids=str)
def test_overflow_of_63_bits(qtype: QType) -> None:
    values = around_bounds(qtype)
    assert qtype.saturate(long(values)).tolist() == [saturate_exact(value, qtype) for value in values]
    assert qtype.wrap(long(values)).tolist() == [wrap_exact(value, qtype) for value in values]


@given(values=st.lists(int64s(), min_size=1, max_size=16), qtype=st.sampled_from([*FORMATS, INT64]))
@exact(150)
def test_overflow_of_any_integer(values: list[int], qtype: QType) -> None:
    for overflow, reference in REFERENCES.items():
        assert overflow.apply(long(values), qtype).tolist() == [reference(value, qtype) for value in values]


@pytest.mark.parametrize("enum", [Rounding, Overflow])
def test_names_are_values(enum: type[Rounding] | type[Overflow]) -> None:
    assert [enum(str(member)) for member in enum] == list(enum)
    assert [str(member) for member in enum] == [member.value for member in enum]
