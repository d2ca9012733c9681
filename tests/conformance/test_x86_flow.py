"""The same model through torch's own quantization and through ours, with torch's scales: equal results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.ir.node_info import info, module_of
from qgraph.nn import Fused
from qgraph.numerics import QParams, qint8, quantize, quint8
from qgraph.quantization.fake_quantize import FakeQuantize
from tests.conformance import engine_x86
from tests.conformance.x86_cases import Given

pytestmark = [
    pytest.mark.skipif(engine_x86.available() is not None, reason=str(engine_x86.available())),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Net(nn.Module):
    """Convolutions with batch norm, a sum, a pool, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 24), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = torch.relu(x + self.bn3(self.conv3(y)))
        x = torch.flatten(self.pool(x), 1)
        result: torch.Tensor = self.fc2(F.relu(self.fc1(x)))
        return result


def warmed(net: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    """Batch norms that have seen data."""
    net.train()
    with torch.no_grad():
        for x in data:
            net(x)
    return net.eval()


def by_torch(model: nn.Module, data: list[torch.Tensor]) -> fx.GraphModule:
    """What users of torch do."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (data[0],))
    with torch.no_grad():
        for x in data:
            prepared(x)
    return convert_fx(prepared)


def scales_of(quantized: fx.GraphModule) -> list[tuple[float, int, Any]]:
    """Scale and zero point of every result torch rounds, in order of execution, and the module that has weights."""
    found: list[tuple[float, int, Any]] = []
    for node in quantized.graph.nodes:
        if node.op == "call_function" and node.target is torch.quantize_per_tensor:
            found.append((*(_constant(quantized, arg) for arg in node.args[1:3]), None))
        elif node.op == "call_module" and hasattr(quantized.get_submodule(str(node.target)), "scale"):
            module: Any = quantized.get_submodule(str(node.target))
            found.append((float(module.scale), int(module.zero_point), module))
        elif node.op == "call_function" and node.target is torch.ops.quantized.add_relu:
            found.append((*(_constant(quantized, arg) for arg in node.args[2:4]), None))
    return found


def _constant(gm: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(gm, str(node.target)).item()


def take_over(graph: fx.GraphModule, scales: list[tuple[float, int, Any]]) -> None:
    """Gives our sites, in the same order, torch's scales, zero points, and weights' scales."""
    left, seen = list(scales), set()
    for node in graph.graph.nodes:
        users = [module_of(user) for user in node.users if user.op == "call_module"]
        quantizer = next((module for module in users if isinstance(module, FakeQuantize)), None)
        if quantizer is None or id(quantizer) in seen:
            continue
        seen.add(id(quantizer))
        scale, zero, theirs_module = left.pop(0)
        quantizer.observer = Given(QParams(torch.tensor(scale), quint8, torch.tensor(zero)))
        fused: Any = module_of(node) if node.op == "call_module" else None
        assert isinstance(fused, Fused) == (theirs_module is not None), info(node).site
        if isinstance(fused, Fused):
            theirs, theirs_bias = theirs_module.weight(), theirs_module.bias().detach()
            mine = QParams(theirs.q_per_channel_scales().float(), qint8, axis=0)
            assert isinstance(fused.weight_fake_quant, FakeQuantize)
            fused.weight_fake_quant.observer = Given(mine)
            weight: Any = fused.weight
            _same_values(weight, theirs.dequantize(), float(mine.scale.max()))
            assert torch.equal(quantize(weight.detach(), mine), theirs.int_repr())
            _same_values(fused.bias, theirs_bias, 1e-5)
    assert not left


def _same_values(ours: Any, theirs: torch.Tensor, within: float) -> None:
    """Folding a batch norm is float arithmetic, whose last bit depends on the order; ours are theirs from here on."""
    assert float((ours.detach() - theirs).abs().max()) <= within
    with torch.no_grad():
        ours.copy_(theirs)


@pytest.mark.parametrize("seed", range(4))
def test_a_users_model(seed: int) -> None:
    torch.manual_seed(seed)
    data = [torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last) for _ in range(4)]
    model = warmed(Net(), data)
    before = torch.backends.quantized.engine
    threads = torch.get_num_threads()
    try:
        torch.backends.quantized.engine = "x86"
        torch.set_num_threads(1)
        quantized = by_torch(model, data)
        expected = [quantized(x) for x in data]
    finally:
        torch.backends.quantized.engine = before
        torch.set_num_threads(threads)
    graph = qgraph.prepare(model, data[0], target="x86")
    take_over(graph, scales_of(quantized))
    simulator = qgraph.Simulator(qgraph.convert(graph, strict=True))
    for x, theirs in zip(data, expected, strict=True):
        ours = simulator(x)
        assert torch.equal(ours, theirs)
        assert len(torch.unique(ours)) > 20
