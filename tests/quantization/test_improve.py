"""equalize and correct_bias: what they gain on data, what they leave alone, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.errors import StateError, UserError
from qgraph.ir.node_info import graph_info
from qgraph.quantization import FakeQuantState, calibrate, convert, correct_bias, equalize, prepare, set_fake_quantize
from qgraph.simulator import Simulator
from tests.passes.test_equalize_channels import chain, with_norm
from tests.support.models import Forward


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers).eval()


def batches() -> list[torch.Tensor]:
    return [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in range(3)]


def calibrated(model: nn.Module, *, without: str | None = None) -> fx.GraphModule:
    pipeline = qgraph.prepare_pipeline() if without is None else qgraph.prepare_pipeline().remove(without)
    prepared = prepare(model, batches()[0], pipeline=pipeline)
    calibrate(prepared, batches(), progress=False)
    return prepared


def error(model: nn.Module, run: nn.Module | Simulator) -> float:
    with torch.no_grad():
        return sum((run(x) - model(x)).square().sum().item() for x in batches())


@pytest.mark.parametrize("build", [chain, with_norm], ids=lambda build: build.__name__)
def test_equalize_scales_by_data_and_keeps_the_float_model(build) -> None:
    torch.manual_seed(1)
    model = build()
    prepared = calibrated(model, without="equalize-channels")
    before = error(model, prepared)
    gains = equalize(prepared, batches())
    assert gains
    assert all(gain.applied and gain.after > gain.before + 3 for gain in gains), gains
    assert error(model, prepared) < before / 2
    assert error(model, Simulator(convert(prepared))) < before / 2
    assert any("scaled by" in note for note in graph_info(prepared).notes)
    set_fake_quantize(prepared, FakeQuantState.FLOAT)
    other = calibrated(model, without="equalize-channels")
    set_fake_quantize(other, FakeQuantState.FLOAT)
    assert all(torch.equal(prepared(x), other(x)) for x in batches())


def test_equalize_leaves_balanced_channels_alone() -> None:
    prepared = calibrated(plain())
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    assert equalize(prepared, batches(), least_gain=6.0) == []
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())


def test_the_mean_error_goes_away() -> None:
    model, prepared = plain(), calibrated(plain())
    before = error(model, prepared)
    gains = correct_bias(prepared, batches(), least_gain=0.0)
    assert [gain.site for gain in gains] == ["0", "4"], "a layer without bias is not looked at"
    assert error(model, prepared) < before
    with torch.no_grad():
        mean = torch.cat([prepared(x) - model(x) for x in batches()]).mean((0, 2, 3))
    step = next(one for one in prepared.modules() if getattr(one, "site", "") == "4.bias").step
    assert bool((mean.abs() <= step).all()), "what is left is the rounding of the bias"
    assert error(model, Simulator(convert(prepared))) < before


def test_chosen_sites_and_the_least_gain() -> None:
    prepared = calibrated(plain())
    biases = [prepared.get_submodule(name).bias for name in ("0", "4")]
    (gain,) = correct_bias(prepared, batches(), sites=["4"], least_gain=100.0)
    assert not gain.applied
    assert gain.after == gain.before
    assert "left as it was" in str(gain)
    assert [prepared.get_submodule(name).bias for name in ("0", "4")] == biases


def test_a_shared_bias_is_not_touched() -> None:
    model = Forward(lambda m, x: m.a(m.a(x)), a=nn.Conv2d(3, 3, 1)).eval()
    assert correct_bias(calibrated(model), batches()) == []


def test_errors() -> None:
    prepared = prepare(plain(), batches()[0])
    for step in (equalize, correct_bias):
        with pytest.raises(StateError, match="has no scale yet"):
            step(prepared, batches())
        with pytest.raises(UserError, match="needs a prepared model"):
            step(plain(), batches())  # type: ignore[arg-type]
    ready = calibrated(plain())
    with pytest.raises(UserError, match="no layer with a bias"):
        correct_bias(ready, batches(), sites=["2"])
    with pytest.raises(UserError, match="the loader is empty"):
        equalize(ready, [])
