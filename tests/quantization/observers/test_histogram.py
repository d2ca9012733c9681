"""Histograms: exact whatever the order, the batches and the device of origin; what cannot be counted; saved ones."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.errors import QuantizationError, StateError
from qgraph.numerics import QParams, Scheme, fake_quantize, qint8, qint16, quint8
from qgraph.quantization import (
    ClipStdObserver,
    FakeQuantize,
    FakeQuantState,
    FixedScaleObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    PerChannelMinMaxObserver,
)

SEARCHING = [HistogramObserver, PercentileObserver, MSEObserver, KLObserver, MixObserver, ClipStdObserver]
BINS = 16

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.floats(width=32)
moderate = st.floats(-8, 8, width=32)


def kept(observer: Observer) -> dict[str, torch.Tensor]:
    return {name: getattr(observer, name) for name in observer.kept}


def assert_same(left: Observer, right: Observer) -> None:
    for name, value in kept(left).items():
        other = getattr(right, name)
        assert value.shape == other.shape, name
        assert torch.equal(value.nan_to_num(12345.0, 54321.0), other.nan_to_num(12345.0, 54321.0)), name


def seeing(observer: Observer, *batches: torch.Tensor) -> Observer:
    for values in batches:
        assert observer(values) is values, "values pass unchanged"
    return observer


def counted(values: np.ndarray, exponent: int, bins: int) -> np.ndarray:
    """The definition, value by value."""
    result = np.zeros(2 * bins, dtype=np.int64)
    for value in values.astype(np.float64).ravel():
        result[bins - 1 + math.ceil(value * bins / 2.0**exponent)] += 1
    return result


# --- counts --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.one_of(finite, moderate), max_size=6), min_size=1, max_size=6))
def test_counts_are_those_of_all_data_at_once(batches: list[list[float]]) -> None:
    observer = seeing(HistogramObserver(BINS), *(torch.tensor(batch, dtype=torch.float32) for batch in batches))
    everything = np.array([value for batch in batches for value in batch], dtype=np.float32)
    if not everything.size:
        assert not observer.observed
        return
    exponent = int(observer.exponent)
    largest = float(np.abs(everything).max())
    assert largest < 2.0**exponent
    assert exponent == -100 or largest >= 2.0 ** (exponent - 1), "the smallest power of two above all values"
    assert np.array_equal(observer.counts.numpy(), counted(everything, exponent, BINS))


@given(st.lists(st.one_of(anything, moderate), min_size=1, max_size=30), st.integers(0, 2**32))
@pytest.mark.parametrize("kind", [MinMaxObserver, lambda: HistogramObserver(BINS), lambda: KLObserver(BINS)])
def test_order_batches_and_merging_do_not_matter(kind: type[Observer], values: list[float], seed: int) -> None:
    whole = seeing(kind(), torch.tensor(values))
    rng = random.Random(seed)
    shuffled = rng.sample(values, len(values))
    parts = [kind() for _ in range(3)]
    for value in shuffled:
        rng.choice(parts)(torch.tensor([value]))
    rng.shuffle(parts)
    first, *others = parts
    for other in others:
        before = {name: value.clone() for name, value in kept(other).items()}
        first.merge(other)
        assert all(torch.equal(before[n].nan_to_num(), v.nan_to_num()) for n, v in kept(other).items())
    assert_same(first, whole)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_have_histograms_of_their_own(axis: int) -> None:
    batches = [torch.randn(3, 4, 5) * 10.0 ** torch.randint(-3, 4, (3, 4, 1)) for _ in range(3)]
    left, right = HistogramObserver(BINS, ch_axis=axis), HistogramObserver(BINS, ch_axis=axis)
    seeing(left, *batches[:2])
    seeing(right, batches[2])
    left.merge(right)
    for index in range(batches[0].shape[axis]):
        alone = seeing(HistogramObserver(BINS), *(batch.select(axis, index) for batch in batches))
        assert torch.equal(left.counts[index], alone.counts)
        assert left.exponent[index] == alone.exponent
    scales = left.qparams(qint8).scale
    alone = seeing(HistogramObserver(BINS), *(batch.select(axis, 1) for batch in batches))
    assert scales[1] == alone.qparams(qint8).scale


def test_layouts_dtypes_and_long_data() -> None:
    values = torch.randn(2, 3, 300, 200)
    plain = seeing(HistogramObserver(), values)
    assert plain.counts.sum() == values.numel()
    assert np.array_equal(plain.counts.numpy(), counted(values.numpy(), int(plain.exponent), 2048))
    for other in (values.contiguous(memory_format=torch.channels_last), values.transpose(1, 3), values.double()):
        assert_same(seeing(HistogramObserver(), other), plain)
    half = values.half()
    assert_same(seeing(HistogramObserver(), half), seeing(HistogramObserver(), half.float()))


def test_memory_does_not_grow() -> None:
    observer = seeing(HistogramObserver(), *(torch.randn(1000) * 4.0**step for step in range(20)))
    assert sum(value.untyped_storage().nbytes() for value in kept(observer).values()) == 8 * 4096 + 8 + 4 + 4
    assert observer.counts.sum() == 20_000


def test_observers_of_different_kinds_do_not_merge() -> None:
    pairs = [
        (HistogramObserver(), HistogramObserver(1024)),
        (HistogramObserver(), HistogramObserver(search="kl")),
        (HistogramObserver(), MSEObserver()),
        (MinMaxObserver(), MinMaxObserver(0)),
        (FixedScaleObserver(1.0), FixedScaleObserver(2.0)),
    ]
    for left, right in pairs:
        with pytest.raises(QuantizationError, match="cannot be merged"):
            left.merge(right)
    with pytest.raises(QuantizationError, match="of 2 slices cannot take up one of 3"):
        seeing(PerChannelMinMaxObserver(), torch.ones(2, 1)).merge(seeing(PerChannelMinMaxObserver(), torch.ones(3, 1)))
    with pytest.raises(QuantizationError, match="order of the batches"):
        MovingAverageMinMaxObserver().merge(MovingAverageMinMaxObserver())


# --- any data ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(anything, max_size=4), max_size=4))
@pytest.mark.parametrize("kind", SEARCHING)
def test_values_that_are_no_numbers_are_refused_with_the_site(kind: type[Observer], batches: list[list[float]]) -> None:
    site = FakeQuantize("conv7", qint8, kind())
    site.state = FakeQuantState.CALIBRATION
    for batch in batches:
        site(torch.tensor(batch))
    everything = [value for batch in batches for value in batch]
    if everything and all(map(math.isfinite, everything)):
        site.settle()
        assert float(site.scale) > 0
        assert math.isfinite(float(site.scale))
        return
    with pytest.raises(QuantizationError) as caught:
        site.settle()
    assert "conv7" in str(caught.value)
    assert ("not finite" if everything else "no data") in str(caught.value)


@given(st.lists(finite, min_size=1, max_size=20))
@pytest.mark.parametrize("kind", SEARCHING)
@pytest.mark.parametrize(
    ("qtype", "scheme"), [(qint16, Scheme.SYMMETRIC), (qint8, Scheme.SYMMETRIC_NARROW), (quint8, Scheme.AFFINE)]
)
def test_ranges_lie_within_the_data(kind: type[Observer], qtype: object, scheme: Scheme, values: list[float]) -> None:
    observer = seeing(kind(), torch.tensor(values))
    low, high = observer.range_for(qtype, scheme)
    assert float(low) <= float(high)
    assert min([*values, 0.0]) <= float(low)
    assert float(high) <= max([*values, 0.0])
    assert observer.qparams(qtype, scheme).scale > 0


@pytest.mark.parametrize("kind", SEARCHING)
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-45, -1e-40, 3e38])
def test_constant_data_is_covered(kind: type[Observer], value: float) -> None:
    """A search for the least error may clip the one value to meet it better."""
    observer = seeing(kind(), torch.full((50,), value), torch.full((3,), value))
    exact = seeing(MinMaxObserver(), torch.tensor([value]))
    for qtype, scheme in ((qint8, Scheme.SYMMETRIC), (quint8, Scheme.AFFINE)):
        found, known = observer.qparams(qtype, scheme), exact.qparams(qtype, scheme)
        if kind in (HistogramObserver, MSEObserver, MixObserver):
            assert _error(value, found) <= _error(value, known)
        else:
            assert found.same_as(known)


def _error(value: float, qparams: QParams) -> float:
    exact = torch.tensor([value])
    return abs(float(fake_quantize(exact, qparams) - exact))


@pytest.mark.parametrize("kind", SEARCHING)
def test_one_huge_outlier(kind: type[Observer]) -> None:
    """All other values share the middle bin then; the scale is finite and does not exceed that of the whole range."""
    values = torch.randn(10_000)
    values[17] = 1e30
    scale = seeing(kind(), values).qparams(qint8).scale
    assert 0 < float(scale) <= float(torch.tensor(1e30) / 128)


@pytest.mark.parametrize("kind", SEARCHING)
def test_subnormal_and_silent_channels(kind: type[Observer]) -> None:
    values = torch.stack([torch.zeros(8), torch.full((8,), 1e-42), torch.randn(8), torch.full((8,), 3e38)])
    scale = seeing(kind(ch_axis=0), values).qparams(qint8).scale
    assert scale[0] == 1
    assert bool((scale[1:] >= torch.finfo(torch.float32).tiny).all())


# --- saved ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEARCHING)
@pytest.mark.parametrize("axis", [-1, 0])
def test_state_dicts_round_trip(kind: type[Observer], axis: int) -> None:
    source, target = seeing(kind(ch_axis=axis), torch.randn(3, 40)), kind(ch_axis=axis)
    target.load_state_dict(source.state_dict())
    assert_same(source, target)
    assert torch.equal(source.qparams(qint8).scale, target.qparams(qint8).scale)
    more = torch.randn(3, 4) * 9
    assert_same(seeing(source, more), seeing(target, more))
    target.load_state_dict(kind(ch_axis=axis).state_dict())
    assert not target.observed


def test_the_search_is_saved() -> None:
    source = seeing(HistogramObserver(search="percentile(percentile=90.0)"), torch.randn(1000))
    target = HistogramObserver()
    target.load_state_dict(source.state_dict())
    assert target.search == source.search
    assert torch.equal(target.qparams(qint8).scale, source.qparams(qint8).scale)


def test_histograms_of_another_size_are_not_loaded() -> None:
    source = seeing(HistogramObserver(1024), torch.randn(10))
    with pytest.raises(StateError, match="has 1024 bins, this observer 2048"):
        HistogramObserver().load_state_dict(source.state_dict())


# --- training and fixed scales -------------------------------------------------------------------------------------


def test_update_interval_searches_now_and_then() -> None:
    site = FakeQuantize("site", qint8, KLObserver(update_interval=3))
    site.state = FakeQuantState.QAT
    scales = []
    for step in range(7):
        site(torch.randn(100) * 2.0**step)
        scales.append(float(site.scale))
    assert scales[0] == scales[1] == scales[2]
    assert scales[3] == scales[4] == scales[5] != scales[2]
    assert scales[6] != scales[5]
    site(torch.randn(100) * 2.0**9)
    site.settle()
    assert float(site.scale) > scales[6], "leaving training searches once more"


def test_fixed_scale() -> None:
    observer = FixedScaleObserver(0.25, 3)
    assert observer.observed
    found = observer.qparams(quint8, Scheme.AFFINE)
    assert float(found.scale) == 0.25
    assert found.zero == 3
    seeing(observer, torch.randn(10) * 100)
    assert observer.qparams(quint8, Scheme.AFFINE).same_as(found)
    with pytest.raises(QuantizationError, match="zero point of 3 is not available"):
        observer.qparams(qint8)
    seeing(observer, torch.tensor([math.nan]))
    with pytest.raises(QuantizationError, match="not finite"):
        observer.qparams(quint8, Scheme.AFFINE)
    with pytest.raises(QuantizationError, match="cannot serve slices"):
        FixedScaleObserver(0.25, ch_axis=0)
