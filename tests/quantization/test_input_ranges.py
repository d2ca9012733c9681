"""Scales of inputs: widened where the values then fall on codes, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgraph.ir.node_info import graph_info
from qgraph.quantization import QConfig, calibrate, prepare
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.sites import quantizers


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3)).eval()


def grey(levels: int, sign: int = 1) -> torch.Tensor:
    """Images whose values are multiples of `1 / levels`, both ends included."""
    values = torch.randint(0, levels + 1, (4, 1, 8, 8)) / levels * sign
    values[0, 0, 0, :2] = torch.tensor([0.0, float(sign)])
    return values


def site(data: list[torch.Tensor], fit: bool = True, **settings: object) -> tuple[FakeQuantize, tuple[str, ...]]:
    prepared = prepare(model(), data[0], QConfig(**settings))  # type: ignore[arg-type]
    calibrate(prepared, data, progress=False, fit_inputs=fit)
    found = next(one for one in quantizers(prepared) if isinstance(one, FakeQuantize) and one.site.endswith("quant"))
    return found, graph_info(prepared).notes


@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_sixteen_steps_become_exact(sign: int) -> None:
    data = grey(16, sign)
    quantizer, notes = site([data])
    if sign < 0:  # -128 is a code, so that nothing was lost
        assert quantizer.scale.item() == 1 / 128
        assert not notes
    else:
        assert quantizer.scale.item() == pytest.approx(1 / 112)
        assert "error of the calibration data is" in notes[0]
    assert torch.allclose(quantizer(data), data, atol=1e-6)


def test_it_can_be_switched_off() -> None:
    quantizer, notes = site([grey(16)], fit=False)
    assert quantizer.scale.item() == 1 / 128
    assert not notes


def test_random_values_keep_their_range() -> None:
    data = torch.randn(8, 1, 8, 8)
    quantizer, notes = site([data])
    assert quantizer.scale.item() == data.abs().max().item() / 128
    assert not notes


@pytest.mark.parametrize(
    "settings", [{"output": "int16"}, {"fixed_scale": 0.01}, {"activation_observer": "moving_average"}]
)
def test_other_sites_are_left_alone(settings: dict[str, object]) -> None:
    first, _ = site([grey(16)], **settings)
    second, notes = site([grey(16)], fit=False, **settings)
    assert first.qtype == second.qtype
    assert not notes
    assert first.scale.item() == second.scale.item()


def test_a_second_calibration_changes_nothing() -> None:
    data = grey(16)
    prepared = prepare(model(), data)
    scales = []
    for _ in range(2):
        calibrate(prepared, [data], progress=False)
        scales.append([one.scale.tolist() for one in quantizers(prepared) if isinstance(one, FakeQuantize)])
    assert scales[0] == scales[1]
    assert len(graph_info(prepared).notes) == 1
