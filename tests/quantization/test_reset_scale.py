"""reset_scale: what a calibration with that observer gives, for the chosen sites only."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import qgraph
from qgraph.errors import QuantizationError, StateError, UserError
from qgraph.ir.node_info import info
from qgraph.quantization import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    QConfig,
    calibrate,
    convert,
    get_qconfig,
    prepare,
    reset_scale,
    set_fake_quantize,
)
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize
from qgraph.quantization.observers import HistogramObserver
from qgraph.quantization.observers.search import Search
from qgraph.quantization.sites import quantizers
from tests.support.models import Residual, image

BATCHES = [torch.randn(2, 3, 8, 8) * (1 + step) for step in range(3)]
MODEL = Residual().eval()


def calibrated(observer: str = "histogram", target: str | None = None, **more: QConfig) -> fx.GraphModule:
    names = {name.replace("__", "."): value for name, value in more.items()}
    setters = (ModuleNameQconfigSetter(names), QConfig(activation_observer=observer))
    gm = prepare(MODEL, image(), setters if more else setters[1], **({"target": target} if target else {}))
    calibrate(gm, BATCHES, progress=False)
    return gm


def scales(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {m.site: (m.step if isinstance(m, BiasFakeQuantize) else m.scale).clone() for m in quantizers(gm)}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for site, scale in left.items():
        assert torch.equal(scale, right[site]), site


@pytest.mark.parametrize("target", [None, "onnxruntime"])
@pytest.mark.parametrize(
    ("method", "options", "observer"),
    [
        ("max", None, "min_max"),
        ("percentile", {"percentile": 98.0}, "percentile(percentile=98.0)"),
        ("percentile(percentile=98.0)", {}, "percentile(percentile=98.0)"),
        ("mse", {"stride": 3}, "mse(stride=3)"),
        ("kl", None, "kl(bins=512)"),
        ("mix", None, "mix"),
        ("clip_std", {"std_scale": 2}, "clip_std(std_scale=2)"),
    ],
)
def test_it_is_what_calibration_would_have_given(
    target: str | None, method: str, options: dict[str, object] | None, observer: str
) -> None:
    gm = calibrated(target=target)
    sites = reset_scale(gm, method, options)
    wanted = calibrated(observer, target)
    assert_equal(scales(gm), scales(wanted))
    assert sites == [m.site for m in quantizers(gm) if type(m) is FakeQuantize and m.fixed_scale is None]
    set_fake_quantize(gm, FakeQuantState.QAT)
    set_fake_quantize(gm, FakeQuantState.VALIDATION)
    assert_equal(scales(gm), scales(wanted))
    x = BATCHES[0]
    assert torch.equal(gm(x), wanted(x))
    assert torch.equal(qgraph.Simulator(convert(gm))(x), qgraph.Simulator(convert(wanted))(x))


def test_by_prefix_and_dtype() -> None:
    wide = get_qconfig(observer="histogram", out_dtype="int16")
    gm = calibrated(conv1=wide)
    before = scales(gm)
    assert reset_scale(gm, "percentile", {"percentile": 90.0}, dtype="int16") == ["conv1"]
    after = scales(gm)
    changed = {site for site in after if not torch.equal(after[site], before[site])}
    assert {"conv1"} <= changed <= {"conv1", "conv2.bias"}, "the bias of the next call goes with its input"
    assert reset_scale(gm, "percentile", {"percentile": 80.0}, prefix="stem") == ["stem"]
    assert torch.equal(scales(gm)["conv1"], after["conv1"]), "separate calls add up"
    assert not torch.equal(scales(gm)["stem"], after["stem"])


def test_the_plan_and_the_state_dict_know() -> None:
    gm = calibrated()
    reset_scale(gm, "percentile", {"percentile": 90.0}, prefix="conv1")
    plans = {info(node).site: info(node).plan.observer for node in gm.graph.nodes if info(node).plan is not None}
    assert plans["conv1"] == "histogram(bins=2048, search='percentile(percentile=90.0)')"
    assert plans["conv2"] == "histogram"
    twin = prepare(MODEL, image(), QConfig(activation_observer="histogram"))
    twin.load_state_dict(gm.state_dict())
    set_fake_quantize(twin, FakeQuantState.VALIDATION)
    assert_equal(scales(gm), scales(twin))


def test_max_of_plain_ranges_changes_nothing() -> None:
    gm = calibrated("min_max")
    before = scales(gm)
    reset_scale(gm, "max")
    assert_equal(scales(gm), before)


def refused(gm: fx.GraphModule, *args: object, **kwargs: object) -> str:
    before = scales(gm)
    with pytest.raises((QuantizationError, StateError, UserError)) as caught:
        reset_scale(gm, *args, **kwargs)  # type: ignore[arg-type]
    assert_equal(scales(gm), before)
    return str(caught.value)


def test_sites_without_histogram_are_named() -> None:
    gm = calibrated(conv1=get_qconfig(observer="min_max"))
    text = refused(gm, "mse")
    assert "1 site(s) keep no histogram" in text
    assert "where: conv1" in text
    assert "activation_observer='histogram'" in text
    reset_scale(gm, "mse", prefix="conv2")
    assert "keep no histogram" in refused(calibrated("moving_average"), "max")


def test_wrong_requests() -> None:
    gm = calibrated()
    assert "did you mean 'percentile'" in refused(gm, "percentle")
    assert "did you mean 'percentile'" in refused(gm, "percentile", {"percent": 3})
    assert "method_kwargs is 3" in refused(gm, "percentile", 3)
    assert "3 is no text" in refused(gm, 3)
    assert "did you mean 'conv1'" in refused(gm, "mse", prefix="conv11")
    assert "no such site has the format int16" in refused(gm, "mse", dtype="int16")
    with pytest.raises(QuantizationError, match="stride of mse is given twice"):
        reset_scale(gm, "mse(stride=2)", {"stride": 3})
    assert "unknown number format" in refused(gm, "mse", dtype="int17x")
    fresh = prepare(MODEL, image(), QConfig(activation_observer="histogram"))
    assert "have not been calibrated" in refused(fresh, "mse")
    with pytest.raises(UserError, match="reset_scale needs a prepared"):
        reset_scale(MODEL, "mse")  # type: ignore[arg-type]


def test_fixed_scales_and_weights_stay() -> None:
    gm = calibrated(stem=QConfig(fixed_scale=0.5), conv2=QConfig(activation_observer="fixed_scale(scale=0.25)"))
    before = scales(gm)
    sites = reset_scale(gm, "percentile", {"percentile": 60.0})
    assert not {"stem", "conv2"} & set(sites)
    after = scales(gm)
    assert all(torch.equal(after[s], before[s]) for s in before if s.endswith(".weight") or s in ("stem", "conv2"))


def test_a_damaged_histogram_changes_nothing() -> None:
    gm = calibrated()
    site = next(m for m in quantizers(gm) if m.site == "conv2")
    assert isinstance(site, FakeQuantize)
    assert site.observer is not None
    site.observer(torch.tensor([float("nan")]))
    before = searches(gm)
    assert "site conv2" in refused(gm, "max")
    assert searches(gm) == before


def searches(gm: fx.GraphModule) -> dict[str, Search]:
    found = [m for m in quantizers(gm) if isinstance(m, FakeQuantize)]
    return {m.site: m.observer.search for m in found if isinstance(m.observer, HistogramObserver)}
