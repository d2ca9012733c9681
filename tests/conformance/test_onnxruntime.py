"""Integer graphs for the target onnxruntime compute onnxruntime's codes at every site: no element differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph import info
from qgraph.quantization import freeze
from qgraph.simulator import KERNEL_SETS
from tests.conformance import engine_onnxruntime as engine
from tests.export.nets import Mixed, Sequence, on_ties, prepared, real_inputs, seek_ties

pytestmark = pytest.mark.skipif(engine.available() is not None, reason=str(engine.available()))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


IMAGE, ROWS = (2, 6, 9, 7), (3, 12)
UNSIGNED = qgraph.get_target("onnxruntime")
SIGNED = replace(UNSIGNED, eight_bits=qgraph.qint8)
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(6, 5, 3),
    "strides": lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), bias=False),
    "dilated": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "relu": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()),
    "relu6": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU6()),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 5, 4, 3, 2), nn.ReLU()),
}
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x[:, :3] + x[:, 3:],
    "sum_broadcast": lambda x: x + x[:, :1, :1],
    "sum_broadcast_first": lambda x: x[..., :1] + x,
    "sum_number": lambda x: x + 0.3,
    "number_minus": lambda x: 0.7 - x,
    "minus_number": lambda x: torch.sigmoid(x) * 3 - 1.1,
    "product": lambda x: x[:, :3] * x[:, 3:],
    "product_channels": lambda x: x * x.mean((2, 3), keepdim=True),
    "product_number": lambda x: x * -1.7,
    "cat": lambda x: torch.cat([x, F.relu(x), torch.tanh(x)], 2),
    "stack": lambda x: torch.stack([x, torch.exp(-0.1 * x)], 1),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "rsqrt": lambda x: torch.rsqrt(F.relu(x) + 0.1),
    "sqrt": lambda x: torch.sqrt(F.relu(x)),
    "erf": torch.erf,
    "floor": lambda x: torch.floor(x * 3) + torch.ceil(x),
    "round": lambda x: torch.round(x * 2) * torch.sign(x),
    "relu_alone": lambda x: F.relu(torch.tanh(x)),
    "relu6_alone": lambda x: F.relu6(x * 2),
    "clamp": lambda x: x.clamp(-0.7, 1.1),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool_ceil": lambda x: F.max_pool2d(x, (2, 3), 2, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 2),
    "mean": lambda x: x.mean((2, 3)),
    "global_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "whole_window": lambda x: F.avg_pool2d(x, (9, 7)),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pad_number": lambda x: F.pad(x, (1, 2), value=0.4),
    "moves": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1).expand(-1, 2, -1, -1)[:, :, 3:, ::2],
    "parts": lambda x: sum(x.split([1, 2, 3], 1)[1:2]) * 2.0,
    "select": lambda x: x.select(2, 1).narrow(1, 2, 3).squeeze(),
}


def compare(model: nn.Module, example: torch.Tensor, seed: int) -> None:
    """Checks every site, with all kernel sets."""
    torch.manual_seed(seed)
    gm = prepared(model, example, target=SIGNED if seed % 4 >= 2 else UNSIGNED)
    if seed % 3:
        seek_ties(gm, "few bits" if seed % 3 == 1 else "common")
    x = real_inputs(gm, tuple(example.shape)) if seed % 3 else example * 1.5
    compare_prepared(gm, x, optimized=bool(seed % 2))


def compare_prepared(gm: fx.GraphModule, x: torch.Tensor, *, optimized: bool) -> None:
    frozen, integer = freeze(gm), qgraph.convert(gm)
    theirs = engine.run(frozen, (x,), optimized=optimized)
    assert theirs.keys() >= {info(node).site for node in frozen.graph.nodes if info(node).plan is not None}
    for kernels in KERNEL_SETS:
        ours = qgraph.Simulator(integer, kernels=kernels).run(x, record=True).values
        for site, codes in theirs.items():
            wrong = int((ours[site] != codes).sum())
            assert wrong == 0, f"{kernels}, {site}: {wrong} of {codes.numel()} differ"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, seed: int) -> None:
    compare(CONVOLUTIONS[name](), torch.randn(IMAGE), seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, seed: int) -> None:
    compare(Call(FUNCTIONS[name]), torch.randn(IMAGE), seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool, seed: int) -> None:
    compare(nn.Sequential(nn.Linear(12, 7, bias=bias), nn.ReLU(), nn.Linear(7, 300)), torch.randn(ROWS), seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 8, 3), lambda: nn.Linear(7, 20)], ids=["conv", "linear"])
def test_products_on_ties(make: Callable[[], nn.Module], seed: int) -> None:
    """Factors that are powers of two only in float32."""
    torch.manual_seed(seed)
    gm = prepared(make(), torch.randn(IMAGE), target=SIGNED if seed % 2 else UNSIGNED)
    on_ties(gm)
    compare_prepared(gm, real_inputs(gm, IMAGE), optimized=True)


@pytest.mark.parametrize("seed", range(6))
def test_networks(seed: int) -> None:
    compare(Mixed(), torch.randn(2, 3, 12, 10), seed)
    compare(Sequence(), torch.randn(2, 6, 12), seed)
