"""Fake quantization: equal to the integer round trip, straight-through gradients, states, saved scales."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from qgraph.errors import QuantizationError, StateError
from qgraph.numerics import QParams, QType, dequantize, qint8, qint16, quantize
from qgraph.quantization import FakeQuantize, FakeQuantState, MinMaxObserver, MovingAverageMinMaxObserver
from qgraph.quantization.fake_quantize import BiasFakeQuantize, WeightFakeQuantize

FORMATS = [qint8, qint16]


def calibrated(
    qtype: QType = qint8, *, axis: int = -1, data: torch.Tensor | None = None, weight: bool = False
) -> FakeQuantize:
    """A site that has seen data, in state VALIDATION."""
    module = (WeightFakeQuantize if weight else FakeQuantize)("site", qtype, MinMaxObserver(axis))
    module.state = FakeQuantState.CALIBRATION
    module(torch.randn(4, 3, 5) if data is None else data)
    module.settle()
    module.state = FakeQuantState.VALIDATION
    return module


def special(values: torch.Tensor) -> torch.Tensor:
    """The values, with ties, ends, zeros of both signs and infinities among them."""
    flat = values.clone().flatten()
    flat[:8] = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, 1e-40, -1e-40])
    return flat.reshape(values.shape)


# --- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
def test_equals_the_integer_round_trip(qtype: QType, axis: int) -> None:
    module = calibrated(qtype, axis=axis)
    values = special(torch.randn(4, 3, 5) * 2)
    expected = dequantize(quantize(values, module.qparams()), module.qparams())
    assert torch.equal(module(values), expected)


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
def test_ties_and_ends(qtype: QType) -> None:
    module = FakeQuantize("site", qtype, None, fixed_scale=0.25)
    module.state = FakeQuantState.VALIDATION
    codes = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, qtype.qmax + 0.5, qtype.qmin - 0.5, qtype.qmax, qtype.qmin])
    expected = torch.tensor([0, 2, 2, 0, -2, qtype.qmax, qtype.qmin, qtype.qmax, qtype.qmin])
    assert torch.equal(module(codes * 0.25), expected * 0.25)


def test_rounding_twice_is_rounding_once() -> None:
    module = calibrated()
    once = module(torch.randn(4, 3, 5))
    assert torch.equal(module(once), once)


def test_nan_stays_visible() -> None:
    values = torch.randn(4, 3, 5)
    values[1, 1, 1] = math.nan
    assert torch.equal(calibrated()(values).isnan(), values.isnan())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "empty", "scalar"])
def test_shapes_and_layouts(layout: str) -> None:
    module = calibrated()
    values = {
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 4).t(),
        "empty": torch.randn(0, 4),
        "scalar": torch.tensor(0.7),
    }[layout]
    result = module(values)
    assert result.shape == values.shape
    assert torch.equal(result, dequantize(quantize(values, module.qparams()), module.qparams()))


def test_the_input_is_not_written_to() -> None:
    module = calibrated()
    values = torch.randn(3, 4)
    kept = values.clone()
    module(values)
    assert torch.equal(values, kept)


# --- backward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", FORMATS, ids=str)
@pytest.mark.parametrize("axis", [-1, 1])
def test_gradient_passes_where_nothing_was_clipped(qtype: QType, axis: int) -> None:
    module = calibrated(qtype, axis=axis)
    values = (torch.randn(4, 3, 5) * 2).requires_grad_()
    incoming = torch.randn(4, 3, 5)
    module(values).backward(incoming)
    qparams = module.qparams()
    codes = torch.round(values.detach() * qparams.shaped(1.0 / qparams.scale, 3))
    inside = (codes >= qtype.qmin) & (codes <= qtype.qmax)
    assert not inside.all(), "the test clips something"
    assert torch.equal(values.grad, incoming * inside)


def test_gradient_at_the_ends() -> None:
    module = FakeQuantize("site", qint8, None, fixed_scale=1.0)
    module.state = FakeQuantState.VALIDATION
    values = torch.tensor([127.0, 127.4, 127.6, -128.0, -128.4, -128.6, 0.0], requires_grad=True)
    module(values).sum().backward()
    assert values.grad.tolist() == [1, 1, 0, 1, 1, 0, 1]


def test_the_scale_gets_no_gradient_and_calibration_is_transparent() -> None:
    module = FakeQuantize("site", qint8, MinMaxObserver())
    assert list(module.parameters()) == []
    module.state = FakeQuantState.CALIBRATION
    values = torch.randn(3, requires_grad=True)
    assert module(values) is values


# --- states --------------------------------------------------------------------------------------------------------


def test_float_sees_nothing() -> None:
    module = FakeQuantize("site", qint8, MinMaxObserver())
    values = torch.randn(4)
    assert module(values) is values
    assert not module.observer.observed


def test_calibration_observes_and_passes() -> None:
    module = FakeQuantize("site", qint8, MinMaxObserver())
    module.state = FakeQuantState.CALIBRATION
    values = torch.randn(4)
    assert module(values) is values
    assert module.observer.max_val == values.max()
    assert not module.has_scale, "the scale is computed at the end"


def test_qat_follows_the_data() -> None:
    module = FakeQuantize("site", qint8, MovingAverageMinMaxObserver(0.5))
    module.state = FakeQuantState.QAT
    low = high = None
    for step in range(4):
        values = torch.randn(20) * (step + 1)
        low = values.min() if low is None else low + 0.5 * (values.min() - low)
        high = values.max() if high is None else high + 0.5 * (values.max() - high)
        qparams = QParams(torch.maximum(low.abs(), high.abs()) / 128, qint8)
        assert torch.equal(module(values), dequantize(quantize(values, qparams), qparams))


def test_validation_keeps_the_scale() -> None:
    module = calibrated()
    scale = module.scale.clone()
    module(torch.randn(4, 3, 5) * 100)
    assert torch.equal(module.scale, scale)


@pytest.mark.parametrize("state", list(FakeQuantState), ids=str)
def test_a_fixed_scale_stays(state: FakeQuantState) -> None:
    module = FakeQuantize("site", qint8, None, fixed_scale=0.5)
    module.state = state
    values = torch.tensor([0.3, 100.0])
    rounds = state in (FakeQuantState.QAT, FakeQuantState.VALIDATION)
    assert module(values).tolist() == ([0.5, 63.5] if rounds else values.tolist())
    module.settle()
    assert module.scale == 0.5


def test_a_weight_is_looked_at_anew_in_training() -> None:
    module = WeightFakeQuantize("w", qint8, MinMaxObserver(0))
    module.state = FakeQuantState.QAT
    for factor in (4.0, 1.0):
        weight = torch.randn(3, 5) * factor
        module(weight)
        assert torch.equal(module.scale, weight.abs().amax(1) / 128), "earlier weights do not widen the range"


def test_a_weight_is_looked_at_once_in_calibration() -> None:
    module = WeightFakeQuantize("w", qint8, MinMaxObserver(0))
    module.state = FakeQuantState.CALIBRATION
    weight = torch.randn(3, 5)
    assert module(weight) is weight
    module(weight * 2)
    assert torch.equal(module.observer.max_val, weight.amax(1))


# --- wrong use -----------------------------------------------------------------------------------------------------


def test_neither_observer_nor_scale() -> None:
    with pytest.raises(QuantizationError, match="site conv1 has neither an observer nor a fixed scale"):
        FakeQuantize("conv1", qint8, None)


def test_validation_before_data() -> None:
    module = FakeQuantize("conv1", qint8, MinMaxObserver())
    module.state = FakeQuantState.VALIDATION
    with pytest.raises(StateError, match="site conv1 has no scale yet") as caught:
        module(torch.randn(3))
    assert "calibrate" in str(caught.value)


@pytest.mark.parametrize("state", [FakeQuantState.CALIBRATION, FakeQuantState.QAT], ids=str)
def test_values_that_are_no_numbers_name_the_site(state: FakeQuantState) -> None:
    module = FakeQuantize("conv1", qint8, MinMaxObserver())
    module.state = state
    with pytest.raises(QuantizationError, match="site conv1"):
        observe(module, torch.tensor([1.0, math.nan]))


def observe(module: FakeQuantize, values: torch.Tensor) -> None:
    module(values)
    module.settle()


# --- bias ----------------------------------------------------------------------------------------------------------


def test_a_bias_is_rounded_to_the_accumulator() -> None:
    module = BiasFakeQuantize("conv.bias")
    bias, step = torch.randn(5), torch.rand(5, dtype=torch.float64) * 1e-3
    module.step = step
    for state in FakeQuantState:
        module.state = state
        rounded = (torch.round(bias.double() / step) * step).float()
        assert torch.equal(module(bias), rounded if state is FakeQuantState.VALIDATION else bias)


def test_a_bias_saturates_at_32_bits() -> None:
    module = BiasFakeQuantize("conv.bias")
    module.state = FakeQuantState.VALIDATION
    module.step = torch.tensor(1e-9, dtype=torch.float64)
    expected = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.float64) * 1e-9
    assert torch.equal(module(torch.tensor([1e3, -1e3])), expected.float())


# --- copies and saved scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0])
def test_copies_and_saved_scales_compute_alike(axis: int) -> None:
    source = calibrated(axis=axis)
    values = torch.randn(4, 3, 5) * 3
    loaded = FakeQuantize("site", qint8, MinMaxObserver(axis))
    loaded.load_state_dict(source.state_dict())
    loaded.state = FakeQuantState.VALIDATION
    for other in (loaded, copy.deepcopy(source)):
        assert torch.equal(other(values), source(values))
        assert other.scale is not source.scale


def test_loading_replaces_a_scale_in_use() -> None:
    first, second = calibrated(), calibrated(data=torch.randn(4, 3, 5) * 7)
    values = torch.randn(3)
    first(values)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(values), second(values))


def test_a_saved_scale_does_not_replace_a_fixed_one() -> None:
    module = nn.Sequential(FakeQuantize("stub", qint8, None, fixed_scale=0.5))
    other = nn.Sequential(FakeQuantize("stub", qint8, None, fixed_scale=0.25))
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    with pytest.raises(StateError, match=r"fixed scale of 0\.5") as caught:
        module.load_state_dict(other.state_dict())
    assert "site stub" in str(caught.value)


def test_the_scale_moves_with_the_module() -> None:
    module = calibrated()
    values = torch.randn(4, 3, 5)
    expected = module(values)
    before = module.scale
    module._apply(torch.clone)  # what moving to another device does
    assert module.scale is not before
    assert module.qparams().scale is module.scale
    assert torch.equal(module(values), expected)
