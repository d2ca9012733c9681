"""Integer graphs for torch's quantized CPU engines compute torch's codes: no element differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.errors import QuantizationError
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info
from qgraph.nn import Fused
from qgraph.numerics import quantize
from qgraph.quantization import freeze
from qgraph.targets import Target, parse_target
from tests.conformance import engine_x86
from tests.conformance.x86_cases import Chance, assign, input_scale

pytestmark = [
    pytest.mark.skipif(engine_x86.available() is not None, reason=str(engine_x86.available())),
    pytest.mark.filterwarnings("ignore:.*are deprecated and will be removed"),
]

TARGETS = list(engine_x86.ENGINES)
ROUNDS = 3  # one of three without ties

Net = tuple[Callable[[], nn.Module], list[tuple[int, ...]]]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


class Residual(nn.Module):
    """Two convolutions with a short cut, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.a = nn.Sequential(nn.Conv2d(20, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(20, 20, 3, 1, 1), nn.BatchNorm2d(20))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        result: torch.Tensor = self.head(F.relu(x + self.b(self.a(x))))
        return result


class Mobile(nn.Module):
    """An inverted residual whose depthwise convolution has more than 100 groups, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 104, 1, bias=False), nn.BatchNorm2d(104), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(104, 104, 3, 1, 1, groups=104), nn.BatchNorm2d(104), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(104, 104, 1), nn.ReLU6())
        self.project = nn.Conv2d(104, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * self.squeeze(y))  # type: ignore[no-any-return]


def conv2d(*args: Any, shape: tuple[int, ...] = (2, 6, 9, 7), act: nn.Module | None = None, **options: Any) -> Net:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(*args, **options), *([] if act is None else [act]))

    return make, [shape]


def call(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> Net:
    return lambda: Call(function), list(shapes)


NETS: dict[str, Net] = {
    "conv": conv2d(6, 10, 3, padding=1),
    "conv without bias": conv2d(6, 10, 3, bias=False, stride=2),
    "conv relu": conv2d(6, 33, 3, padding=2, dilation=2, act=nn.ReLU()),
    "conv relu6": conv2d(6, 10, (1, 3), act=nn.ReLU6()),
    "pointwise": conv2d(40, 24, 1, act=nn.ReLU(), shape=(2, 40, 5, 5)),
    "one channel": conv2d(3, 1, 3, shape=(1, 3, 8, 8)),
    "grouped": conv2d(12, 24, 3, groups=4, padding=1, shape=(2, 12, 6, 6)),
    "depthwise 3": conv2d(16, 16, 3, groups=16, padding=1, shape=(2, 16, 9, 8)),
    "depthwise 5": conv2d(8, 16, 5, groups=8, padding=2, stride=2, shape=(2, 8, 9, 8), act=nn.ReLU()),
    "depthwise 7": conv2d(8, 8, 7, groups=8, padding=3, bias=False, shape=(1, 8, 9, 8)),
    "depthwise of 12": conv2d(12, 12, 3, groups=12, padding=1, shape=(1, 12, 9, 8)),
    "depthwise, valid": conv2d(16, 16, 3, groups=16, shape=(1, 16, 9, 8)),
    "104 groups": conv2d(104, 104, 3, groups=104, padding=1, shape=(1, 104, 6, 6), act=nn.ReLU6()),
    "112 groups of 2": conv2d(224, 112, 3, groups=112, padding=1, shape=(1, 224, 4, 4)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 9, 3, padding=1), nn.ReLU()), [(2, 6, 20)]),
    "linear": (lambda: nn.Linear(50, 17), [(7, 50)]),
    "linear relu": (lambda: nn.Sequential(nn.Linear(33, 40, bias=False), nn.ReLU()), [(2, 3, 33)]),
    "linear to one": (lambda: nn.Linear(16, 1), [(9, 16)]),
    "add": call(torch.add, (2, 7, 5, 5), (2, 7, 5, 5)),
    "add of rows": call(torch.add, (5, 71), (5, 71)),
    "add relu": call(lambda x, y: F.relu(x + y), (1, 70, 3, 3), (1, 70, 3, 3)),
    "mul": call(torch.mul, (2, 7, 5, 5), (2, 7, 5, 5)),
    "mul by channels": call(lambda x, y: x * y, (2, 7, 5, 5), (2, 7, 1, 1)),
    "cat": call(lambda x, y: torch.cat([x, y], 1), (2, 19, 3, 4), (2, 5, 3, 4)),
    "cat of columns": call(lambda x, y: torch.cat([x, y], 3), (2, 19, 3, 4), (2, 19, 3, 6)),
    "cat of rows": call(lambda x, y: torch.cat([x, y], -1), (9, 19), (9, 3)),
    "relu6": call(lambda x: F.relu6(x), (2, 9, 5, 5)),
    "clamp": call(lambda x: torch.clamp(x, -1.25, 2.125), (2, 9, 5, 5)),
    "max pool": call(lambda x: F.max_pool2d(x, 3, 2, 1), (2, 9, 9, 8)),
    "avg pool": call(lambda x: F.avg_pool2d(x, 2), (2, 37, 6, 8)),
    "avg pool, padded": call(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 18, 6, 8)),
    "avg pool, own counts": call(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 18, 7, 8)),
    "adaptive pool": call(lambda x: F.adaptive_avg_pool2d(x, 1), (2, 37, 6, 7)),
    "adaptive pool of parts": call(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 21, 7, 5)),
    "nearest": call(lambda x: F.interpolate(x, size=(9, 5)), (2, 9, 6, 7)),
    "nearest exactly": call(lambda x: F.interpolate(x, size=(4, 9), mode="nearest-exact"), (2, 9, 6, 7)),
    "twice as large": call(lambda x: F.interpolate(x, scale_factor=2.0), (2, 9, 6, 7)),
    "sigmoid": call(torch.sigmoid, (2, 71)),
    "hardsigmoid": call(lambda x: F.hardsigmoid(x), (1, 9, 5, 5)),
    "tanh": call(torch.tanh, (1, 9, 5, 5)),
    "gelu": call(lambda x: F.gelu(x), (3, 70)),
    "hardswish": call(lambda x: F.hardswish(x), (2, 9, 5, 5)),
    "leaky relu": call(lambda x: F.leaky_relu(x, 0.25), (2, 9, 5, 5)),
    "moves": call(
        lambda x: torch.cat([x[:, 1:5].flatten(2), x.transpose(2, 3).chunk(2, 1)[0].flatten(2)], 1), (2, 8, 4, 6)
    ),
    "two scales": call(lambda x, y: x + F.relu(x * y), (1, 30, 5, 5), (1, 30, 5, 5)),
    "residual": (Residual, [(2, 3, 32, 32)]),
    "mobile": (Mobile, [(1, 16, 7, 7)]),
}


@lru_cache(maxsize=4)
def prepared(name: str, target: str) -> tuple[fx.GraphModule, list[tuple[int, ...]]]:
    make, shapes = NETS[name]
    torch.manual_seed(0)
    return qgraph.prepare(make().eval(), tuple(torch.randn(shape) for shape in shapes), target=target), shapes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETS)
def test_codes_are_those_of_the_engine(name: str, target: str) -> None:
    graph, shapes = prepared(name, target)
    compared = 0
    for seed in range(ROUNDS):
        chance = Chance(seed, ties=seed % 3 != 0)
        assign(graph, chance)
        inputs = tuple(chance.input(shape, input_scale(graph, i)) for i, shape in enumerate(shapes))
        compared += check_equal(graph, inputs, f"{name} on {target}, seed {seed}")
    assert compared > ROUNDS


def check_equal(graph: fx.GraphModule, inputs: tuple[torch.Tensor, ...], what: str) -> int:
    """Compares every quantized site on the engine and in every kernel set; the number of sites compared."""
    frozen, integer = freeze(graph), qgraph.convert(graph)
    assert not [info(node).float_reason for node in frozen.graph.nodes if info(node).float_reason]
    expected = engine_x86.run(frozen, inputs)
    compared = 0
    for kernels in ("reference", "fast"):
        ours = qgraph.Simulator(integer, kernels=kernels).run(*inputs, record=True).values
        shared = [site for site in expected if site in ours and expected[site].dtype is torch.uint8]
        assert len(shared) >= len(inputs) + 1
        for site in shared:
            wrong = int((ours[site] != expected[site]).sum())
            assert ours[site].shape == expected[site].shape
            assert wrong == 0, f"{what}, {kernels}: {wrong} of {expected[site].numel()} codes of {site} differ"
        compared += len(shared)
    return compared


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_whole_networks(name: str, target: str) -> None:
    torch.manual_seed(0)
    models: Any = import_module("tools.bench.models")
    model = models.ResNet(models.BasicBlock, (2, 2, 2, 2)) if name == "resnet18" else models.MobileNetV2()
    x = torch.randn(2, 3, 64, 64)
    graph = qgraph.prepare(model.eval(), x, target=target)
    qgraph.calibrate(graph, [x])
    assert check_equal(graph, (x,), f"{name} on {target}") > 40
    chance = Chance(1, ties=True)
    assign(graph, chance)
    assert check_equal(graph, (chance.input(tuple(x.shape), input_scale(graph, 0)),), f"{name} on {target}") > 40


@pytest.mark.parametrize("target", TARGETS)
def test_convolutions_of_any_geometry(target: str) -> None:
    """Channels, kernels, strides, paddings, dilations and groups at random."""
    for seed in range(12):
        chance = Chance(seed, ties=True)
        groups = (1, 1, 2, 4, 8, 16)[chance.integer(0, 5)]
        inputs, outputs = groups * chance.integer(1, 3), groups * chance.integer(1, 3)
        kernel = (chance.integer(1, 5), chance.integer(1, 5))
        square = chance.integer(0, 1)
        module = nn.Conv2d(
            inputs,
            outputs,
            kernel[0] if square else kernel,
            stride=chance.integer(1, 2),
            padding=min(chance.integer(0, 2), kernel[0] - 1, kernel[0 if square else 1] - 1),
            dilation=chance.integer(1, 2),
            groups=groups,
            bias=bool(chance.integer(0, 3)),
        )
        net = nn.Sequential(module, [nn.ReLU(), nn.ReLU6(), nn.Identity()][chance.integer(0, 2)]).eval()
        shape = (chance.integer(1, 2), inputs, chance.integer(9, 14), chance.integer(9, 14))
        graph = qgraph.prepare(net, torch.randn(shape), target=target)
        for again in range(3):
            chance = Chance(100 * seed + again, ties=again > 0)
            assign(graph, chance)
            check_equal(graph, (chance.input(shape, input_scale(graph, 0)),), f"{module} on {target}, {seed}, {again}")


@pytest.mark.parametrize(("name", "target"), [("depthwise 3", "x86-fbgemm"), ("104 groups", "x86")])
def test_pairs_saturate_only_where_weights_are_large(name: str, target: str) -> None:
    graph, shapes = prepared(name, target)
    chance = Chance(0, ties=False)
    for reach, operator in ((60, "conv"), (127, "conv_pairs")):
        assign(graph, chance)
        fused = next(module for module in graph.modules() if isinstance(module, Fused))
        _largest_weights(fused, reach)
        called = [integer_name(node.target) for node in qgraph.convert(graph).graph.nodes]
        assert operator in called
        x = chance.input(shapes[0], input_scale(graph, 0)).abs()
        check_equal(graph, (x,), f"{name}, weights up to {reach}")


def _largest_weights(module: Any, reach: int) -> None:
    codes = quantize(module.weight.detach(), module.weight_fake_quant.observer.known)
    with torch.no_grad():
        limited = codes.clamp(-reach, reach)
        limited[0, 0] = reach
        module.weight.copy_(limited * module.weight_fake_quant.observer.known.scale.reshape(-1, 1, 1, 1))


REFUSED: dict[str, tuple[Net, str]] = {
    "a product with a number": (call(lambda x: F.relu(x) * 2.5, (2, 8)), "no mul of codes and a number"),
    "a sum with a number": (call(lambda x: F.relu(x) + 2.5, (2, 8)), "adds no numbers"),
    "shapes that differ": (call(lambda x, y: F.relu(x) + y, (2, 8, 3, 3), (2, 8, 1, 1)), "of one shape only"),
    "bilinear": (
        call(lambda x: F.interpolate(F.relu(x), scale_factor=2.0, mode="bilinear"), (1, 3, 4, 4)),
        "only copies codes where it resizes",
    ),
    "one image without batch": (call(lambda x: F.avg_pool2d(F.relu(x), 2), (3, 4, 4)), "batches of images only"),
    "gelu by tanh": (call(lambda x: F.gelu(F.relu(x), approximate="tanh"), (3, 4)), "no such gelu"),
    "elu": (call(lambda x: F.elu(F.relu(x)), (3, 4)), "has no elu"),
    "a mean": (call(lambda x: F.relu(x).mean((2, 3)), (1, 3, 4, 4)), "has no mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_words_do_not_describe_stays_in_float(name: str) -> None:
    (make, shapes), reason = REFUSED[name]
    graph = qgraph.prepare(make().eval(), tuple(torch.randn(shape) for shape in shapes), target="x86")
    reasons = [str(info(node).float_reason) for node in graph.graph.nodes if info(node).float_reason]
    assert any(reason in found for found in reasons), reasons


def test_weights_with_one_scale_are_refused() -> None:
    graph = qgraph.prepare(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5), target=one_scale())
    qgraph.calibrate(graph, [torch.randn(1, 3, 5, 5)])
    with pytest.raises(QuantizationError, match="one scale for all channels"):
        qgraph.convert(graph)


def one_scale() -> Target:
    return parse_target('name = "mine"\nbase = "x86"\n[weights]\nper_channel = false', origin="mine.toml")
