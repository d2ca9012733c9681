"""Observers as text: what is read, printed and refused, and that settings reach the sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgraph.errors import QuantizationError, UserError
from qgraph.numerics import qint8
from qgraph.quantization import (
    ClipStdObserver,
    FakeQuantize,
    FixedScaleObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    ObserverSpec,
    PercentileObserver,
    QConfig,
    calibrate,
    get_qconfig,
    prepare,
)
from qgraph.quantization.observers import OBSERVERS, make_observer, observer_name
from qgraph.quantization.observers.kl import KLSearch
from qgraph.quantization.observers.search import MSESearch, PercentileSearch


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("min_max", "min_max"),
        (" percentile( percentile = 99.9 ) ", "percentile(percentile=99.9)"),
        ("percentile(percentile=99.9, bins=8192)", "percentile(bins=8192, percentile=99.9)"),
        ("mix(percentiles=[99.9, 100])", "mix(percentiles=(99.9, 100))"),
        ("histogram(search='kl(bins=256)')", "histogram(search='kl(bins=256)')"),
        ("kl()", "kl"),
        ("fixed_scale(scale=0.5, zero_point=-3)", "fixed_scale(scale=0.5, zero_point=-3)"),
    ],
)
def test_texts(text: str, printed: str) -> None:
    spec = ObserverSpec.parse(text)
    assert str(spec) == printed
    assert ObserverSpec.parse(printed) == spec
    assert observer_name(text) == printed == observer_name(spec)
    assert QConfig(activation_observer=text, weight_observer="min_max").activation_observer == printed
    assert get_qconfig(observer=text).activation_observer == printed


def test_an_option_given_twice() -> None:
    with pytest.raises(QuantizationError, match="option bins of kl is given twice"):
        ObserverSpec("kl", (("bins", 512), ("bins", 1024)))
    with pytest.raises(QuantizationError, match=r"given twice|names no observer"):
        ObserverSpec.parse("kl(bins=512, bins=1024)")


def test_order_does_not_matter() -> None:
    assert ObserverSpec("a", (("y", 1), ("x", 2))) == ObserverSpec("a", (("x", 2), ("y", 1)))


@pytest.mark.parametrize(
    "text", ["", "1", "a b", "a(", "a(1)", "a(b)", "a(**{})", "a.b", "a(b=c)", "a(b=1)(c=2)", "a + b"]
)
def test_texts_of_another_form(text: str) -> None:
    with pytest.raises(QuantizationError, match="names no observer"):
        observer_name(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("percentil(percentile=1)", "did you mean 'percentile'"),
        ("percentile(percentle=99)", "did you mean 'percentile'"),
        ("percentile(percentile=101)", "percentile is 101"),
        ("percentile(bins=1000)", "give 512 or 1024"),
        ("mse(averaging_constant=0.01)", "weighs all data alike"),
        ("min_max(bins=4)", "write min_max without options"),
        ("min_max(ch_axis=0)", "no option 'ch_axis'"),
        ("moving_average(averaging_constant=2)", "averaging_constant is 2"),
        ("kl(update_interval=0)", "update_interval is 0"),
        ("histogram(search='klx')", "no search is named 'klx'"),
        ("histogram(search=3)", "search is 3"),
        ("mix(percentiles=(1, None))", "option percentiles of mix"),
        ("fixed_scale", "needs scale"),
        ("kl(bins=3)", "give 2 or 4"),
        ("fixed_scale(scale=0.0)", "is not usable"),
        ("fixed_scale(scale='a')", "are no numbers"),
    ],
)
def test_wrong_settings_are_refused_at_once(text: str, words: str) -> None:
    for call in (lambda: QConfig(activation_observer=text), lambda: observer_name(text)):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)


def test_every_name_makes_its_class() -> None:
    kinds = [MinMaxObserver, MovingAverageMinMaxObserver, PercentileObserver, MSEObserver, KLObserver, MixObserver]
    for kind in (*kinds, HistogramObserver, ClipStdObserver):
        made = make_observer(observer_name(kind), 2)
        assert type(made) is kind
        assert made.ch_axis == 2
    assert type(make_observer("fixed_scale(scale=0.5)", -1)) is FixedScaleObserver
    assert {kind.registered_name for kind in (*kinds, HistogramObserver, ClipStdObserver, FixedScaleObserver)} == set(
        OBSERVERS
    )


def test_the_text_of_a_histogram_makes_its_like() -> None:
    for observer in (HistogramObserver(512, "mix(percentiles=(99.0,))"), PercentileObserver(98.0), KLObserver(256)):
        twin = make_observer(observer.text, -1)
        assert isinstance(twin, HistogramObserver)
        assert (twin.bins, twin.search) == (observer.bins, observer.search)


def test_options_reach_the_sites() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    qconfig = QConfig(activation_observer="percentile(percentile=99.0, bins=1024)", weight_observer="mse(stride=5)")
    prepared = prepare(model, torch.randn(2, 4), qconfig)
    calibrate(prepared, [torch.randn(50, 4)], progress=False)
    sites = [module for module in prepared.modules() if isinstance(module, FakeQuantize)]
    searches = {type(site.observer.search) for site in sites if isinstance(site.observer, HistogramObserver)}
    assert searches == {PercentileSearch, MSESearch}
    for site in sites:
        assert isinstance(site.observer, HistogramObserver)
        weight = site.site.endswith("weight")
        assert site.observer.search == (MSESearch(5) if weight else PercentileSearch(99.0))
        assert site.observer.counts.shape == ((site.scale.numel(), 4096) if weight else (2048,))


def test_a_fixed_scale_by_observer() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    prepared = prepare(model, torch.randn(2, 4), QConfig(activation_observer="fixed_scale(scale=0.125)"))
    calibrate(prepared, [torch.randn(5, 4)], progress=False)
    assert float(prepared.quantizers.input_quant.scale) == 0.125


def test_a_search_by_itself() -> None:
    observer = HistogramObserver(search=KLSearch(128))
    observer(torch.randn(1000))
    assert observer.qparams(qint8).scale > 0
