"""Borders between real numbers and codes: exact references, the integer round trip, torch's own ops as a peer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError
from qgraph.numerics import (
    QParams,
    QType,
    bias_codes,
    dequantize,
    fake_quantize,
    qint4,
    qint8,
    qint16,
    qint32,
    quantize,
    quint8,
)
from tests.numerics.exact import (
    LARGEST_FLOAT32,
    SMALLEST_NORMAL,
    SMALLEST_SUBNORMAL,
    bits_equal,
    double,
    exact,
    float32_exact,
    floats32,
    fractions,
    integers,
    long,
    saturate_exact,
    scales,
    single,
)

FORMATS = [QType(2), qint4, qint8, quint8, qint16, QType(16, signed=False), QType(24), QType(25), QType(31), qint32]
NARROW = [qtype for qtype in FORMATS if qtype.bits <= 24]
SCALES = [1.0, 0.1, 1 / 3, 2.0**-7, 12.345, 3e-20, 7e20, SMALLEST_NORMAL, LARGEST_FLOAT32 / 128]


def hard_inputs(qparams: QParams, count: int = 512) -> torch.Tensor:
    """Flat float32 values for one scale: ties, their neighbours, bounds, noise on and off the grid, extremes."""
    scale, qtype = qparams.scale.flatten()[:1], qparams.qtype
    anchors = torch.tensor([0, qtype.qmin, qtype.qmax], dtype=torch.float64).repeat_interleave(41)
    steps = (anchors + torch.arange(-10, 10.5, 0.5, dtype=torch.float64).repeat(3)).to(torch.float32)
    ties = steps * scale
    around = [torch.nextafter(ties, torch.full_like(ties, bound)) for bound in (-math.inf, math.inf)]
    noise = [torch.randn(count) * scale * spread for spread in (1.0, float(qtype.qmax), 3.0 * qtype.qmax)]
    edges = [0.0, -0.0, LARGEST_FLOAT32, -LARGEST_FLOAT32, math.inf, -math.inf]
    tiny = [SMALLEST_SUBNORMAL, -SMALLEST_SUBNORMAL, SMALLEST_NORMAL, -SMALLEST_NORMAL]
    values = torch.cat([ties, *around, *noise, torch.randn(count), single(edges), single(tiny)])
    return values[~values.isnan()]


def affine(qtype: QType, scale: float) -> QParams:
    return QParams(single(scale), qtype, long(qtype.qmin + (qtype.qmax - qtype.qmin) // 3))


def random_per_channel(qtype: QType, channels: int, axis: int, *, symmetric: bool) -> QParams:
    scale = torch.rand(channels) + 0.01
    zero_point = None if symmetric else torch.randint(qtype.qmin, qtype.qmax + 1, (channels,))
    return QParams(scale, qtype, zero_point, axis)


def quantize_exact(value: Fraction, scale: Fraction, zero_point: int, qtype: QType) -> int:
    """docs/arithmetic.md section 3, with the zero point added in float32."""
    steps = round(float32_exact(value * float32_exact(1 / scale)))
    return saturate_exact(int(float32_exact(steps + zero_point)), qtype)


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=8), data=st.data())
@exact()
def test_codes_follow_the_formula(qtype: QType, values: list[float], data: st.DataObject) -> None:
    scale = data.draw(st.floats(2.0**-40, 2.0**40, width=32))
    zero_point = data.draw(st.integers(qtype.qmin, qtype.qmax)) if qtype.bits <= 24 else 0
    result = quantize(single(values), QParams(single(scale), qtype, long(zero_point)))
    assert result.dtype is qtype.storage
    expected = [quantize_exact(Fraction(value), Fraction(scale), zero_point, qtype) for value in values]
    assert result.tolist() == expected


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@given(data=st.data(), scale=st.floats(2.0**-60, 2.0**60, width=32))
@exact()
def test_reals_follow_the_formula(qtype: QType, data: st.DataObject, scale: float) -> None:
    codes = data.draw(st.lists(st.integers(qtype.qmin, qtype.qmax), min_size=1, max_size=8))
    zero_point = data.draw(st.integers(qtype.qmin, qtype.qmax)) if qtype.bits <= 24 else 0
    qparams = QParams(single(scale), qtype, long(zero_point))
    result = dequantize(torch.tensor(codes, dtype=qtype.storage), qparams)
    assert result.dtype is torch.float32
    expected = [float32_exact(float32_exact(code - zero_point) * Fraction(scale)) for code in codes]
    assert fractions(result) == expected


@pytest.mark.parametrize("qtype", [qint4, qint8, quint8, qint16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_every_code_survives_the_round_trip(qtype: QType, scale: float) -> None:
    codes = torch.arange(qtype.qmin, qtype.qmax + 1, dtype=torch.int64).to(qtype.storage)
    for qparams in (QParams(single(scale), qtype), affine(qtype, scale)):
        reals = dequantize(codes, qparams)
        finite = torch.isfinite(reals)
        assert torch.equal(quantize(reals, qparams)[finite], codes[finite])


def test_ties_go_to_even_codes() -> None:
    values = single([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, -127.5, -128.5, -129.5])
    expected = [-2, -2, 0, 0, 2, 2, 126, 127, -128, -128, -128]
    assert quantize(values, QParams(single(1.0), qint8)).tolist() == expected


@pytest.mark.parametrize("qtype", [*FORMATS, QType(32, signed=False)], ids=str)
def test_nothing_wraps(qtype: QType) -> None:
    values = single([1e30, -1e30, math.inf, -math.inf, LARGEST_FLOAT32, -LARGEST_FLOAT32, 2.0**62, -(2.0**62)])
    assert quantize(values, QParams(single(0.01), qtype)).tolist() == [qtype.qmax, qtype.qmin] * 4


@pytest.mark.parametrize("bits", [33, 40, 48, 64])
def test_formats_wider_than_32_bits_are_refused(bits: int) -> None:
    with pytest.raises(QuantizationError, match="not quantized"):
        quantize(single([1.0]), QParams(single(1.0), QType(bits)))


def test_what_is_no_number_becomes_zero() -> None:
    assert quantize(single([math.nan, 1.0]), QParams(single(0.5), qint8)).tolist() == [0, 2]
    assert quantize(single([math.nan]), QParams(single(0.5), qint8, long(7))).tolist() == [7]


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_fake_quantization_is_the_round_trip(qtype: QType, scale: float) -> None:
    qparams = QParams(single(scale), qtype)
    values = hard_inputs(qparams)
    assert torch.equal(fake_quantize(values, qparams), dequantize(quantize(values, qparams), qparams))


def test_fake_quantization_is_the_round_trip_in_its_sign_of_zero() -> None:
    """Codes have one zero; -0.0 would be seen by a following reciprocal."""
    values = single([-0.01, -0.0, -0.05, 0.0, 0.01])
    for qparams in (QParams(single(0.1), qint8), QParams(single([0.1] * 5), qint8, axis=0)):
        assert bits_equal(fake_quantize(values, qparams), dequantize(quantize(values, qparams), qparams))


@pytest.mark.parametrize("qtype", NARROW, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_affine_fake_quantization_is_the_round_trip(qtype: QType, scale: float) -> None:
    for zero_point in (qtype.qmin, qtype.qmax, affine(qtype, scale).zero_points().item()):
        qparams = QParams(single(scale), qtype, long(int(zero_point)))
        values = hard_inputs(qparams)
        assert torch.equal(fake_quantize(values, qparams), dequantize(quantize(values, qparams), qparams))


@pytest.mark.parametrize("bits", [25, 32])
def test_zero_points_of_wide_formats_are_refused(bits: int) -> None:
    """Fake quantization subtracts the zero point in float32, which holds 24 bits."""
    with pytest.raises(QuantizationError, match="zero points are not available"):
        QParams(single(1.0), QType(bits), long(64))
    assert QParams(single(1.0), QType(bits), long(0)).symmetric


@pytest.mark.parametrize("qtype", NARROW, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_slice_by_slice(qtype: QType, symmetric: bool, axis: int) -> None:
    values = torch.randn(4, 5, 6) * qtype.qmax
    qparams = random_per_channel(qtype, values.shape[axis], axis, symmetric=symmetric)
    codes, fake = quantize(values, qparams), fake_quantize(values, qparams)
    assert torch.equal(fake, dequantize(codes, qparams))
    for index in range(values.shape[axis]):
        zero_point = None if symmetric else qparams.zero_points()[index]
        one = QParams(qparams.scale[index], qtype, zero_point)
        part = values.select(axis, index)
        assert torch.equal(codes.select(axis, index), quantize(part, one))
        assert torch.equal(fake.select(axis, index), fake_quantize(part, one))


@given(values=st.lists(floats32(), min_size=1, max_size=16), scale=scales(), data=st.data())
@exact(100)
def test_fake_quantization_is_the_round_trip_of_anything(
    values: list[float], scale: float, data: st.DataObject
) -> None:
    qtype = data.draw(st.sampled_from(NARROW))
    zero_point = data.draw(st.none() | st.integers(qtype.qmin, qtype.qmax).map(long))
    qparams = QParams(single(scale), qtype, zero_point)
    assert torch.equal(fake_quantize(single(values), qparams), dequantize(quantize(single(values), qparams), qparams))


def stock_fake_quantize(values: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """torch's own operator with the same parameters."""
    bounds = (qparams.qtype.qmin, qparams.qtype.qmax)
    if qparams.axis is None:
        scale, zero_point = qparams.scale.item(), int(qparams.zero_points())
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *bounds)
    zero_points = qparams.zero_points().to(torch.int32)
    return torch.fake_quantize_per_channel_affine(values, qparams.scale, zero_points, qparams.axis, *bounds)


def peer_cases() -> list[QParams]:
    generator = torch.Generator().manual_seed(1)
    cases = []
    for qtype in (qint4, qint8, quint8, qint16):
        for scale in (1.0, 0.1, 1 / 3, 2.0**-7, 12.345):
            cases += [QParams(single(scale), qtype), affine(qtype, scale)]
        scale = torch.rand(6, generator=generator) + 0.01
        zero_point = torch.randint(qtype.qmin, qtype.qmax + 1, (6,), generator=generator)
        cases += [QParams(scale, qtype, axis=1), QParams(scale, qtype, zero_point, axis=1)]
    return cases


@pytest.mark.parametrize("qparams", peer_cases(), ids=str)
def test_values_and_gradients_equal_the_stock_operator(qparams: QParams) -> None:
    flat = hard_inputs(qparams)
    flat = flat[flat.abs() < 2.0**40]  # the stock kernel goes through int64
    values = flat[: len(flat) // 6 * 6].reshape(-1, 6)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    upstream = torch.randn_like(values)
    result, stock = fake_quantize(ours, qparams), stock_fake_quantize(theirs, qparams)
    result.backward(upstream)
    stock.backward(upstream)
    assert torch.equal(result, stock)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert bool((ours.grad == 0).any()), "some values are clipped"
    assert bool((ours.grad != 0).any()), "some values are not"


@pytest.mark.parametrize("zero_point", [None, 5])
def test_gradient_at_the_bounds(zero_point: int | None) -> None:
    """-128.5 and 127.4 round to codes and pass; -128.6 and 127.5 (a tie to 128) do not."""
    steps = single([-300.0, -128.6, -128.5, -128.4, -128.0, -127.0, 0.0, 127.0, 127.4, 127.5, 128.0, 300.0])
    values = (steps - (zero_point or 0)).requires_grad_()
    fake_quantize(values, QParams(single(1.0), qint8, None if zero_point is None else long(zero_point))).backward(
        torch.arange(1.0, 13.0)
    )
    assert values.grad is not None
    if zero_point is None:
        assert values.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    else:  # an odd zero point moves ties: -133.5 rounds to -134, 122.5 to 122
        assert values.grad.tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 9, 10, 0, 0]


def test_gradient_without_clipping_is_the_upstream_one() -> None:
    values, upstream = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    fake_quantize(values, QParams(single(0.1), qint8)).backward(upstream)
    assert values.grad is not None
    assert torch.equal(values.grad, upstream)


def test_gradient_of_infinities_and_nan_is_zero() -> None:
    values = single([math.nan, math.inf, -math.inf, 1.0]).requires_grad_()
    fake_quantize(values, QParams(single(0.1), qint8)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 0, 1]


def test_parameters_receive_no_gradient() -> None:
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(torch.randn(4).requires_grad_(), QParams(scale, qint8)).sum().backward()
    assert scale.grad is None


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    qparams = QParams(single(0.1), qint8)
    assert not fake_quantize(torch.randn(4), qparams).requires_grad
    with torch.no_grad():
        assert not fake_quantize(torch.randn(4).requires_grad_(), qparams).requires_grad


@pytest.mark.parametrize("qparams", [QParams(single(0.1), qint8), affine(quint8, 0.1)], ids=str)
def test_nan_stays_nan(qparams: QParams) -> None:
    result = fake_quantize(single([1.0, math.nan, -1.0]), qparams)
    assert result.isnan().tolist() == [False, True, False]
    clean = fake_quantize(single([1.0, -1.0]), qparams)
    assert torch.equal(result[[0, 2]], clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_other_float_dtypes(dtype: torch.dtype, per_channel: bool) -> None:
    qparams = QParams(single([0.1, 0.3]) if per_channel else single(0.1), qint8, axis=1 if per_channel else None)
    values = (torch.randn(64, 2) * 5).to(dtype)
    expected = dequantize(quantize(values, qparams), qparams)
    result = fake_quantize(values, qparams)
    assert result.dtype is torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_quantize_of_other_float_dtypes_is_that_of_float32(dtype: torch.dtype) -> None:
    values, qparams = (torch.randn(64) * 5).to(dtype), QParams(single(0.1), qint8)
    assert torch.equal(quantize(values, qparams), quantize(values.to(torch.float32), qparams))


def test_inputs_are_left_alone() -> None:
    values, qparams = single([0.26, -300.0, 7.0]), affine(qint8, 0.1)
    kept = values.clone()
    fake_quantize(values, qparams)
    codes = quantize(values, qparams)
    assert torch.equal(values, kept)
    dequantize(codes, qparams)
    assert torch.equal(codes, quantize(kept, qparams))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 3, 4)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_nothing_in_nothing_out(shape: tuple[int, ...], per_channel: bool) -> None:
    scale = torch.ones(shape[-1]) if per_channel else single(0.1)
    qparams = QParams(scale, qint8, axis=-1 if per_channel else None)
    values = torch.empty(shape, requires_grad=True)
    codes, fake = quantize(values.detach(), qparams), fake_quantize(values, qparams)
    fake.sum().backward()
    assert codes.shape == fake.shape == dequantize(codes, qparams).shape == shape
    assert values.grad is not None
    assert values.grad.shape == shape


def test_one_number() -> None:
    qparams = QParams(single(0.5), qint8)
    assert quantize(single(1.3), qparams).shape == ()
    assert fake_quantize(single(1.3), qparams).item() == 1.5


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_memory_layout_does_not_matter(layout: str, per_channel: bool, symmetric: bool) -> None:
    values = LAYOUTS[layout](torch.randn(2, 3, 4, 5) * 50)
    assert not values.is_contiguous()
    qparams = random_per_channel(qint8, 3, 1, symmetric=symmetric) if per_channel else affine(qint8, 0.3)
    plain = values.clone(memory_format=torch.contiguous_format)
    assert torch.equal(quantize(values, qparams), quantize(plain, qparams))
    fake = fake_quantize(values, qparams)
    assert torch.equal(fake, fake_quantize(plain, qparams))
    ours, theirs = values.detach().requires_grad_(), plain.requires_grad_()
    fake_quantize(ours, qparams).sum().backward()
    fake_quantize(theirs, qparams).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_channels_last_is_kept() -> None:
    values = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for qparams in (affine(qint8, 0.3), random_per_channel(qint8, 3, 1, symmetric=False)):
        assert fake_quantize(values, qparams).is_contiguous(memory_format=torch.channels_last)
        assert quantize(values, qparams).is_contiguous(memory_format=torch.channels_last)


def bias_reference(bias: float, step: float) -> int:
    """docs/arithmetic.md section 5: the quotient in float64, then half to even, then saturated to 32 bits."""
    return saturate_exact(round(bias / step), qint32)


@given(biases=st.lists(floats32(), min_size=1, max_size=8), step=st.floats(1e-20, 1e10))
@exact(100)
def test_bias_codes_follow_the_formula(biases: list[float], step: float) -> None:
    result = bias_codes(single(biases), double(step))
    assert result.dtype is torch.float64
    assert integers(result) == [bias_reference(bias, step) for bias in biases]


def test_bias_codes_round_to_even_and_saturate() -> None:
    bias = single([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31 - 128, 2.0**31, 1e30, -(2.0**31), -1e30])
    expected = [0, 2, 2, 0, -2, 2**31 - 128, 2**31 - 1, 2**31 - 1, -(2**31), -(2**31)]
    assert integers(bias_codes(bias, double(1.0))) == expected


def test_bias_codes_divide() -> None:
    """A product with `1 / step` misses ties: 73.5 * (1 / 49) is below 1.5."""
    halves = list(range(-9, 10, 2))
    for step in range(1, 100):
        bias = single([half * step / 2 for half in halves])
        assert integers(bias_codes(bias, double(step))) == [round(Fraction(half, 2)) for half in halves]


def test_bias_codes_per_channel() -> None:
    bias, step = single([0.3, -0.7, 1.0]), double([0.001, 0.002, 3.0])
    expected = [bias_reference(*pair) for pair in zip(bias.tolist(), step.tolist(), strict=True)]
    assert integers(bias_codes(bias, step)) == expected
