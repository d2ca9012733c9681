"""Quantization-aware training: the loss falls, and what was trained is what the integers compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph import default_qat_qconfig_setter
from qgraph.analysis import compare_sites
from qgraph.errors import QuantizationError
from qgraph.quantization import FakeQuantState, calibrate, convert, prepare, set_fake_quantize
from qgraph.simulator import Simulator
from tests.support.models import Residual, image


def task() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x, x.mean((1, 2, 3)).mul(20).clamp(-2, 2).round().long() + 2


def train(gm: fx.GraphModule, steps: int = 30) -> list[float]:
    x, y = task()
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=[False, True], ids=["at once", "after calibration"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, fx.GraphModule, list[float]]:
    torch.manual_seed(0)
    model = Residual().eval()
    gm = prepare(model, image(), default_qat_qconfig_setter)
    if request.param:
        calibrate(gm, [task()[0]], progress=False)
    set_fake_quantize(gm, FakeQuantState.QAT)
    gm.train()
    return model, gm, train(gm)


def test_the_loss_falls_and_the_integers_follow(trained: tuple[nn.Module, fx.GraphModule, list[float]]) -> None:
    _, gm, losses = trained
    assert losses[-1] < 0.7 * losses[0], losses
    x, y = task()
    integer = convert(gm)
    set_fake_quantize(gm, FakeQuantState.VALIDATION)
    sites = compare_sites(gm, integer, (x,))
    for site in sites:
        if site.format != "int32":
            assert site.largest <= 1, site
    rounded = [site for site in sites if site.format != "int32"]
    assert sum(site.differing for site in rounded) <= 0.001 * sum(site.elements for site in rounded)
    with torch.no_grad():
        simulated = gm(x)
    computed = Simulator(integer)(x)
    assert F.cross_entropy(computed, y).item() < 0.75 * losses[0]
    assert (computed.argmax(1) == simulated.argmax(1)).float().mean() >= 0.95


def test_every_parameter_learns(trained: tuple[nn.Module, fx.GraphModule, list[float]]) -> None:
    model, gm, _ = trained
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in gm.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_the_rounded_network() -> None:
    """Straight through the rounding, through the weights and activations that were rounded."""
    gm = prepare(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    x = torch.randn(6, 4)
    calibrate(gm, [x], progress=False)
    set_fake_quantize(gm, FakeQuantState.QAT)
    incoming = torch.randn(6, 3)
    gm(x).backward(incoming)
    linear, scale = gm.get_submodule("0"), gm.quantizers.input_quant.scale
    rounded = torch.round(x * (1 / scale)).clamp(-128, 127) * scale
    codes = torch.round(linear.weight.detach() / linear.weight_fake_quant.scale[:, None])
    torch.testing.assert_close(linear.weight.grad, (incoming.t() @ rounded) * ((codes >= -128) & (codes <= 127)))
    torch.testing.assert_close(linear.bias.grad, incoming.sum(0))


def test_training_that_breaks_names_the_site() -> None:
    gm = prepare(Residual().eval(), image(), default_qat_qconfig_setter)
    set_fake_quantize(gm, FakeQuantState.QAT)
    with torch.no_grad():
        gm.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"site conv1\.weight"):
        gm(image())


def test_a_trained_state_goes_on_elsewhere() -> None:
    first, second = (prepare(Residual().eval(), image(), default_qat_qconfig_setter) for _ in range(2))
    set_fake_quantize(first, FakeQuantState.QAT)
    train(first, 3)
    second.load_state_dict(first.state_dict())
    set_fake_quantize(second, FakeQuantState.QAT)
    assert train(first, 3) == train(second, 3)
