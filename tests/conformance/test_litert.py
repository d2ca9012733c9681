"""Integer graphs for target litert compute LiteRT's codes: no element of any site differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.numerics import QType, parse_arithmetic, parse_quantize_rule, qint8, qint16
from qgraph.quantization import convert, freeze
from qgraph.simulator import KERNEL_SETS, Simulator
from qgraph.targets import Target, get_target
from tests.conformance import engine_litert
from tests.conformance.litert_cases import Call, Draw, every_code, give_scale, inputs_at_ties, prepared
from tests.conformance.networks import Mobile, Pyramid, Residual, ResNet18

pytestmark = pytest.mark.skipif(engine_litert.available() is not None, reason=str(engine_litert.available()))

SEEDS = (0, 3)  # with ties, and without
Shapes = list[tuple[int, ...]]
Net = tuple[Callable[[], nn.Module], Shapes]


def differing(net: Net, seed: int, output: QType, target: Target | str = "litert") -> tuple[int, dict[str, int]]:
    """How many elements were compared, and the sites at which some differ."""
    make, shapes = net
    draw = Draw(seed, ties=seed % 4 != 3)
    gm = prepared(make(), tuple(draw.normal(shape) for shape in shapes), draw, output, target)
    inputs = inputs_at_ties(gm, shapes, draw)
    integer, theirs = convert(gm), engine_litert.run(freeze(gm), inputs)
    wrong: dict[str, int] = {}
    for kernels in KERNEL_SETS:
        ours = Simulator(integer, kernels=kernels).run(*inputs, record=True).values
        for site, codes in theirs.items():
            assert (ours[site].shape, ours[site].dtype) == (codes.shape, codes.dtype), site
            count = int((ours[site] != codes).sum())
            if count:
                wrong[f"{kernels}: {site}"] = count
    return sum(codes.numel() for codes in theirs.values()), wrong


def check(net: Net, output: QType, seeds: Iterable[int] = SEEDS) -> None:
    for seed in seeds:
        compared, wrong = differing(net, seed, output)
        assert compared > 0
        assert not wrong, f"seed {seed}, {compared} elements compared: {wrong}"


def layer(make: Callable[[], nn.Module], *shapes: tuple[int, ...], act: nn.Module | None = None) -> Net:
    return lambda: nn.Sequential(make(), *([] if act is None else [act])), list(shapes)


def call(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Net:
    return lambda: Call(function), list(shapes)


X = (2, 6, 9, 7)
ROW = (3, 20)
SMALL: dict[str, Net] = {
    "conv": layer(lambda: nn.Conv2d(6, 10, 3), X),
    "conv relu": layer(lambda: nn.Conv2d(6, 5, 3, padding=1), X, act=nn.ReLU()),
    "conv relu6": layer(lambda: nn.Conv2d(6, 5, (1, 3), padding=(0, 1)), X, act=nn.ReLU6()),
    "conv stride": layer(lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), X),
    "conv dilation": layer(lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=(3, 2)), X),
    "conv groups": layer(lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), X),
    "conv 7x7": layer(lambda: nn.Conv2d(3, 4, 7, stride=2, padding=3), (1, 3, 16, 16)),
    "depthwise": layer(lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), X, act=nn.ReLU6()),
    "depthwise multiplier": layer(lambda: nn.Conv2d(6, 12, 3, stride=2, groups=6, padding=1, bias=False), X),
    "transposed": layer(lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), X),
    "transposed relu": layer(lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), X, act=nn.ReLU()),
    "linear": layer(lambda: nn.Linear(20, 30), ROW),
    "linear relu": layer(lambda: nn.Linear(20, 30, bias=False), (2, 5, 20), act=nn.ReLU()),
    "linear long": layer(lambda: nn.Linear(2048, 7), (2, 2048)),
    "matmul": call(lambda x, y: x @ y, (2, 5, 9), (2, 9, 4)),
    "add": call(lambda x, y: x + y, X, X),
    "add broadcast": call(lambda x, y: x + y, X, (1, 6, 1, 1)),
    "add itself": call(lambda x: x + x, X),
    "sub": call(lambda x, y: x - y, X, X),
    "mul": call(lambda x, y: x * y, X, X),
    "mul broadcast": call(lambda x, y: x * y, X, (2, 6, 1, 1)),
    "mul number": call(lambda x: x * 0.37, X),
    "mul negative": call(lambda x: x * -2.5, X),
    "div number": call(lambda x: x / 3.0, X),
    "relu": call(F.relu, X),
    "relu6": call(F.relu6, X),
    "clamp": call(lambda x: x.clamp(-0.7, 1.1), X),
    "max pool": call(lambda x: F.max_pool2d(x, 3, 2, 1), X),
    "max pool ceil": call(lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), X),
    "avg pool": call(lambda x: F.avg_pool2d(x, 2), X),
    "avg pool overlapping": call(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), X),
    "avg pool 3x2": call(lambda x: F.avg_pool2d(x, (3, 2), (1, 2)), X),
    "mean": call(lambda x: x.mean((2, 3)), X),
    "mean channels": call(lambda x: x.mean(1, keepdim=True), X),
    "mean last": call(lambda x: x.mean(-1), (4, 5, 768)),
    "global average": call(lambda x: F.adaptive_avg_pool2d(x, 1), X),
    "amax": call(lambda x: x.amax((2, 3)), X),
    "amin": call(lambda x: x.amin(1, keepdim=True), X),
    "maximum": call(torch.maximum, X, X),
    "minimum": call(torch.minimum, X, (1, 6, 1, 1)),
    "pixel shuffle": call(lambda x: F.pixel_shuffle(x, 2), (1, 8, 3, 3)),
    "resize nearest": call(lambda x: F.interpolate(x, scale_factor=2.0), X),
    "resize nearest size": call(lambda x: F.interpolate(x, size=(5, 11)), X),
    "resize bilinear": call(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), X),
    "resize bilinear size": call(lambda x: F.interpolate(x, size=(5, 16), mode="bilinear"), X),
    "resize corners": call(lambda x: F.interpolate(x, size=(13, 4), mode="bilinear", align_corners=True), X),
    "cat": call(lambda x, y: torch.cat([x, y], 1), X, (2, 3, 9, 7)),
    "stack": call(lambda x, y: torch.stack([x, y], 1), ROW, ROW),
    "pad": call(lambda x: F.pad(x, (1, 2, 0, 3)), X),
    "pad number": call(lambda x: F.pad(x, (1, 2, 0, 3), value=0.3), X),
    "moves": call(lambda x: x.transpose(1, 2)[:, 1:5].flatten(2).chunk(2, -1)[1].flip(1), X),
    "softmax": call(lambda x: F.softmax(x, -1), (4, 6, 33)),
    "softmax channels": call(lambda x: F.softmax(x * 3, 1), X),
    "sigmoid": call(torch.sigmoid, (40, 50)),
    "tanh": call(torch.tanh, (40, 50)),
    "exp": call(torch.exp, (40, 50)),
    "leaky relu": call(lambda x: F.leaky_relu(x, 0.1), (40, 50)),
    "leaky relu negative": call(lambda x: F.leaky_relu(x, -0.3), (40, 50)),
}
EIGHT_BITS: dict[str, Net] = {
    "hardswish": call(F.hardswish, (40, 50)),
    "log": call(lambda x: x.sigmoid().log(), (40, 50)),
    "gelu": call(F.gelu, (40, 50)),
    "gelu tanh": call(lambda x: F.gelu(x, approximate="tanh"), (40, 50)),
}


@pytest.mark.parametrize("output", [qint8, qint16], ids=str)
@pytest.mark.parametrize("name", list(SMALL))
def test_operator(name: str, output: QType) -> None:
    check(SMALL[name], output)


@pytest.mark.parametrize("name", list(EIGHT_BITS))
def test_operator_of_eight_bits(name: str) -> None:
    check(EIGHT_BITS[name], qint8)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "leaky relu": lambda x: F.leaky_relu(x, 0.07),
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu6": F.relu6,
}
OF_EIGHT_BITS = ("hardswish", "gelu", "gelu tanh")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        (name, output)
        for name in FUNCTIONS
        for output in (qint8, qint16)
        if output == qint8 or name not in OF_EIGHT_BITS
    ],
)
def test_function_at_every_code(name: str, output: QType) -> None:
    for seed in range(6):
        draw = Draw(seed, ties=seed % 2 == 0)
        gm = prepared(Call(FUNCTIONS[name]), (draw.normal((256, 1 << (output.bits - 8))),), draw, output)
        if draw.ties and output == qint16:
            give_scale(gm, 2.0 ** -(11 + seed // 2))  # the engine has shifts for some powers of two
        values = every_code(gm)
        theirs = engine_litert.run(freeze(gm), (values,))
        ours = Simulator(convert(gm)).run(values, record=True).values
        assert len(theirs) == 2
        for site, codes in theirs.items():
            assert torch.equal(ours[site], codes), (seed, site)


NETS: dict[str, Net] = {
    "residual": (Residual, [(2, 3, 24, 20)]),
    "mobile": (Mobile, [(2, 6, 12, 10)]),
    "pyramid": (Pyramid, [(1, 3, 12, 16)]),
}


@pytest.mark.parametrize("output", [qint8, qint16], ids=str)
@pytest.mark.parametrize("name", list(NETS))
def test_network(name: str, output: QType) -> None:
    check(NETS[name], output)


@pytest.mark.parametrize("output", [qint8, pytest.param(qint16, marks=pytest.mark.slow)], ids=str)
def test_resnet18(output: QType) -> None:
    check((ResNet18, [(1, 3, 64, 64)]), output, seeds=(0,))


@pytest.mark.slow
@pytest.mark.parametrize("output", [qint8, qint16], ids=str)
@pytest.mark.parametrize("name", [*SMALL, *NETS])
def test_many_rounds(name: str, output: QType) -> None:
    check({**SMALL, **NETS}[name], output, seeds=range(20))


OTHER_WORDS = [
    ("conv", qint8, "product", "int32:wrap/fixed_point:31:half_even"),
    ("conv", qint8, "product", "int32:wrap/fixed_point_two:31:half_up:half_up"),
    ("conv", qint16, "conv2d.product.int16", "int32:wrap/gemmlowp"),
    ("matmul", qint16, "matmul.product.int16", "int32:wrap/gemmlowp"),
    ("linear", qint8, "linear.product", "int32:wrap/gemmlowp"),
    ("linear", qint16, "linear.product.int16", "int48:wrap/tflite_int64"),
    ("add", qint8, "sum", "int32:wrap/fixed_point:31:half_even"),
    ("sub", qint16, "sum", "int32:wrap/fixed_point:31:half_even"),
    ("mean", qint8, "mean.product", "int32:wrap/gemmlowp"),
    ("global average", qint16, "adaptive_avg_pool2d.product", "int32:wrap/gemmlowp"),
    ("avg pool", qint8, "avg_pool2d.product", "int32:wrap/gemmlowp"),
    ("resize bilinear", qint8, "sample", "int39:wrap/fixed_point:24:half_even"),
    ("cat", qint8, "rescale", "int32:wrap/fixed_point:31:half_even"),
]


@pytest.mark.parametrize(("name", "output", "key", "word"), OTHER_WORDS)
def test_another_rule_would_be_noticed(name: str, output: QType, key: str, word: str) -> None:
    target = get_target("litert")
    assert key in target.arithmetic
    other = replace(target, arithmetic={**target.arithmetic, key: parse_arithmetic(word)})
    assert any(differing(SMALL[name], seed, output, other)[1] for seed in range(24))


@pytest.mark.parametrize(("name", "key"), [("mul", "mul"), ("relu6", "relu6")])
def test_another_precision_of_factors_would_be_noticed(name: str, key: str) -> None:
    target = get_target("litert")
    assert target.factors[f"{key}.factors"] == "float32"
    other = replace(target, factors={**target.factors, f"{key}.factors": "float64"})
    assert any(differing(SMALL[name], seed, qint16, other)[1] for seed in range(64))


def test_another_way_to_quantize_would_be_noticed() -> None:
    for rule in ("reciprocal:half_away:int32", "divide:half_even:int32", "divide:half_away"):
        other = replace(get_target("litert"), quantize_rule=parse_quantize_rule(rule))
        assert any(differing(SMALL["relu"], seed, qint8, other)[1] for seed in range(24)), rule
