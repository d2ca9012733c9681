"""Bounds, storage and names of number formats."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qgraph.errors import UserError
from qgraph.numerics import (
    FloatFormat,
    QType,
    as_format,
    float16,
    float32,
    parse_format,
    parse_qtype,
    qint4,
    qint8,
    qint16,
    qint32,
    quint8,
)
from tests.numerics.exact import saturate_exact

STORAGE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
EVERY = [QType(bits, signed) for signed in (True, False) for bits in range(2, 65)]
STORED = [qtype for qtype in EVERY if qtype != QType(64, signed=False)]
NAMED = {
    "int4": qint4,
    "int8": qint8,
    "int16": qint16,
    "int32": qint32,
    "uint8": quint8,
    "float16": float16,
    "float32": float32,
}


@pytest.mark.parametrize(
    ("qtype", "qmin", "qmax"),
    [
        (QType(2), -2, 1),
        (qint4, -8, 7),
        (qint8, -128, 127),
        (qint16, -32768, 32767),
        (qint32, -2147483648, 2147483647),
        (QType(64), -(2**63), 2**63 - 1),
        (QType(2, signed=False), 0, 3),
        (quint8, 0, 255),
        (QType(32, signed=False), 0, 2**32 - 1),
    ],
    ids=str,
)
def test_bounds(qtype: QType, qmin: int, qmax: int) -> None:
    assert (qtype.qmin, qtype.qmax) == (qmin, qmax)


@pytest.mark.parametrize("qtype", EVERY, ids=str)
def test_every_format_has_all_its_codes(qtype: QType) -> None:
    assert qtype.qmax - qtype.qmin + 1 == 2**qtype.bits
    assert qtype.qmin == (-qtype.qmax - 1 if qtype.signed else 0)


@pytest.mark.parametrize("bits", [-8, 0, 1, 65, 128])
@pytest.mark.parametrize("signed", [True, False])
def test_unsupported_widths_are_refused(bits: int, signed: bool) -> None:
    with pytest.raises(UserError, match=f"format of {bits} bits is not supported"):
        QType(bits, signed)


@pytest.mark.parametrize("qtype", STORED, ids=str)
def test_storage_is_the_narrowest_dtype_that_fits(qtype: QType) -> None:
    fitting = [d for d in STORAGE if torch.iinfo(d).min <= qtype.qmin and torch.iinfo(d).max >= qtype.qmax]
    narrowest = min(torch.iinfo(dtype).bits for dtype in fitting)
    assert qtype.storage in fitting
    assert torch.iinfo(qtype.storage).bits == narrowest


@pytest.mark.parametrize(
    ("qtype", "dtype"),
    [
        (qint4, torch.int8),
        (qint8, torch.int8),
        (quint8, torch.uint8),
        (QType(9, signed=False), torch.int16),
        (qint16, torch.int16),
        (QType(16, signed=False), torch.int32),
        (QType(24), torch.int32),
        (qint32, torch.int32),
        (QType(32, signed=False), torch.int64),
        (QType(48), torch.int64),
    ],
    ids=str,
)
def test_storage(qtype: QType, dtype: torch.dtype) -> None:
    assert qtype.storage is dtype


def test_unsigned_64_bits_have_no_storage() -> None:
    with pytest.raises(UserError, match="no torch dtype stores uint64"):
        str(QType(64, signed=False).storage)


@pytest.mark.parametrize("qtype", [qint4, qint8, quint8, qint16, qint32, QType(40), QType(62)], ids=str)
def test_contains_exactly_the_codes(qtype: QType) -> None:
    values = [qtype.qmin - 1, qtype.qmin, 0, qtype.qmax, qtype.qmax + 1]
    inside = qtype.contains(torch.tensor(values))
    assert inside.dtype is torch.bool
    assert inside.tolist() == [False, True, True, True, False]


def test_contains_of_floats() -> None:
    codes = torch.tensor([-129.0, -128.0, 127.0, 128.0, float("inf"), float("nan")])
    assert qint8.contains(codes).tolist() == [False, True, True, False, False, False]


# `contains` and `saturate` accept any integer dtype, also one narrower than the format or unsigned.
@pytest.mark.parametrize(
    ("qtype", "codes"),
    [
        (qint8, torch.tensor([5, 127, 128, 200], dtype=torch.uint8)),
        (qint16, torch.tensor([0, 255], dtype=torch.uint8)),
        (quint8, torch.tensor([-128, -1, 0, 127], dtype=torch.int8)),
        (qint16, torch.tensor([-128, 0, 127], dtype=torch.int8)),
        (qint32, torch.tensor([-32768, 0, 32767], dtype=torch.int16)),
        (QType(40), torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32)),
    ],
    ids=lambda value: str(value) if isinstance(value, QType) else str(value.dtype),
)
def test_codes_in_a_dtype_without_the_bounds(qtype: QType, codes: torch.Tensor) -> None:
    plain = codes.tolist()
    assert qtype.contains(codes).tolist() == [qtype.qmin <= code <= qtype.qmax for code in plain]
    result = qtype.saturate(codes)
    assert result.dtype is codes.dtype
    assert result.tolist() == [saturate_exact(code, qtype) for code in plain]


def test_contains_of_a_float_just_outside_32_bits() -> None:
    assert qint32.contains(torch.tensor([2.0**31])).tolist() == [False]


def test_saturate_keeps_dtype() -> None:
    for dtype in (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64):
        result = qint8.saturate(torch.tensor([-300, -128, 0, 127, 300], dtype=dtype))
        assert result.dtype is dtype
        assert result.tolist() == [-128, -128, 0, 127, 127]


@pytest.mark.parametrize(("name", "expected"), NAMED.items())
def test_names(name: str, expected: QType | FloatFormat) -> None:
    assert str(expected) == name
    assert parse_format(name) == expected
    assert parse_format(f"q{name}") == expected
    assert as_format(name) == expected
    assert as_format(f"torch.{name}") == expected
    assert as_format(expected) is expected


@pytest.mark.parametrize("qtype", [QType(4, signed=False), QType(12), QType(24), QType(48), QType(64)], ids=str)
def test_every_format_reads_its_name_back(qtype: QType) -> None:
    assert parse_format(str(qtype)) == qtype


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int8, qint8),
        (torch.uint8, quint8),
        (torch.int16, qint16),
        (torch.int32, qint32),
        (torch.float16, float16),
        (torch.half, float16),
        (torch.float32, float32),
        (torch.qint8, qint8),
        (torch.quint8, quint8),
        (torch.qint32, qint32),
    ],
    ids=str,
)
def test_torch_dtypes(dtype: torch.dtype, expected: QType | FloatFormat) -> None:
    assert as_format(dtype) == expected


@pytest.mark.parametrize(
    "unknown", [torch.bool, torch.float64, torch.bfloat16, torch.complex64, "", "q", "int", "INT8"]
)
def test_unknown_formats_are_refused(unknown: torch.dtype | str) -> None:
    with pytest.raises(UserError, match="unknown number format"):
        as_format(unknown)


@pytest.mark.parametrize(
    ("name", "close"), [("intt8", "int8"), ("itn16", "int16"), ("unit8", "uint8"), ("flot16", "float16")]
)
def test_unknown_names_suggest_close_ones(name: str, close: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_format(name)
    assert repr(name) in caught.value.what
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("did you mean")
    assert repr(close) in caught.value.fix


def test_a_name_far_from_all_lists_them() -> None:
    with pytest.raises(UserError) as caught:
        parse_format("zzz")
    assert caught.value.fix == f"known names: {', '.join(sorted(NAMED))}"


def test_parse_qtype_wants_integers() -> None:
    assert parse_qtype("qint16") == qint16
    with pytest.raises(UserError, match="'float16' is not an integer format"):
        parse_qtype("float16")
    with pytest.raises(UserError, match="unknown number format 'integer'"):
        parse_qtype("integer")


@pytest.mark.parametrize(("bits", "storage"), [(16, torch.float16), (32, torch.float32)])
def test_float_formats(bits: int, storage: torch.dtype) -> None:
    assert FloatFormat(bits).storage is storage
    assert str(FloatFormat(bits)) == f"float{bits}"


@pytest.mark.parametrize("bits", [0, 8, 24, 64])
def test_other_float_formats_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"float format of {bits} bits"):
        FloatFormat(bits)


def test_formats_are_values() -> None:
    assert QType(8) == qint8
    assert len({QType(8), qint8, quint8}) == 2
    assert sorted([qint32, qint8, qint16]) == [qint8, qint16, qint32]
    with pytest.raises(dataclasses.FrozenInstanceError):
        qint8.bits = 4  # type: ignore[misc]
