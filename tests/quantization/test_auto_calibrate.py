"""auto_calibrate: the least error of each site, what is reported, and that an error changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import info
from qgraph.numerics import choose_qparams, fake_quantize, qint4, qint8
from qgraph.quantization import (
    FakeQuantState,
    HistogramObserver,
    ModuleNameQconfigSetter,
    QConfig,
    auto_calibrate,
    calibrate,
    convert,
    prepare,
    set_fake_quantize,
)
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.sites import quantizers
from tests.support.models import Residual, image

MODEL = Residual().eval()


def batches() -> list[torch.Tensor]:
    """A long tail, so that clipping gains."""
    return [torch.distributions.StudentT(3.0).sample((4, 3, 8, 8)) for _ in range(4)]


def prepared(**names: QConfig) -> fx.GraphModule:
    return prepare(MODEL, image(), ModuleNameQconfigSetter(names) if names else None)


def sites(gm: fx.GraphModule) -> dict[str, FakeQuantize]:
    return {m.site: m for m in quantizers(gm) if isinstance(m, FakeQuantize)}


def everything(gm: fx.GraphModule) -> dict[str, Any]:
    found: dict[str, Any] = {m.site: (m.state, getattr(m, "observer", None)) for m in quantizers(gm)}
    plans = {node.name: info(node).plan for node in gm.graph.nodes}
    return found | plans | {name: tensor.clone() for name, tensor in gm.state_dict().items()}


@pytest.mark.parametrize(("metric", "power"), [("mse", 2), ("mae", 1)])
def test_the_choice_has_the_least_error_of_the_values(metric: str, power: int) -> None:
    """On the values themselves, next to which the histogram may err a little."""
    data = batches()
    gm = prepared()
    result = auto_calibrate(gm, data, metric=metric, progress=False)
    kinds = [choice.observer for choice in result.sites]
    assert len(set(kinds)) > 1, "different sites, different observers"
    values = torch.cat(data)
    site = result["input.quant"] if any(c.site == "input.quant" for c in result.sites) else result.sites[0]
    real = {}
    for text, error in site.errors:
        alone = prepared(**{"": QConfig(activation_observer=text)})
        calibrate(alone, data, progress=False)
        rounded = fake_quantize(values, sites(alone)[site.site].qparams())
        real[text] = float(((rounded - values).abs().double() ** power).mean())
        assert error == pytest.approx(real[text], rel=0.02)
    assert real[site.observer] <= 1.01 * min(real.values())
    assert site.error == min(error for _, error in site.errors) <= site.min_max_error
    assert site.gain == pytest.approx((10 if metric == "mse" else 20) * math.log10(site.min_max_error / site.error))


def test_scales_are_those_of_the_chosen_observers() -> None:
    data = batches()
    gm = prepared()
    result = auto_calibrate(gm, iter(data), num_steps=3, progress=False)
    chosen = {choice.site: QConfig(activation_observer=choice.observer) for choice in result.sites}
    wanted = prepare(MODEL, image(), ModuleNameQconfigSetter(chosen))
    calibrate(wanted, data[:3], progress=False)
    for site, module in sites(wanted).items():
        assert torch.equal(module.scale, sites(gm)[site].scale), site
    set_fake_quantize(gm, FakeQuantState.QAT)
    set_fake_quantize(gm, FakeQuantState.VALIDATION)
    x = data[3]
    assert torch.equal(gm(x), wanted(x))
    assert torch.equal(qgraph.Simulator(convert(gm))(x), qgraph.Simulator(convert(wanted))(x))


def test_the_result_can_be_saved_and_read() -> None:
    gm = prepared()
    result = auto_calibrate(gm, batches(), progress=False)
    twin = prepare(MODEL, image(), QConfig(activation_observer="histogram"))
    twin.load_state_dict(gm.state_dict())
    set_fake_quantize(twin, FakeQuantState.VALIDATION)
    assert all(torch.equal(module.scale, sites(twin)[site].scale) for site, module in sites(gm).items())
    lines = str(result).splitlines()
    assert len(lines) == 1 + len(result.sites)
    assert lines[0].split() == ["site", "format", "observer", "mse", "gain", "over", "min_max"]
    assert "dB" in lines[1]
    with pytest.raises(KeyError, match="conv1"):
        result["conv11"]


def test_plans_tell_the_choice() -> None:
    gm = prepared()
    auto_calibrate(gm, batches(), observers=["percentile(percentile=99.0)"], progress=False)
    plans = {info(node).site: info(node).plan for node in gm.graph.nodes if info(node).plan is not None}
    assert plans["conv1"].observer == "histogram(bins=2048, search='percentile(percentile=99.0)')"


def test_of_equal_candidates_the_first_wins() -> None:
    gm = prepared()
    result = auto_calibrate(gm, batches(), observers=("percentile(percentile=100)", "min_max"), progress=False)
    assert {choice.observer for choice in result.sites} == {"percentile(percentile=100)"}
    assert {choice.gain for choice in result.sites} == {0.0}


def test_fixed_scales_are_left_alone() -> None:
    gm = prepared(stem=QConfig(fixed_scale=0.5), conv1=QConfig(activation_observer="fixed_scale(scale=0.25)"))
    result = auto_calibrate(gm, batches(), progress=False)
    assert not {"stem", "conv1"} & {choice.site for choice in result.sites}
    assert float(sites(gm)["stem"].scale) == 0.5
    assert float(sites(gm)["conv1"].scale) == 0.25


def test_it_lowers_the_error_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = [torch.randn(6400, 8) for _ in range(4)]
    data[2][100, 3] = 40.0
    x = data[0]
    errors = []
    for calibrated in (calibrate, auto_calibrate):
        gm = prepare(model, x[:2])
        calibrated(gm, data, progress=False)
        with torch.no_grad():
            errors.append(float(((gm(x) - model(x)) ** 2).mean()))
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "msee"}, "did you mean 'mse'"),
        ({"observers": ()}, "there are no candidates"),
        ({"observers": ("min_max", "moving_average")}, "moving_average is no candidate"),
        ({"observers": ("fixed_scale(scale=1.0)",)}, "is no candidate"),
        ({"observers": ("klx",)}, "did you mean 'kl'"),
        ({"loader": []}, "loader is empty"),
        ({"loader": torch.randn(2, 3, 8, 8)}, "put a single batch into a list"),
        ({"loader": [torch.full((2, 3, 8, 8), math.nan)]}, "not finite"),
        ({"loader": [torch.randn(2, 3, 8, 8), torch.randn(2, 5)]}, "batch 1"),
    ],
)
def test_after_an_error_nothing_has_changed(arguments: dict[str, Any], words: str) -> None:
    gm = prepared()
    calibrate(gm, batches(), progress=False)
    before = everything(gm)
    with pytest.raises((QuantizationError, UserError)) as caught:
        auto_calibrate(gm, **{"loader": batches(), "progress": False} | arguments)
    assert words in str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    after = everything(gm)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_sites_with_a_histogram_keep_it() -> None:
    gm = prepared(**{"": QConfig(activation_observer="histogram(bins=4096)")})
    first, *rest = batches()
    calibrate(gm, [first], progress=False)
    auto_calibrate(gm, rest, progress=False)
    for module in sites(gm).values():
        if isinstance(module.observer, HistogramObserver):
            assert module.observer.bins == 4096
    counts = sites(gm)["conv1"].observer.counts  # type: ignore[union-attr]
    assert counts.sum() == 16 * 4 * 8 * 8


def test_formats_are_told_apart() -> None:
    """Four bits clip more than eight."""
    values = torch.randn(10_000)
    observer = HistogramObserver()
    observer(values)
    reach = [float(observer.range_for(qtype, qgraph.numerics.Scheme.SYMMETRIC)[1]) for qtype in (qint4, qint8)]
    assert reach[0] < reach[1] <= float(values.abs().max())
    assert choose_qparams(torch.tensor(-reach[0]), torch.tensor(reach[0]), qint4).scale > 0
