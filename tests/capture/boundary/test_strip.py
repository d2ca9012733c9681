"""`jit_strip` keeps what lies between the stubs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgraph import (
    CaptureError,
    DeQuantStub,
    PrepareMethod,
    QuantStub,
    Simulator,
    calibrate,
    convert,
    graph_info,
    info,
    prepare,
    trace,
)


class _Deployed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = nn.Conv2d(3, 4, 3)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def network(self, y: torch.Tensor) -> torch.Tensor:
        return self.dequant(self.conv(self.quant(y)) + self.shift.abs())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.interpolate((x - 0.5) / 0.2, scale_factor=2.0)
        return torch.softmax(self.network(y), 1)


def test_what_is_outside_the_stubs_is_dropped() -> None:
    model = _Deployed().eval()
    gm = trace(model, torch.randn(2, 3, 6, 6), PrepareMethod.JIT_STRIP)
    sites = [info(node).site for node in gm.graph.nodes if node.op.startswith("call")]
    assert sites == ["input_guard", "quant", "conv", "_generated_abs_0", "_generated_add_0", "dequant"]
    assert graph_info(gm).method == "jit_strip"
    y = torch.randn(5, 3, 12, 12)
    assert torch.equal(gm(y), model.network(y))


def test_a_stripped_model_goes_the_whole_way() -> None:
    gm = prepare(_Deployed().eval(), torch.randn(2, 3, 6, 6), method="jit_strip")
    batch = torch.randn(2, 3, 12, 12)
    calibrate(gm, [batch], progress=False)
    assert torch.equal(Simulator(convert(gm))(batch), gm(batch))


def test_inputs_that_are_not_preprocessed_keep_their_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.other, self.dequant = QuantStub(), QuantStub(), DeQuantStub()

        def forward(self, image: torch.Tensor, depth: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": self.dequant(self.quant(image) + self.other(depth * 2))}

    gm = trace(Two().eval(), (torch.randn(2, 3), torch.randn(2, 3)), "jit_strip")
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    assert sorted(names) == ["generated_mul_0_input", "image"]
    image, depth = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(gm(image=image, generated_mul_0_input=depth)["sum"], image + depth)


def test_a_batch_size_read_outside_is_read_inside() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = QuantStub(), DeQuantStub()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dequant(self.quant(x * 2).reshape(x.shape[0], 2, -1).transpose(0, 1))

    gm = trace(Flat().eval(), torch.randn(2, 8), "jit_strip")
    x = torch.randn(3, 8)
    assert torch.equal(gm(x), x.reshape(3, 2, 4).transpose(0, 1))


def test_without_stubs_there_is_nothing_to_keep() -> None:
    with pytest.raises(CaptureError, match="nothing between a QuantStub and a DeQuantStub"):
        trace(nn.Linear(3, 3).eval(), torch.randn(2, 3), "jit_strip")


def test_writes_between_the_stubs_are_refused() -> None:
    class Writes(_Deployed):
        def network(self, y: torch.Tensor) -> torch.Tensor:
            found = self.quant(y)
            flat = found.view(-1)
            flat.resize_(4)
            return self.dequant(flat)

    with pytest.raises(CaptureError):
        trace(Writes().eval(), torch.randn(2, 3, 6, 6), "jit_strip")
