"""Observers: ranges against plain torch, what cannot be observed, names, saved ranges."""

from __future__ import annotations

import math

import pytest
import torch

from qgraph.errors import QuantizationError
from qgraph.numerics import qint8, qint16
from qgraph.quantization import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    Observer,
    PerChannelMinMaxObserver,
)
from qgraph.quantization.observers import OBSERVERS, make_observer, observer_name

ALL = [
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
]


def batches(*shape: int, count: int = 5) -> list[torch.Tensor]:
    return [torch.randn(shape) * (1 + step) - 0.3 * step for step in range(count)]


def observe(observer: Observer, data: list[torch.Tensor]) -> Observer:
    for values in data:
        assert observer(values) is values, "values pass unchanged"
    return observer


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4, 5), (1, 2, 3, 2, 2)], ids=str)
def test_min_max_is_that_of_all_data(shape: tuple[int, ...]) -> None:
    data = batches(*shape)
    observer = observe(MinMaxObserver(), data)
    everything = torch.stack(data)
    assert observer.min_val.shape == ()
    assert observer.min_val == everything.min()
    assert observer.max_val == everything.max()


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_min_max_per_channel(axis: int) -> None:
    data = batches(2, 3, 4, 5)
    observer = observe(PerChannelMinMaxObserver(axis), data)
    for index in range(data[0].shape[axis]):
        part = torch.stack([values.select(axis, index) for values in data])
        assert observer.min_val[index] == part.min()
        assert observer.max_val[index] == part.max()


def test_a_vector_has_one_range_per_entry() -> None:
    data = batches(6)
    observer = observe(PerChannelMinMaxObserver(), data)
    assert torch.equal(observer.min_val, torch.stack(data).amin(0))
    assert torch.equal(observer.max_val, torch.stack(data).amax(0))


@pytest.mark.parametrize("constant", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("per_channel", [False, True])
def test_moving_average(constant: float, per_channel: bool) -> None:
    data = batches(3, 8)
    dims = (1,) if per_channel else (0, 1)
    low, high = data[0].amin(dims), data[0].amax(dims)
    for values in data[1:]:
        low = low + constant * (values.amin(dims) - low)
        high = high + constant * (values.amax(dims) - high)
    kind = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
    observer = observe(kind(constant), data)
    assert torch.equal(observer.min_val, low)
    assert torch.equal(observer.max_val, high)


def test_averaging_constant_zero_keeps_the_first_range_and_one_the_last() -> None:
    data = batches(4)
    assert observe(MovingAverageMinMaxObserver(0.0), data).max_val == data[0].max()
    last = observe(MovingAverageMinMaxObserver(1.0), data)
    torch.testing.assert_close(last.max_val, data[-1].max(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [-0.1, 1.1, math.nan])
def test_averaging_constant_out_of_range(constant: float) -> None:
    with pytest.raises(QuantizationError, match="averaging_constant"):
        MovingAverageMinMaxObserver(constant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_ranges_are_float32_whatever_the_data(dtype: torch.dtype) -> None:
    values = torch.randn(50, dtype=dtype)
    observer = observe(MinMaxObserver(), [values])
    assert observer.min_val.dtype is torch.float32
    assert observer.min_val == values.min().to(torch.float32)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_layout_does_not_matter(axis: int) -> None:
    values = torch.randn(2, 3, 4, 5)
    layouts = [
        values.contiguous(memory_format=torch.channels_last),
        values.transpose(1, 3).contiguous().transpose(1, 3),
        torch.cat([values, values], 3)[..., :5],
    ]
    expected = observe(MinMaxObserver(axis), [values])
    for layout in layouts:
        found = observe(MinMaxObserver(axis), [layout])
        assert torch.equal(found.min_val, expected.min_val)
        assert torch.equal(found.max_val, expected.max_val)


def test_observing_keeps_no_graph_and_no_data() -> None:
    values = torch.randn(1000, requires_grad=True)
    observer = observe(MinMaxObserver(), [values * 2])
    assert not observer.min_val.requires_grad
    assert observer.min_val.untyped_storage().nbytes() == 4


# --- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", [qint8, qint16], ids=str)
@pytest.mark.parametrize("axis", [-1, 0])
def test_scales(qtype: object, axis: int) -> None:
    data = batches(3, 10)
    qparams = observe(MinMaxObserver(axis), data).qparams(qtype)
    everything = torch.stack(data)
    reach = everything.abs().amax((0, 2)) if axis == 0 else everything.abs().max()
    assert torch.equal(qparams.scale, reach / (128 if qtype == qint8 else 32768))
    assert qparams.axis == (0 if axis == 0 else None)


@pytest.mark.parametrize("kind", ALL)
def test_no_data_no_scale(kind: type[Observer]) -> None:
    observer = kind()
    observer(torch.zeros(0, 4))
    assert not observer.observed
    with pytest.raises(QuantizationError, match="no data was observed") as caught:
        observer.qparams(qint8)
    assert "calibrate" in str(caught.value)


@pytest.mark.parametrize("kind", ALL)
def test_zero_data_has_scale_one(kind: type[Observer]) -> None:
    scale = observe(kind(), [torch.zeros(3, 4)]).qparams(qint8).scale
    assert torch.equal(scale, torch.ones_like(scale))


def test_one_silent_channel_does_not_disturb_the_others() -> None:
    values = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    scale = observe(PerChannelMinMaxObserver(), [values]).qparams(qint8).scale
    assert torch.equal(scale, torch.tensor([1.0, 2.0 / 128]))


@pytest.mark.parametrize("value", [-3.5, 1e-30, 3e38])
def test_constant_data(value: float) -> None:
    scale = observe(MinMaxObserver(), [torch.full((4,), value)]).qparams(qint8).scale
    assert scale == torch.tensor(abs(value)) / 128


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_value_that_is_no_number_is_never_forgotten(kind: type[Observer], bad: float, position: int) -> None:
    data = [torch.randn(3, 4) for _ in range(3)]
    data[position][1, 2] = bad
    with pytest.raises(QuantizationError, match="not finite"):
        observe(kind(), data).qparams(qint8)


def test_float64_beyond_float32_is_not_finite() -> None:
    with pytest.raises(QuantizationError, match="not finite"):
        observe(MinMaxObserver(), [torch.tensor([1e300], dtype=torch.float64)]).qparams(qint8)


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_no_such_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizationError, match="have no dimension 1"):
        PerChannelMinMaxObserver(1)(torch.randn(shape))


@pytest.mark.parametrize("kind", [PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver])
def test_another_number_of_slices(kind: type[Observer]) -> None:
    observer = observe(kind(), [torch.randn(1, 4)])
    with pytest.raises(QuantizationError, match="an observer of 1 slices was given 3"):
        observer(torch.randn(3, 4))
    assert observer.min_val.shape == (1,), "what was seen before is kept"


def test_reset_forgets() -> None:
    observer = observe(PerChannelMinMaxObserver(), [torch.randn(3, 4) * 100])
    observer.reset()
    assert not observer.observed
    values = torch.randn(5, 4)
    assert torch.equal(observe(observer, [values]).max_val, values.amax(1))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_classes_stand_for_their_names(kind: type[Observer]) -> None:
    made = make_observer(observer_name(kind), 1)
    assert isinstance(made, MovingAverageMinMaxObserver if "Average" in kind.__name__ else MinMaxObserver)
    assert made.ch_axis == 1


def test_unknown_names_suggest_close_ones() -> None:
    for call in (lambda: observer_name("min_mx"), lambda: make_observer("min_mx", 0)):
        with pytest.raises(QuantizationError, match="no observer is named 'min_mx'") as caught:
            call()
        assert "'min_max'" in str(caught.value)


def test_a_subclass_is_not_its_parent() -> None:
    class Mine(MinMaxObserver):
        pass

    with pytest.raises(QuantizationError, match=r"Mine.* has no registered name") as caught:
        observer_name(Mine)
    assert "OBSERVERS" in str(caught.value)


def test_an_observer_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(MinMaxObserver):
        registered_name = "halved"

        def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
            super()._update(low / 2, high / 2)

    monkeypatch.setitem(OBSERVERS, "halved", lambda ch_axis: Halved(ch_axis))
    assert observer_name(Halved) == "halved"
    assert observe(make_observer("halved", -1), [torch.tensor([4.0])]).max_val == 2


@pytest.mark.parametrize("wrong", [MinMaxObserver(), int, 3, None], ids=["instance", "int", "number", "none"])
def test_what_is_no_observer(wrong: object) -> None:
    with pytest.raises(QuantizationError, match="is no observer"):
        observer_name(wrong)  # type: ignore[arg-type]


# --- saved ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_ranges_are_saved(kind: type[Observer]) -> None:
    source, target = observe(kind(), batches(3, 4)), kind()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.min_val, source.min_val)
    assert torch.equal(target.max_val, source.max_val)
    target.load_state_dict(kind().state_dict())
    assert not target.observed, "an empty range is saved too"
