"""Function tables and their interpolation, written from docs/arithmetic.md section 7."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from qgraph.errors import UserError
from qgraph.numerics import (
    QParams,
    QType,
    build_table,
    choose_qparams,
    lookup,
    qint4,
    qint8,
    qint16,
    quantize,
    quint8,
)
from tests.numerics.exact import LARGEST_FLOAT32, float32_exact, long, saturate_exact, single

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "erf": torch.erf,
    "sin": torch.sin,
    "hardswish": torch.nn.functional.hardswish,
}
# Correctly rounded in IEEE arithmetic, so plain Python floats give the same bits.
EXACT_FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[float], float]]] = {
    "identity": (lambda x: x, lambda x: x),
    "negation": (torch.neg, lambda x: -x),
    "square": (torch.square, lambda x: x * x),
    "abs": (torch.abs, abs),
    "sqrt": (torch.sqrt, lambda x: math.sqrt(x) if x >= 0 else math.nan),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x if x else math.inf),
    "rsqrt": (torch.rsqrt, lambda x: 1 / math.sqrt(x) if x > 0 else math.inf if x == 0 else math.nan),
}
FORMATS = [qint4, qint8, quint8]


def all_codes(qtype: QType) -> torch.Tensor:
    return torch.arange(qtype.qmin, qtype.qmax + 1)


def entry_exact(value: float, result: QParams) -> int:
    """The code of one function value: infinities and NaN replaced, then float32, then section 3."""
    if math.isnan(value):
        value = 0.0
    value = min(max(value, -LARGEST_FLOAT32), LARGEST_FLOAT32)
    inverse = float32_exact(1 / Fraction(result.scale.item()))
    product = float32_exact(Fraction(value)) * inverse
    if abs(product) > Fraction(LARGEST_FLOAT32):
        return result.qtype.qmax if product > 0 else result.qtype.qmin
    return saturate_exact(round(float32_exact(product)) + int(result.zero_points()), result.qtype)


def lookup_exact(code: int, table: list[int], source: QType) -> int:
    """Section 7 in plain integers."""
    codes, offset = 2**source.bits, code - source.qmin
    if len(table) == codes:
        return table[offset]
    width = codes // (len(table) - 1)
    index, rest = divmod(offset, width)
    quotient, remainder = divmod(table[index] * (width - rest) + table[index + 1] * rest, width)
    return quotient + (2 * remainder > width or (2 * remainder == width and quotient % 2 == 1))


def fitted(function: Callable[[torch.Tensor], torch.Tensor], source: QParams, qtype: QType) -> QParams:
    """Symmetric parameters over the finite range of a function."""
    values = function(all_codes(source.qtype).double() * source.scale.double())
    return choose_qparams(values.min(), values.max(), qtype)


def close_results(source: QParams, function: str, qtype: QType) -> QParams:
    return fitted(FUNCTIONS[function], source, qtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [0.003, 1 / 16, 0.05])
@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("target", [qint8, qint16], ids=str)
def test_full_tables_are_the_function(function: str, scale: float, qtype: QType, target: QType) -> None:
    source = QParams(single(scale), qtype)
    result = close_results(source, function, target)
    table = build_table(FUNCTIONS[function], source, result)
    codes = all_codes(qtype)
    values = FUNCTIONS[function](codes.double() * source.scale.double())
    assert table.dtype is target.storage
    assert torch.equal(table, quantize(values, result))
    assert table.tolist() == [entry_exact(value, result) for value in values.tolist()]
    assert torch.equal(lookup(codes, table, qtype), table.long())


@pytest.mark.parametrize("function", EXACT_FUNCTIONS)
@pytest.mark.parametrize("scale", [0.1, 0.25, 1e-30])
@pytest.mark.parametrize("step", [2.0**-7, 0.01, 1e30])
@pytest.mark.parametrize("qtype", FORMATS, ids=str)
def test_entries_equal_plain_floats(function: str, scale: float, step: float, qtype: QType) -> None:
    source, result = QParams(single(scale), qtype), QParams(single(step), qint8)
    torch_function, plain = EXACT_FUNCTIONS[function]
    table = build_table(torch_function, source, result)
    assert table.tolist() == [
        entry_exact(plain(code * source.scale.item()), result) for code in all_codes(qtype).tolist()
    ]


def test_the_function_sees_float64() -> None:
    seen = []
    source = QParams(single(0.1), qint8)
    build_table(lambda x: seen.append(x) or x, source, source)
    assert seen[0].dtype is torch.float64
    assert seen[0].tolist() == [code * source.scale.item() for code in range(-128, 128)]


def test_affine_tables() -> None:
    source = QParams(single(0.05), quint8, long(100))
    result = QParams(single(1 / 255), quint8, long(3))
    table = build_table(torch.sqrt, source, result)
    step = source.scale.item()
    expected = [math.sqrt((code - 100) * step) if code >= 100 else math.nan for code in range(256)]
    assert table.tolist() == [entry_exact(value, result) for value in expected]
    assert set(table[:101].tolist()) == {3}, "outside the domain stands the code of real zero"


@pytest.mark.parametrize(
    ("function", "at_zero", "below"),
    [
        (torch.reciprocal, 127, None),
        (torch.rsqrt, 127, 0),
        (torch.log, -128, 0),
        (lambda x: -torch.rsqrt(x), -128, 0),
        (lambda x: x / x, 0, None),
    ],
    ids=["reciprocal", "rsqrt", "log", "negative rsqrt", "quotient"],
)
@pytest.mark.parametrize("scale", [0.1, 1e30])
def test_infinities_saturate_and_nan_is_zero(
    function: Callable[[torch.Tensor], torch.Tensor], at_zero: int, below: int | None, scale: float
) -> None:
    table = build_table(function, QParams(single(0.1), qint8), QParams(single(scale), qint8))
    assert table[128] == at_zero
    if below is not None:
        assert set(table[:128].tolist()) == {below}


def test_values_beyond_float32_saturate() -> None:
    """exp is infinite in float32 from 89, in float64 from 710; sinh has both signs."""
    source = QParams(single(10.0), qint8)
    for function in (torch.exp, torch.sinh):
        table = build_table(function, source, QParams(single(0.01), qint8))
        assert set(table[128 + 9 :].tolist()) == {127}
    assert set(table[: 128 - 9].tolist()) == {-128}


@pytest.mark.parametrize(
    ("qtype", "entries"), [(qint8, 1), (qint8, 2), (qint8, 16), (qint8, 128), (quint8, 32), (qint4, 4)]
)
@pytest.mark.parametrize("function", ["tanh", "exp", "sin"])
def test_small_interpolated_tables(qtype: QType, entries: int, function: str) -> None:
    source = QParams(single(0.05), qtype)
    result = close_results(source, function, qint16)
    check_interpolated(FUNCTIONS[function], source, result, entries)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [8 / 32768, 1e-5])
def test_interpolated_tables_of_16_bits(function: str, scale: float) -> None:
    source = QParams(single(scale), qint16)
    check_interpolated(FUNCTIONS[function], source, close_results(source, function, qint16), 4096)


@pytest.mark.parametrize("function", [torch.reciprocal, torch.rsqrt, torch.log], ids=lambda function: function.__name__)
@pytest.mark.parametrize("entries", [64, 4096])
def test_interpolated_tables_of_functions_with_poles(
    function: Callable[[torch.Tensor], torch.Tensor], entries: int
) -> None:
    check_interpolated(function, QParams(single(1e-3), qint16), QParams(single(1e-2), qint16), entries)


def check_interpolated(
    function: Callable[[torch.Tensor], torch.Tensor], source: QParams, result: QParams, entries: int
) -> None:
    """Entries are exact, one past the end included; everything between follows the integer formula."""
    qtype = source.qtype
    table = build_table(function, source, result, entries=entries)
    assert (table.shape, table.dtype) == ((entries + 1,), result.qtype.storage)
    width = 2**qtype.bits // entries
    grid = torch.arange(entries + 1) * width + qtype.qmin
    values = function(grid.double() * source.scale.double())
    assert table.tolist() == [entry_exact(value, result) for value in values.tolist()]
    codes = all_codes(qtype)
    looked_up = lookup(codes, table, qtype)
    assert torch.equal(looked_up[::width], table[:-1].long())
    plain = table.tolist()
    assert looked_up.tolist() == [lookup_exact(code, plain, qtype) for code in codes.tolist()]


# Largest second derivative over all reals (exp: over the range of the test).
CURVATURE = {"tanh": 4 / (3 * math.sqrt(3)), "sigmoid": 1 / (6 * math.sqrt(3)), "sin": 1.0, "exp": math.e}


@pytest.mark.parametrize(("function", "curvature"), CURVATURE.items())
@pytest.mark.parametrize("entries", [64, 512, 4096])
def test_interpolation_error(function: str, curvature: float, entries: int) -> None:
    """At most h**2 / 8 * max|f''| plus half a step for the entries and half a step for the result.

    0.01 of a step more stands for the float32 arithmetic of quantizing an entry (2**15 steps of 2**-24 relative each).
    """
    reach = 1.0 if function == "exp" else 8.0
    source = QParams(single(reach / 2**15), qint16)
    largest = math.e if function == "exp" else 1.0
    result = QParams(single(largest * 1.01 / 2**15), qint16)
    table = build_table(FUNCTIONS[function], source, result, entries=entries)
    codes = all_codes(qint16)
    reals = lookup(codes, table, qint16).double() * result.scale.double()
    error = (reals - FUNCTIONS[function](codes.double() * source.scale.double())).abs().max().item()
    spacing = 2 * reach / entries
    assert error <= spacing**2 / 8 * curvature + 1.01 * result.scale.item()


@pytest.mark.parametrize("function", ["tanh", "sigmoid", "exp", "erf"])
def test_interpolation_of_an_increasing_function_never_falls(function: str) -> None:
    source = QParams(single(6 / 2**15), qint16)
    table = build_table(FUNCTIONS[function], source, close_results(source, function, qint16), entries=4096)
    assert bool((lookup(all_codes(qint16), table, qint16).diff() >= 0).all())


def test_interpolation_rounds_half_to_even() -> None:
    table = torch.tensor([0, 1, 2, 5, -4], dtype=torch.int8)
    codes = all_codes(QType(3))
    assert lookup(codes, table, QType(3)).tolist() == [0, 0, 1, 2, 2, 4, 5, 0]


def test_interpolation_between_the_extremes_of_16_bits() -> None:
    table = torch.tensor([-32768, 32767, -32768], dtype=torch.int16)
    codes = all_codes(qint16)
    assert lookup(codes, table, qint16).tolist() == [
        lookup_exact(code, table.tolist(), qint16) for code in codes.tolist()
    ]


@pytest.mark.parametrize("entries", [None, 32])
def test_lookup_keeps_shape(entries: int | None) -> None:
    source = QParams(single(0.05), qint8)
    table = build_table(torch.tanh, source, QParams(single(2.0**-7), qint8), entries=entries)
    codes = torch.randint(-128, 128, (3, 4, 5), dtype=torch.int8)
    result = lookup(codes, table, qint8)
    assert (result.shape, result.dtype) == (codes.shape, torch.int64)
    assert torch.equal(lookup(codes.transpose(0, 2), table, qint8), result.transpose(0, 2))
    assert lookup(codes[:0], table, qint8).shape == (0, 4, 5)
    assert lookup(codes[0, 0, 0], table, qint8).shape == ()
    assert torch.equal(lookup(codes.long(), table, qint8), result)


@pytest.mark.parametrize("entries", [None, 32])
def test_lookup_of_unsigned_codes(entries: int | None) -> None:
    table = build_table(torch.tanh, QParams(single(0.05), quint8), QParams(single(2.0**-7), qint8), entries=entries)
    codes = torch.arange(256, dtype=torch.uint8)
    plain = table.tolist()
    assert lookup(codes, table, quint8).tolist() == [lookup_exact(code, plain, quint8) for code in range(256)]


@pytest.mark.parametrize("entries", [-1, 0, 3, 100, 256, 512])
def test_entries_must_be_a_power_of_two_below_the_codes(entries: int) -> None:
    source = QParams(single(0.05), qint8)
    with pytest.raises(UserError):
        build_table(torch.tanh, source, source, entries=entries)


@pytest.mark.parametrize("which", ["source", "result"])
def test_tables_have_one_scale(which: str) -> None:
    one, many = QParams(single(0.05), qint8), QParams(torch.full((256,), 0.05), qint8, axis=0)
    with pytest.raises(UserError):
        build_table(torch.tanh, many if which == "source" else one, many if which == "result" else one)
