"""What `QParams` accepts, and the scales and zero points chosen for a range."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError, UserError
from qgraph.numerics import (
    QParams,
    QType,
    Scheme,
    choose_qparams,
    dequantize,
    qint4,
    qint8,
    qint16,
    qint32,
    qparams_from_scale,
    quantize,
    quint8,
)
from tests.numerics.exact import (
    LARGEST_FLOAT32,
    SMALLEST_NORMAL,
    SMALLEST_SUBNORMAL,
    exact,
    float32_exact,
    floats32,
    fractions,
    long,
    saturate_exact,
    single,
)

UNUSABLE = [0.0, -0.0, -1.0, -SMALLEST_SUBNORMAL, math.nan, math.inf, -math.inf]
SIGNED = [QType(2), qint4, qint8, qint16, QType(24), qint32]
AFFINE = [QType(2), qint4, qint8, quint8, qint16, QType(16, signed=False)]


@pytest.mark.parametrize("scale", UNUSABLE)
def test_unusable_scales_are_refused(scale: float) -> None:
    with pytest.raises(QuantizationError, match="not finite and positive"):
        QParams(single(scale), qint8)
    with pytest.raises(QuantizationError, match="not finite and positive"):
        QParams(single([1.0, scale, 2.0]), qint8, axis=0)


@pytest.mark.parametrize(
    ("shape", "axis"), [((), 0), ((), -1), ((3,), None), ((1,), None), ((3, 1), 0), ((3, 1), None), ((1, 1), 1)]
)
def test_shape_and_axis_must_agree(shape: tuple[int, ...], axis: int | None) -> None:
    with pytest.raises(QuantizationError, match=r"a scale of shape .* does not go with axis"):
        QParams(torch.ones(shape), qint8, axis=axis)


@pytest.mark.parametrize(
    ("scale", "zero_point", "axis"),
    [(single(1.0), long([0]), None), (single([1.0, 2.0]), long(0), 0), (single([1.0, 2.0]), long([0, 1, 2]), 0)],
)
def test_zero_point_must_have_the_shape_of_the_scale(
    scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None
) -> None:
    with pytest.raises(QuantizationError, match="different shapes"):
        QParams(scale, qint8, zero_point, axis)


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (torch.tensor(0.1, dtype=torch.float64), None),
        (torch.tensor(1), None),
        (single(0.1), single(0.5)),
        (single(0.1), long(128)),
        (single(0.1), long(-129)),
    ],
    ids=["float64 scale", "integer scale", "float zero point", "zero point above", "zero point below"],
)
def test_invariants_of_the_docstring_are_checked(scale: torch.Tensor, zero_point: torch.Tensor | None) -> None:
    with pytest.raises(QuantizationError):
        QParams(scale, qint8, zero_point)


@pytest.mark.parametrize("scale", [SMALLEST_NORMAL, 2.0**-127, LARGEST_FLOAT32])
def test_extreme_scales_keep_zero_and_sign(scale: float) -> None:
    qparams = QParams(single(scale), qint8)
    assert quantize(single([0.0, scale, -scale]), qparams).tolist() == [0, 1, -1]


@pytest.mark.parametrize("scale", [2.0**-128, 1e-40, SMALLEST_SUBNORMAL])
def test_a_scale_without_finite_inverse(scale: float) -> None:
    """Refused, or usable; `1 / scale` is infinite in float32, so zero times it is NaN."""
    with pytest.raises(QuantizationError):
        QParams(single(scale), qint8)


def test_properties_of_symmetric_parameters() -> None:
    qparams = QParams(single(0.5), qint8)
    assert (qparams.per_channel, qparams.symmetric) == (False, True)
    zero_points = qparams.zero_points()
    assert (zero_points.dtype, zero_points.shape, zero_points.item()) == (torch.int64, (), 0)
    assert str(qparams) == "int8*0.5"


def test_properties_of_affine_parameters_per_channel() -> None:
    qparams = QParams(single([0.5, 0.25]), quint8, long([0, 7]), axis=1)
    assert (qparams.per_channel, qparams.symmetric) == (True, False)
    assert qparams.zero_points().tolist() == [0, 7]
    assert QParams(single([0.5, 0.25]), quint8, long([0, 0]), axis=1).symmetric
    assert str(QParams(single(0.25), quint8, long(7))) == "uint8*0.25+7"
    assert str(QParams(single([0.5, 0.25]), qint8, axis=1)) == "int8*[2]"


@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (3, 1, 1, 1)), (1, (1, 3, 1, 1)), (-1, (1, 1, 1, 3)), (-3, (1, 3, 1, 1))]
)
def test_shaped_broadcasts_along_the_axis(axis: int, shape: tuple[int, ...]) -> None:
    qparams = QParams(single([1.0, 2.0, 3.0]), qint8, axis=axis)
    shaped = qparams.shaped(qparams.scale, 4)
    assert shaped.shape == shape
    assert shaped.flatten().tolist() == [1.0, 2.0, 3.0]


def test_shaped_leaves_one_scale_alone() -> None:
    qparams = QParams(single(2.0), qint8)
    assert qparams.shaped(qparams.scale, 4).shape == ()


def test_same_as() -> None:
    reference = QParams(single([1.0, 2.0]), qint8, axis=0)
    assert reference.same_as(QParams(single([1.0, 2.0]), qint8, long([0, 0]), 0))
    different = [
        QParams(single([1.0, 2.5]), qint8, axis=0),
        QParams(single([1.0, 2.0]), qint16, axis=0),
        QParams(single([1.0, 2.0]), qint8, axis=1),
        QParams(single([1.0, 2.0]), qint8, long([0, 1]), 0),
        QParams(single([1.0, 2.0, 3.0]), qint8, axis=0),
        QParams(single(1.0), qint8),
    ]
    assert not any(reference.same_as(other) or other.same_as(reference) for other in different)


def test_moving_keeps_everything() -> None:
    for qparams in (QParams(single(0.5), qint8), QParams(single([0.5, 1.0]), quint8, long([3, 4]), 1)):
        moved = qparams.to(torch.device("cpu"))
        assert moved.same_as(qparams)
        assert moved.axis == qparams.axis


def test_parameters_are_frozen() -> None:
    qparams = QParams(single(0.5), qint8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        qparams.axis = 0  # type: ignore[misc]


@pytest.mark.parametrize(("qtype", "divisor"), [(qint4, 8), (qint8, 128), (qint16, 32768), (qint32, 2**31)], ids=str)
@given(low=floats32(), high=floats32())
@exact()
def test_symmetric_scale_is_the_reach_over_a_power_of_two(qtype: QType, divisor: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    qparams = choose_qparams(single(low), single(high), qtype)
    reach = max(abs(Fraction(low)), abs(Fraction(high)))
    expected = max(reach / divisor, Fraction(SMALLEST_NORMAL)) if reach else Fraction(1)
    assert fractions(qparams.scale) == [expected]
    assert qparams.symmetric
    assert (qparams.qtype, qparams.axis, qparams.scale.dtype) == (qtype, None, torch.float32)


@pytest.mark.parametrize("qtype", [qint4, qint8, qint16], ids=str)
@pytest.mark.parametrize("reach", [1.0, 0.1, 3.7e-20, 12345.678, LARGEST_FLOAT32])
def test_symmetric_ends_are_codes_but_for_one_step(qtype: QType, reach: float) -> None:
    qparams = choose_qparams(single(-reach), single(reach), qtype)
    assert quantize(single([-reach, reach]), qparams).tolist() == [qtype.qmin, qtype.qmax]
    assert dequantize(torch.tensor(qtype.qmin), qparams).item() == -single(reach).item()


@pytest.mark.parametrize("qtype", SIGNED, ids=str)
def test_symmetric_degenerate_ranges(qtype: QType) -> None:
    assert choose_qparams(single(0.0), single(0.0), qtype).scale.item() == 1.0
    assert choose_qparams(single(-0.0), single(0.0), qtype).scale.item() == 1.0
    assert choose_qparams(single(0.0), single(SMALLEST_SUBNORMAL), qtype).scale.item() == SMALLEST_NORMAL
    assert choose_qparams(single(2.0), single(2.0), qtype).scale.item() == 2.0 / -qtype.qmin
    assert choose_qparams(single(-2.0), single(-2.0), qtype).scale.item() == 2.0 / -qtype.qmin
    assert choose_qparams(single(-LARGEST_FLOAT32), single(1.0), qtype).scale.item() == LARGEST_FLOAT32 / -qtype.qmin


def affine_reference(low: float, high: float, qtype: QType) -> tuple[Fraction, int]:
    """Scale and zero point in exact steps: span and quotient in float64, everything after in float32."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Fraction(1), qtype.qmin
    scale = max(float32_exact(Fraction((high - low) / (qtype.qmax - qtype.qmin))), Fraction(SMALLEST_NORMAL))
    offset = float32_exact(qtype.qmin - float32_exact(Fraction(low) / scale))
    return scale, saturate_exact(round(offset), qtype)


@pytest.mark.parametrize("qtype", AFFINE, ids=str)
@given(low=floats32(), high=floats32())
@exact()
def test_affine_parameters_follow_the_formula(qtype: QType, low: float, high: float) -> None:
    low, high = sorted((low, high))
    qparams = choose_qparams(single(low), single(high), qtype, scheme=Scheme.AFFINE)
    scale, zero_point = affine_reference(low, high, qtype)
    assert fractions(qparams.scale) == [scale]
    assert qparams.zero_points().item() == zero_point
    assert qparams.zero_points().dtype is torch.int64


@pytest.mark.parametrize("qtype", [qint8, quint8, qint16], ids=str)
@given(low=st.floats(-1e6, 1e6, width=32), high=st.floats(-1e6, 1e6, width=32))
@exact()
def test_affine_range_is_covered(qtype: QType, low: float, high: float) -> None:
    """Real zero has a code, and both ends lie within half a step of one (plus float32 error: 2**-6 of a step)."""
    low, high = sorted((low, high))
    qparams = choose_qparams(single(low), single(high), qtype, scheme=Scheme.AFFINE)
    ends = single([low, high, 0.0])
    error = (dequantize(quantize(ends, qparams), qparams) - ends).double().abs()
    assert error[2] == 0
    assert bool((error <= (0.5 + 2**-6) * qparams.scale.double()).all())


@pytest.mark.parametrize(
    ("low", "high", "qtype", "scale", "zero_point"),
    [
        (0.0, 255.0, quint8, 1.0, 0),
        (-255.0, 0.0, quint8, 1.0, 255),
        (-128.0, 127.0, qint8, 1.0, 0),
        (0.0, 255.0, qint8, 1.0, -128),
        (-255.0, 0.0, qint8, 1.0, 127),
        (3.0, 510.0, quint8, 2.0, 0),
        (-510.0, -3.0, quint8, 2.0, 255),
        (5.0, 5.0, quint8, single(5 / 255).item(), 0),
        (0.0, 0.0, quint8, 1.0, 0),
        (0.0, 0.0, qint8, 1.0, -128),
        (0.0, SMALLEST_SUBNORMAL, qint8, SMALLEST_NORMAL, -128),
        (-LARGEST_FLOAT32, LARGEST_FLOAT32, QType(2), single(LARGEST_FLOAT32 / 1.5).item(), 0),
    ],
)
def test_affine_examples(low: float, high: float, qtype: QType, scale: float, zero_point: int) -> None:
    qparams = choose_qparams(single(low), single(high), qtype, scheme=Scheme.AFFINE)
    assert (qparams.scale.item(), qparams.zero_points().item()) == (scale, zero_point)


@pytest.mark.parametrize("qtype", AFFINE, ids=str)
def test_the_widest_affine_range_has_a_finite_scale(qtype: QType) -> None:
    qparams = choose_qparams(single(-LARGEST_FLOAT32), single(LARGEST_FLOAT32), qtype, scheme=Scheme.AFFINE)
    assert bool(torch.isfinite(qparams.scale))
    ends = single([-LARGEST_FLOAT32, 0.0])
    steps = quantize(ends, qparams).double() - qparams.zero_points()
    error = (steps * qparams.scale.double() - ends.double()).abs()
    assert error[1] == 0
    assert error[0] <= (0.5 + 2**-6) * qparams.scale.double()


def test_affine_32_bit_formats_are_refused() -> None:
    with pytest.raises(QuantizationError):
        choose_qparams(single(-1.0), single(0.0), qint32, scheme=Scheme.AFFINE)


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_ranges_that_are_not_finite_are_refused(scheme: Scheme, bad: float, where: int) -> None:
    bounds = [single([-1.0, -1.0]), single([1.0, 1.0])]
    bounds[where][1] = bad
    with pytest.raises(QuantizationError, match="not finite"):
        choose_qparams(*bounds, qint8, scheme=scheme, axis=0)


def test_a_float64_range_beyond_float32_is_refused() -> None:
    with pytest.raises(QuantizationError, match="not finite"):
        choose_qparams(torch.tensor(0.0), torch.tensor(1e39, dtype=torch.float64), qint8)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_range_upside_down_is_refused(scheme: Scheme) -> None:
    with pytest.raises(QuantizationError, match="minimum above its maximum"):
        choose_qparams(single([0.0, 1.0]), single([1.0, 0.5]), qint8, scheme=scheme, axis=0)


def test_unsigned_symmetric_is_refused() -> None:
    with pytest.raises(QuantizationError, match="need a signed format, not uint8"):
        choose_qparams(single(0.0), single(1.0), quint8)


@pytest.mark.parametrize(("bound", "axis"), [(single(1.0), 0), (single([1.0, 2.0]), None)])
def test_ranges_must_go_with_the_axis(bound: torch.Tensor, axis: int | None) -> None:
    with pytest.raises(QuantizationError, match="does not go with axis"):
        choose_qparams(-bound, bound, qint8, axis=axis)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_per_channel_is_slice_by_slice(scheme: Scheme) -> None:
    low = single([-1.0, 0.0, 0.0, -3.0, 2.0, -1e-42, -LARGEST_FLOAT32])
    high = single([0.5, 0.0, 7.0, -1.0, 2.0, 0.0, LARGEST_FLOAT32])
    qparams = choose_qparams(low, high, qint8, scheme=scheme, axis=2)
    slices = [choose_qparams(*bounds, qint8, scheme=scheme) for bounds in zip(low, high, strict=True)]
    assert qparams.axis == 2
    assert qparams.scale.tolist() == [one.scale.item() for one in slices]
    assert qparams.zero_points().tolist() == [one.zero_points().item() for one in slices]
    assert qparams.scale[1] == 1.0


def test_parameters_do_not_require_gradients() -> None:
    bound = torch.tensor(1.0, requires_grad=True)
    for scheme in Scheme:
        assert not choose_qparams(-bound, bound, qint8, scheme=scheme).scale.requires_grad


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 2.0**-20, SMALLEST_NORMAL, LARGEST_FLOAT32])
def test_fixed_scale_is_the_nearest_float32(scale: float) -> None:
    qparams = qparams_from_scale(scale, qint8)
    assert fractions(qparams.scale) == [float32_exact(Fraction(scale))]
    assert (qparams.qtype, qparams.symmetric, qparams.axis) == (qint8, True, None)


@pytest.mark.parametrize("scale", [*UNUSABLE, 1e-60, 1e60])
def test_unusable_fixed_scales_are_refused(scale: float) -> None:
    with pytest.raises(UserError):
        qparams_from_scale(scale, qint8)
