"""Searches against plain loops over histograms, and against the values themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from qgraph.errors import QuantizationError
from qgraph.numerics import QType, Scheme, choose_qparams, fake_quantize, qint4, qint8, qint16, quint8
from qgraph.quantization import HistogramObserver
from qgraph.quantization.observers.distribution import Distribution
from qgraph.quantization.observers.kl import KLSearch
from qgraph.quantization.observers.search import ClipStdSearch, MaxSearch, MixSearch, MSESearch, PercentileSearch
from qgraph.quantization.observers.searches import SEARCHES, search_of, text_of

SYMMETRIC, AFFINE = (qint8, Scheme.SYMMETRIC), (quint8, Scheme.AFFINE)

DATA = {
    "normal": lambda: torch.randn(20_000),
    "relu": lambda: torch.randn(20_000).relu() * 3,
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
    "skewed": lambda: torch.nn.functional.silu(torch.randn(20_000) * 4),
    "outliers": lambda: torch.cat([torch.randn(20_000), torch.tensor([40.0, -55.0])]),
    "two_clusters": lambda: torch.cat([torch.randn(10_000) * 0.1, 5 + torch.randn(200) * 0.1]),
    "far_from_zero": lambda: 10 + torch.randn(5_000),
    "few": lambda: torch.tensor([0.1, -0.4, 3.0]),
}


def seen(values: torch.Tensor, bins: int = 2048) -> Distribution:
    observer = HistogramObserver(bins)
    observer(values)
    (found,) = observer.distributions()
    return found


def bins_of(d: Distribution) -> list[tuple[int, float, float]]:
    """Count and ends of every bin with values, one by one."""
    found = []
    for entry, count in enumerate(d.counts.tolist()):
        i = entry - (d.bins - 1)
        if count:
            found.append((count, min(max((i - 1) * d.width, d.low), d.high), min(max(i * d.width, d.low), d.high)))
    return found


def grid_of(low: float, high: float, qtype: QType, scheme: Scheme) -> tuple[float, int]:
    """Scale and zero point of a range, as every site gets them."""
    bounds = torch.tensor([low, high], dtype=torch.float64).float()
    qparams = choose_qparams(bounds[0], bounds[1], qtype, scheme=scheme)
    return float(qparams.scale), qparams.zero


def loop_error(d: Distribution, low: float, high: float, qtype: QType, scheme: Scheme, power: int) -> float:
    """Mean error, by integrating from one rounding boundary to the next in every bin."""
    scale, zero = grid_of(low, high, qtype, scheme)
    first, last = (qtype.qmin - zero) * scale, (qtype.qmax - zero) * scale
    total = 0.0
    for count, lower, upper in bins_of(d):
        if upper - lower <= 1e-6 * d.reach:
            middle = (lower + upper) / 2
            total += count * abs(middle - min(max(round(middle / scale) * scale, first), last)) ** power
            continue
        steps = np.arange(math.floor(lower / scale) - 1, math.ceil(upper / scale) + 2)
        cuts = np.clip(np.unique(np.concatenate([steps * scale, (steps + 0.5) * scale, [first, last]])), lower, upper)
        for a, b in pairwise(cuts):
            code = min(max(round((a + b) / 2 / scale) * scale, first), last)
            mass = abs(abs(b - code) ** (power + 1) - abs(a - code) ** (power + 1)) / (power + 1)
            total += count * mass / (upper - lower)
    return total / sum(count for count, *_ in bins_of(d))


def clip(d: Distribution, threshold: float) -> tuple[float, float]:
    return max(min(d.low, 0.0), -threshold), min(max(d.high, 0.0), threshold)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("qtype", "scheme"), [SYMMETRIC, AFFINE, (qint4, Scheme.SYMMETRIC_NARROW)], ids=str)
@pytest.mark.parametrize(("metric", "power"), [("mse", 2), ("mae", 1)])
def test_errors_are_the_integrals(data: str, qtype: QType, scheme: Scheme, metric: str, power: int) -> None:
    d = seen(DATA[data](), 128)
    ranges = [clip(d, part * d.reach) for part in (1.0, 0.7, 0.2)]
    found = d.errors(ranges, qtype, scheme, metric)
    expected = [loop_error(d, low, high, qtype, scheme, power) for low, high in ranges]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("data", ["normal", "relu", "laplace", "skewed"])
@pytest.mark.parametrize(("qtype", "scheme"), [SYMMETRIC, AFFINE])
def test_errors_are_close_to_those_of_the_values(data: str, qtype: QType, scheme: Scheme) -> None:
    """The values of a bin are spread over it almost evenly; the zeros behind a relu are known."""
    values = DATA[data]()
    d = seen(values)
    for low, high in (clip(d, d.reach), clip(d, d.reach * 0.6)):
        bounds = torch.tensor([low, high])
        rounded = fake_quantize(values, choose_qparams(bounds[0], bounds[1], qtype, scheme=scheme))
        real = float(((rounded - values).double() ** 2).mean())
        assert float(d.errors([(low, high)], qtype, scheme, "mse")) == pytest.approx(real, rel=0.03)


# --- searches ------------------------------------------------------------------------------------------------------


def loop_percentile(d: Distribution, percentile: float) -> float:
    counts = [0] * d.bins
    for entry, count in enumerate(d.counts.tolist()):
        i = entry - (d.bins - 1)
        counts[i - 1 if i > 0 else -i] += count
    wanted, passed = percentile / 100 * sum(counts), 0
    for index, count in enumerate(counts):
        if passed + count >= wanted:
            least = max(d.low, -d.high, 0.0)
            lower, upper = max(index * d.width, least), min((index + 1) * d.width, d.reach)
            return lower + (wanted - passed) / count * (upper - lower)
        passed += count
    raise AssertionError


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("percentile", [60, 99, 99.9, 99.99, 100])
def test_percentile(data: str, percentile: float) -> None:
    values = DATA[data]()
    d = seen(values)
    assert PercentileSearch(percentile).find(d, *SYMMETRIC) == clip(d, loop_percentile(d, percentile))
    exact = float(np.quantile(values.abs().numpy(), percentile / 100, method="inverted_cdf"))
    assert abs(loop_percentile(d, percentile) - exact) <= d.width


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("percentile", [60, 99.9, 100])
def test_percentile_of_affine_codes_leaves_out_both_ends(data: str, percentile: float) -> None:
    values = DATA[data]()
    d = seen(values)
    low, high = PercentileSearch(percentile).find(d, *AFFINE)
    for found, part, method in ((low, 1 - percentile / 100, "lower"), (high, percentile / 100, "inverted_cdf")):
        exact = float(np.quantile(values.numpy(), part, method=method))
        if values.numel() > 100:
            assert abs(found - exact) <= 2 * d.width
    assert d.low <= low <= high <= d.high


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("stride", [1, 7])
def test_mse(data: str, stride: int) -> None:
    d = seen(DATA[data](), 64)
    thresholds = [part / 100 * d.reach for part in range(100, 0, -stride)]
    errors = [loop_error(d, *clip(d, t), *SYMMETRIC, 2) for t in thresholds]
    assert MSESearch(stride).find(d, *SYMMETRIC) == clip(d, thresholds[int(np.argmin(errors))])


@pytest.mark.parametrize("data", DATA)
def test_mse_of_affine_codes_searches_both_ends(data: str) -> None:
    d = seen(DATA[data](), 64)
    parts = [part / 100 for part in range(100, 0, -9)]

    def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
        return ranges[int(np.argmin([loop_error(d, *each, *AFFINE, 2) for each in ranges]))]

    low, high = best([clip(d, part * d.reach) for part in parts])
    if low < 0 < high:
        low, high = best([(part * low, high) for part in parts])
        low, high = best([(low, part * high) for part in parts])
    assert MSESearch(9).find(d, *AFFINE) == (low, high)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("qtype", "scheme"), [SYMMETRIC, AFFINE])
def test_mix(data: str, qtype: QType, scheme: Scheme) -> None:
    d = seen(DATA[data](), 256)
    percentiles = (100.0, 99.9, 99.0, 90.0)
    ranges = [PercentileSearch(each).find(d, qtype, scheme) for each in percentiles]
    errors = [loop_error(d, *each, qtype, scheme, 2) for each in ranges]
    assert MixSearch((90.0, 99.9, 100.0, 99.0)).find(d, qtype, scheme) == ranges[int(np.argmin(errors))]


def loop_kl(counts: np.ndarray, levels: int) -> int:
    """Bins kept, with every histogram written out; the widest of the best."""
    best, chosen = math.inf, counts.size
    for kept in range(counts.size, levels - 1, -1):
        reference = counts[:kept].astype(np.float64)
        reference[-1] += counts[kept:].sum()
        candidate = np.zeros(kept)
        for level in range(levels):
            members = [j for j in range(kept) if j * levels // kept == level and counts[j]]
            for j in members:
                candidate[j] = sum(int(counts[m]) for m in members) / len(members)
        reference, candidate = reference / reference.sum(), candidate / max(candidate.sum(), 1)
        loss = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p > 0:
                loss += p * math.log(p / q) if q > 0 else math.inf
        if loss < best:
            best, chosen = loss, kept
    return chosen


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("levels", [4, 8])
def test_kl(data: str, levels: int) -> None:
    """Small formats, so that the plain loops end."""
    d = seen(DATA[data](), 64)
    magnitudes = np.zeros(64, dtype=np.int64)
    for entry, count in enumerate(d.counts.tolist()):
        magnitudes[entry - 64 if entry >= 64 else 63 - entry] += count
    used = int(magnitudes.nonzero()[0].max()) + 1
    kept = loop_kl(magnitudes[:used], min(levels, used))
    qtype = QType(levels.bit_length(), True)
    expected = clip(d, d.reach if kept == used else kept * d.width)
    assert KLSearch(64).find(d, qtype, Scheme.SYMMETRIC) == expected


def test_kl_merges_finer_histograms() -> None:
    values = DATA["laplace"]()
    assert KLSearch(512).find(seen(values, 4096), *SYMMETRIC) == KLSearch(512).find(seen(values, 512), *SYMMETRIC)


def test_kl_keeps_everything_where_there_are_codes_enough() -> None:
    d = seen(DATA["laplace"]())
    assert KLSearch().find(d, qint16, Scheme.SYMMETRIC) == (d.low, d.high)


def test_clip_std() -> None:
    for data in ("normal", "relu", "laplace", "skewed", "far_from_zero"):
        values = DATA[data]()
        low, high = ClipStdSearch(2.0).find(d := seen(values), *SYMMETRIC)
        mean, std = float(values.double().mean()), float(values.double().std(correction=0))
        assert low == pytest.approx(max(d.low, mean - 2 * std), abs=d.width / 10)
        assert high == pytest.approx(min(d.high, mean + 2 * std), abs=d.width / 10)


@pytest.mark.parametrize("data", ["laplace", "outliers"])
def test_searches_gain_where_there_is_a_tail(data: str) -> None:
    values = DATA[data]()
    d = seen(values)

    def real(low: float, high: float) -> float:
        bounds = torch.tensor([low, high])
        return float(((fake_quantize(values, choose_qparams(bounds[0], bounds[1], qint4)) - values) ** 2).mean())

    four_bits = (qint4, Scheme.SYMMETRIC)
    whole = real(*MaxSearch().find(d, *four_bits))
    for search in (MSESearch(), MixSearch()):
        assert real(*search.find(d, *four_bits)) < 0.5 * whole
    best = min(real(*clip(d, part / 200 * d.reach)) for part in range(1, 201))
    assert real(*MSESearch().find(d, *four_bits)) <= 1.03 * best


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_have_a_text(name: str) -> None:
    search = search_of(name)
    assert search_of(text_of(search)) == search


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("percentile(percentile=0)", "percentile is 0"),
        ("percentile(percentile=100.1)", "percentile is 100.1"),
        ("percentile(percentile='99')", "percentile is '99'"),
        ("percentile(percentil=99)", "did you mean 'percentile'"),
        ("mse(stride=0)", "stride is 0"),
        ("mse(stride=1.5)", "stride is 1.5"),
        ("kl(bins=1000)", "give 512 or 1024"),
        ("mix(percentiles=())", "percentiles is ()"),
        ("mix(percentiles=99)", "percentiles is 99"),
        ("clip_std(std_scale=0)", "std_scale is 0"),
        ("max(bins=3)", "write max without options"),
        ("msee", "did you mean 'mse'"),
        ("mse(", "names no observer"),
        ("mse(1)", "names no observer"),
        ("", "names no observer"),
    ],
)
def test_wrong_searches(text: str, words: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        search_of(text)
    assert words in str(caught.value)
