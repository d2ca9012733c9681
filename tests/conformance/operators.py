"""The calls programs are made of: how each is spelled, when it fits, and how its numbers are drawn.

Sizes are small, so that a plain-integer oracle can follow, unless `large` is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Options = dict[str, Any]


class Chance(random.Random):
    """Everything random in a case; `large` draws sizes no oracle could follow."""

    large = False

    def likely(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, small: int, large: int, least: int = 1) -> int:
        return self.randint(least, large if self.large else small)

    def divisor(self, value: int) -> int:
        return self.choice([n for n in range(1, value + 1) if value % n == 0])


@dataclass(frozen=True)
class Operator:
    """One way to call something.

    Args:
        needs: canonical operators that the target and the engine must have.
        ranks: ranks of the first operand; empty for any.
        call, module: texts, as in `Step`.
        draw: numbers for the texts, from the first operand's shape; None if it does not fit.
        other: shape of a second operand; None for one operand.
        least: as in `Step`.
        weight: how often it is drawn.
        macs: products per element of the result, from options and the operand's shape.
    """

    needs: tuple[str, ...]
    call: str
    ranks: tuple[int, ...] = ()
    module: str | None = None
    draw: Callable[[Chance, Shape], Options | None] = lambda chance, shape: {}
    other: Callable[[Chance, Shape], Shape] | None = None
    least: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    macs: Callable[[Options, Shape], int] = lambda options, shape: 1


def _conv(rank: int) -> Callable[[Chance, Shape], Options | None]:
    def draw(chance: Chance, shape: Shape) -> Options | None:
        channels, sizes = shape[1], shape[2:]
        groups = chance.choice([1, 1, channels, chance.divisor(channels)])
        kernel = tuple(chance.choice([1, 2, 3, 3, 5]) for _ in range(rank))
        dilation = tuple(chance.choice([1, 1, 2]) for _ in range(rank))
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(chance.randint(0, min(2, r // 2)) for r in reach)
        if any(size + 2 * p < r for size, p, r in zip(sizes, padding, reach, strict=True)):
            return None
        return {
            "out": groups * chance.size(3 if groups == 1 else 2, 24 if groups < 4 else 2),
            "kernel": kernel,
            "stride": tuple(chance.choice([1, 1, 2, 3]) for _ in range(rank)),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": chance.likely(0.7),
        }

    return draw


def _transposed(chance: Chance, shape: Shape) -> Options | None:
    groups = chance.choice([1, chance.divisor(shape[1])])
    stride = (chance.randint(1, 3), chance.randint(1, 2))
    kernel = (chance.randint(1, 3), chance.randint(1, 3))
    return {
        "out": groups * chance.size(2, 12),
        "kernel": kernel,
        "stride": stride,
        "padding": (min(chance.randint(0, 1), kernel[0] // 2), 0),
        "extra": tuple(chance.randint(0, s - 1) for s in stride),
        "groups": groups,
        "bias": chance.likely(0.7),
    }


_CONV_LEAST = {"out": 1, "kernel": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "extra": 0, "bias": False}


def _conv_text(kind: str, extra: str = "dilation={dilation}") -> str:
    return (
        f"nn.{kind}({{c}}, {{out}}, {{kernel}}, stride={{stride}}, padding={{padding}}, {extra}, "
        "groups={groups}, bias={bias})"
    )


def _conv_macs(options: Options, shape: Shape) -> int:
    taps = 1
    for size in options["kernel"]:
        taps *= size
    return int(taps * max(shape[1] // options["groups"], 1))


def _pool(chance: Chance, shape: Shape) -> Options | None:
    kernel = (chance.choice([1, 2, 2, 3, 4]), chance.choice([1, 2, 2, 3, 4]))
    if shape[2] < kernel[0] or shape[3] < kernel[1]:
        return None
    padding = (chance.randint(0, kernel[0] // 2), chance.randint(0, kernel[1] // 2))
    return {
        "kernel": kernel,
        "stride": (chance.randint(1, 3), chance.randint(1, 3)),
        "padding": padding,
        "ceil": chance.likely(0.3),
        "counted": chance.likely(0.5),
    }


def _unpadded_pool(chance: Chance, shape: Shape) -> Options | None:
    options = _pool(chance, shape)
    return None if options is None else {**options, "padding": (0, 0), "ceil": False, "counted": True}


_POOL_LEAST = {"kernel": 1, "stride": 1, "padding": 0, "ceil": False, "counted": True}


def _same(chance: Chance, shape: Shape) -> Shape:
    return shape


def _broadcasting(chance: Chance, shape: Shape) -> Shape:
    if chance.likely(0.6):
        return shape
    return tuple(1 if axis and chance.likely(0.5) else size for axis, size in enumerate(shape))


def _columns(chance: Chance, shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], chance.size(4, 40))


def _rows(chance: Chance, shape: Shape) -> Options | None:
    return {} if len(shape) > 2 or shape[0] > 0 else None


def _clamp(chance: Chance, shape: Shape) -> Options:
    low = chance.choice([-2.0, -0.75, 0.0])
    return {"low": low, "high": low + chance.choice([0.5, 2.0, 7.25])}


def _axis_slice(chance: Chance, shape: Shape) -> Options | None:
    if shape[1] < 2:
        return None
    first = chance.randint(0, shape[1] - 2)
    return {"first": first, "last": chance.randint(first + 1, shape[1])}


def _padding(chance: Chance, shape: Shape) -> Options:
    return {"pads": tuple(chance.randint(0, 2) for _ in range(4))}


def _mean(chance: Chance, shape: Shape) -> Options:
    return {"keep": chance.likely(0.5)}


def _two(chance: Chance, shape: Shape) -> Options | None:
    return {} if shape[1] % 2 == 0 else None


OPERATORS: dict[str, Operator] = {
    "conv1d": Operator(
        ("conv1d",),
        "self.{name}({0})",
        (3,),
        _conv_text("Conv1d"),
        _conv(1),
        least=_CONV_LEAST,
        weight=10,
        macs=_conv_macs,
    ),
    "conv2d": Operator(
        ("conv2d",),
        "self.{name}({0})",
        (4,),
        _conv_text("Conv2d"),
        _conv(2),
        least=_CONV_LEAST,
        weight=16,
        macs=_conv_macs,
    ),
    "conv_transpose2d": Operator(
        ("conv_transpose2d",),
        "self.{name}({0})",
        (4,),
        _conv_text("ConvTranspose2d", "output_padding={extra}"),
        _transposed,
        least=_CONV_LEAST,
        weight=2,
        macs=_conv_macs,
    ),
    "linear": Operator(
        ("linear",),
        "self.{name}({0})",
        (2, 3),
        "nn.Linear({k}, {out}, bias={bias})",
        lambda chance, shape: {"out": chance.size(4, 40), "bias": chance.likely(0.7)},
        least={"out": 1, "bias": False},
        weight=10,
        macs=lambda options, shape: shape[-1],
    ),
    "matmul": Operator(
        ("matmul",),
        "torch.matmul({0}, {1})",
        (2, 3, 4),
        other=_columns,
        weight=2,
        macs=lambda options, shape: shape[-1],
    ),
    "add": Operator(("add",), "{0} + {1}", other=_broadcasting, weight=4),
    "sub": Operator(("sub",), "{0} - {1}", other=_broadcasting),
    "mul": Operator(("mul",), "{0} * {1}", other=_broadcasting, weight=3),
    "relu": Operator(("relu",), "F.relu({0})", weight=2),
    "relu6": Operator(("relu6",), "F.relu6({0})", weight=2),
    "clamp": Operator(("clamp",), "torch.clamp({0}, {low}, {high})", draw=_clamp),
    "sigmoid": Operator(("sigmoid",), "torch.sigmoid({0})"),
    "tanh": Operator(("tanh",), "torch.tanh({0})"),
    "silu": Operator(("silu",), "F.silu({0})"),
    "gelu": Operator(("gelu",), "F.gelu({0})"),
    "hardswish": Operator(("hardswish",), "F.hardswish({0})"),
    "leaky_relu": Operator(("leaky_relu",), "F.leaky_relu({0}, 0.125)"),
    "softmax": Operator(("amax", "sub", "exp", "sum", "reciprocal", "mul"), "torch.softmax({0}, -1)"),
    "max_pool2d": Operator(
        ("max_pool2d",),
        "F.max_pool2d({0}, {kernel}, {stride}, {padding}, ceil_mode={ceil})",
        (4,),
        draw=_pool,
        least=_POOL_LEAST,
        weight=2,
    ),
    "avg_pool2d": Operator(
        ("avg_pool2d",),
        "F.avg_pool2d({0}, {kernel}, {stride}, {padding}, {ceil}, {counted})",
        (4,),
        draw=_pool,
        least=_POOL_LEAST,
        weight=5,
    ),
    "plain_avg_pool2d": Operator(
        ("avg_pool2d",), "F.avg_pool2d({0}, {kernel}, {stride})", (4,), draw=_unpadded_pool, least=_POOL_LEAST, weight=2
    ),
    "adaptive_avg_pool2d": Operator(
        ("adaptive_avg_pool2d",),
        "F.adaptive_avg_pool2d({0}, {size})",
        (4,),
        draw=lambda chance, shape: {"size": (chance.randint(1, 3), chance.randint(1, 3))},
        least={"size": 1},
        weight=2,
    ),
    "global_avg_pool": Operator(("adaptive_avg_pool2d",), "F.adaptive_avg_pool2d({0}, 1)", (4,), weight=2),
    "mean": Operator(("mean",), "{0}.mean((2, 3), keepdim={keep})", (4,), draw=_mean, weight=2),
    "row_mean": Operator(("mean",), "{0}.mean(-1, keepdim={keep})", (2, 3), draw=_mean, weight=2),
    "cat": Operator(("cat",), "torch.cat([{0}, {1}], 1)", (2, 3, 4), other=_same, weight=2),
    "pad": Operator(("pad",), "F.pad({0}, {pads})", (4,), draw=_padding, least={"pads": 0}, weight=3),
    "nearest": Operator(("interpolate",), "F.interpolate({0}, scale_factor=2.0, mode='nearest')", (4,)),
    "bilinear": Operator(
        ("interpolate",),
        "F.interpolate({0}, size={size}, mode='bilinear', align_corners={align})",
        (4,),
        draw=lambda chance, shape: {"size": (chance.randint(1, 5), chance.randint(1, 5)), "align": chance.likely(0.4)},
        least={"size": 1, "align": False},
    ),
    "slice": Operator(("slice",), "{0}[:, {first}:{last}]", (2, 3, 4), draw=_axis_slice),
    "chunk": Operator(("chunk", "item"), "torch.chunk({0}, 2, 1)[1]", (2, 3, 4), draw=_two),
    "transpose": Operator(("transpose",), "torch.transpose({0}, 1, 2)", (3, 4)),
    "permute": Operator(("permute",), "{0}.permute(0, 2, 3, 1)", (4,), weight=0.5),
    "flatten": Operator(("flatten",), "torch.flatten({0}, 1)", (3, 4)),
    "flatten_space": Operator(("flatten",), "torch.flatten({0}, 2)", (4,)),
    "unsqueeze": Operator(("unsqueeze",), "{0}.unsqueeze(1)", (2, 3), weight=0.5),
}
