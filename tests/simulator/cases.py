"""Cases for the integer operators: drawn from a seed, and drawn towards trouble.

Codes prefer the ends of their format, factors prefer halves (so that roundings meet ties), the largest multipliers and
the longest shifts, and accumulators are often narrow. `CASES` has one generator per operator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.oracle.arithmetic import Counts, encode, encode_sum, parse_format, parse_word
from tests.oracle.operators import OPERANDS, call

STORAGE = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
ROUNDINGS = ("half_even", "half_up", "half_away", "floor")
NARROW_ACCUMULATORS = (16, 24)


@dataclass(frozen=True)
class Case:
    """One call of one operator."""

    operator: str
    arguments: tuple[torch.Tensor | None, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"KERNELS[{self.operator!r}]("]
        for argument in self.arguments:
            text = "None" if argument is None else f"torch.tensor({argument.tolist()}, dtype={argument.dtype})"
            lines.append(f"    {text if len(text) < 4000 else text[:4000] + '...'},")
        lines += [f"    {name}={value!r}," for name, value in self.options.items()]
        return "\n".join([*lines, ")"])


@dataclass(frozen=True)
class Factors:
    """The rescaling arguments of one operator; a sum has several multipliers."""

    multipliers: tuple[torch.Tensor, ...]
    shift: torch.Tensor | None


class Draw:
    """Everything random in a case comes from here."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    # --- words, formats and bounds ---

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def integers(self, count: int, low: int, high: int) -> list[int]:
        return [self.integer(low, high) for _ in range(count)]

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def rule(self, *, is_sum: bool = False) -> str:
        rounding = self.one_of(*ROUNDINGS)
        rules = [f"fixed_point:{self.one_of(24, 31, 16, 8)}:{rounding}"] * 3
        rules += [f"power_of_two:{rounding}", f"float:{rounding}"]
        if not is_sum:
            rules += [f"fixed_point_two:31:{rounding}:{self.one_of(*ROUNDINGS)}"] * 2
        return self.one_of(*rules)

    def word(self, *, is_sum: bool = False, accumulates: bool = True) -> str:
        rule = self.rule(is_sum=is_sum)
        name, *rest = rule.split(":")
        widest = 64 if name == "float" else 63 - (int(rest[0]) if name == "fixed_point" else 31)
        bits = self.one_of(*(NARROW_ACCUMULATORS if accumulates and self.chance(0.3) else (32, widest)))
        return f"int{bits}:{self.one_of('wrap', 'saturate')}/{rule}"

    def output(self, *formats: str) -> dict[str, Any]:
        """A format and bounds: none, those of relu, those of relu6, or any."""
        name = self.one_of(*(formats or ("int8", "int8", "uint8", "int16", "int32")))
        target = parse_format(name)
        low, high = target.low, target.high
        kind = self.one_of("none", "none", "relu", "relu6", "any")
        if kind in ("relu", "relu6"):
            low = 0
        if kind == "relu6":
            high = self.integer(1, high)
        if kind == "any":
            low, high = sorted(self.integers(2, low, high))
        return {"low": low, "high": high, "format": name}

    # --- tensors ---

    def shape(self, rank: int, largest: int = 3) -> list[int]:
        return self.integers(rank, 1, largest)

    def tensor(self, values: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Values in a shape, now and then not contiguous in memory."""
        result = torch.tensor(list(values), dtype=dtype).reshape(list(shape))
        if result.dim() > 1 and self.chance(0.3):
            result = result.transpose(0, -1).contiguous().transpose(0, -1)
        return result

    def code(self, name: str, kind: str) -> int:
        target = parse_format(name)
        if kind == "ends":
            return self.one_of(target.low, target.low, target.high, target.low + 1, 0)
        if kind == "highest":
            return target.high
        if kind == "lowest":
            return target.low
        if kind == "small":
            return self.integer(max(-9, target.low), 9)
        return self.integer(target.low, target.high)

    def codes(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        kind = self.one_of("uniform", "uniform", "small", "small", "ends", "lowest", "highest")
        count = int(torch.Size(shape).numel())
        return self.tensor([self.code(name, kind) for _ in range(count)], shape, STORAGE[name])

    def operand(self, shape: Sequence[int], *formats: str) -> torch.Tensor:
        return self.codes(self.one_of(*(formats or ("int8", "uint8", "int16"))), shape)

    # --- factors ---

    def factors(self, text: str, shape: Sequence[int] = (), terms: int = 1, extra_shift: int = 0) -> Factors:
        """Multipliers (one tensor per term) and their common shift, all of one shape."""
        word = parse_word(text)
        count = int(torch.Size(shape).numel())
        kind = self.one_of("ties", "ties", "encoded", "extreme", "saturating")
        drawn = [self.factor(word.rule, word.bits or 31, kind, terms, extra_shift) for _ in range(count)]
        storage = torch.float32 if word.in_float else self.one_of(torch.int32, torch.int64)
        multipliers = tuple(
            self.tensor([multipliers[term] for multipliers, _ in drawn], shape, storage) for term in range(terms)
        )
        if word.in_float:
            return Factors(multipliers, None)
        shift = self.tensor([shift for _, shift in drawn], shape, self.one_of(torch.int32, torch.int64))
        return Factors(multipliers, shift)

    def factor(self, rule: str, bits: int, kind: str, terms: int, extra_shift: int) -> tuple[list[Any], int]:
        if rule == "float":
            return [self.float_factor(kind, extra_shift) for _ in range(terms)], 0
        if rule == "power_of_two":
            return self.power_of_two(kind, terms, extra_shift)
        if kind == "ties":
            return self.tying_factor(rule, bits, terms, extra_shift)
        if kind == "extreme":
            largest = (1 << bits) - 1
            multipliers = [self.one_of(largest, -largest, 1, -1, 0, largest - 1) for _ in range(terms)]
            return multipliers, self.one_of(0, 1, 2, 29, 30, 31, 32, 33, 47, 61, 62)
        reals = [self.real(kind, extra_shift) for _ in range(terms)]
        if terms == 1:
            multiplier, shift = encode(reals[0], bits)
            return [multiplier], max(shift, 0)
        multipliers, shift = encode_sum(reals, bits)
        return (multipliers, shift) if shift >= 0 else ([1] * terms, 0)

    def real(self, kind: str, extra_shift: int) -> float:
        """A factor as quantization makes them, or one too large for the result."""
        exponent = self.integer(0, 8) if kind == "saturating" else self.integer(-16, 1)
        sign = -1 if self.chance(0.2) else 1
        return sign * (1 + self.random.random()) * 2.0 ** (exponent - extra_shift)

    def tying_factor(self, rule: str, bits: int, terms: int, extra_shift: int) -> tuple[list[int], int]:
        """Odd multiples of small negative powers of two, in any of their encodings."""
        shift = self.integer(1, 5)
        odd = [2 * self.integer(-4, 4) + 1 for _ in range(terms)]
        room = bits - 4
        lift = self.one_of(0, 0, self.integer(0, room), room)
        if rule == "fixed_point_two" and self.chance(0.5):
            lift = 31 - shift - self.integer(0, 1)
            lift = min(lift, bits - 4)
        return [value << lift for value in odd], min(shift + lift + extra_shift, 62)

    def power_of_two(self, kind: str, terms: int, extra_shift: int) -> tuple[list[int], int]:
        if kind == "saturating":
            return [1 << self.integer(0, 20) for _ in range(terms)], 0
        shift = self.one_of(0, 30, 31, 32, 62) if kind == "extreme" else self.integer(0, 6) + extra_shift
        return [self.one_of(1, 1, -1) if terms > 1 else 1 for _ in range(terms)], shift

    def float_factor(self, kind: str, extra_shift: int) -> float:
        if kind == "ties":
            return (2 * self.integer(-4, 4) + 1) / 2.0 ** (self.integer(1, 5) + extra_shift)
        if kind == "extreme":
            return self.one_of(0.0, -0.0, 1.0, -1.0, 2.0**-62, 2.0**30, -(2.0**40), 1.0e-40)
        return float(torch.tensor(self.real(kind, extra_shift), dtype=torch.float32))


# --- borders -------------------------------------------------------------------------------------------------------


def quantize_case(draw: Draw) -> Case:
    name = draw.one_of("int8", "int16", "int32")
    scale = torch.tensor(draw.one_of(1.0, 0.5, 2.0**-10, 0.1, 1 / 3, draw.random.random() + 1e-3, 3.7e-5, 1.5e6))
    target = parse_format(name)
    values = [(draw.code(name, draw.one_of("uniform", "small", "ends")) + 0.5) * scale.item() for _ in range(12)]
    values += [draw.code(name, "ends") * scale.item() for _ in range(4)]
    values += [draw.random.uniform(2 * target.low, 2 * target.high) * scale.item() for _ in range(4)]
    values += [draw.random.gauss(0, 20) * scale.item() for _ in range(8)]
    values += [0.0, -0.0, 3.4e38, -3.4e38, float("inf"), float("-inf"), 1e-45, 2.0**31]
    return Case("quantize", (draw.tensor(values, [2, 3, 6], torch.float32), scale), {"format": name})


def dequantize_case(draw: Draw) -> Case:
    rank = draw.integer(1, 4)
    x = draw.operand(draw.shape(rank), "int8", "int16", "int32")
    axis = draw.integer(-rank, rank - 1)
    count = draw.one_of(None, x.shape[axis])
    scales = [abs(draw.random.gauss(0, 1)) * 10.0 ** draw.integer(-6, 3) + 1e-8 for _ in range(count or 1)]
    return Case("dequantize", (x, draw.tensor(scales, [] if count is None else [count], torch.float32)), {"axis": axis})


# --- products ------------------------------------------------------------------------------------------------------


def product_arguments(
    draw: Draw, out: Sequence[int], axis: int
) -> tuple[tuple[torch.Tensor | None, ...], dict[str, Any]]:
    """Bias, residual, multiplier, shift, residual multiplier; arithmetic, low, high, format."""
    channels = out[axis]
    bias = None if draw.chance(0.3) else draw.operand([channels], "int32", "int8")
    bias = None if bias is None else bias.to(torch.int32)
    kind = draw.one_of("plain", "plain", "residual", "none")
    text = draw.word(is_sum=kind == "residual")
    if kind == "none":
        return (bias, None, None, None, None), {"arithmetic": text, **draw.output("int32")}
    shape = draw.one_of([], [channels])
    factors = draw.factors(text, shape, 2 if kind == "residual" else 1)
    options = {"arithmetic": text, **draw.output()}
    if kind == "plain":
        return (bias, None, factors.multipliers[0], factors.shift, None), options
    residual = draw.operand(out)
    return (bias, residual, factors.multipliers[0], factors.shift, factors.multipliers[1]), options


def conv_case(draw: Draw) -> Case:
    rank = draw.one_of(1, 2, 2, 2, 3)
    small = 2 if rank == 3 else 3
    groups = draw.integer(1, 3)
    inputs, outputs = (1, 1) if draw.chance(0.3) else (draw.integer(1, 2), draw.integer(1, 2))
    kernel, stride = draw.integers(rank, 1, small), draw.integers(rank, 1, 3)
    padding, dilation = draw.integers(rank, 0, 2), draw.integers(rank, 1, 2)
    transposed = draw.chance(0.3)
    output_padding = [0] * rank
    if transposed:
        size, padding, output_padding = transposed_sizes(draw, kernel, stride, padding, dilation, small)
        weight_shape = [groups * inputs, outputs, *kernel]
    else:
        size = [
            max(1, (draw.integer(1, small) - 1) * stride[a] + dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a])
            + draw.integer(0, 1)
            for a in range(rank)
        ]
        weight_shape = [groups * outputs, inputs, *kernel]
    x = draw.operand([draw.integer(1, 2 if rank == 3 else 3), groups * inputs, *size])
    weight = draw.operand(weight_shape)
    geometry = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": output_padding,
        "transposed": transposed,
        "groups": groups,
    }
    out = [x.shape[0], groups * outputs, *convolved(size, kernel, geometry)]
    arguments, options = product_arguments(draw, out, 1)
    return Case("conv", (x, weight, *arguments), {**geometry, **options})


def conv_pairs_case(draw: Draw) -> Case:
    kernel, stride, padding = draw.integers(2, 1, 3), draw.integers(2, 1, 2), draw.integers(2, 0, 2)
    size = [max(1, kernel[a] - 2 * padding[a]) + draw.integer(0, 2) for a in range(2)]
    channels, per_channel = draw.integer(1, 3), draw.integer(1, 2)
    x = draw.operand([draw.integer(1, 2), channels, *size], "uint8")
    weight = draw.operand([channels * per_channel, 1, *kernel], "int8")
    geometry = {"stride": stride, "padding": padding}
    bias = None if draw.chance(0.3) else draw.operand([channels * per_channel], "int32", "int8")
    text = draw.word()
    factors = draw.factors(text, draw.one_of([], [channels * per_channel]))
    arguments = (x, weight, None if bias is None else bias.to(torch.int32), factors.multipliers[0], factors.shift)
    return Case("conv_pairs", arguments, {**geometry, "arithmetic": text, **draw.output()})


def transposed_sizes(
    draw: Draw, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], small: int
) -> tuple[list[int], list[int], list[int]]:
    """Input sizes, and paddings that leave at least one output."""
    rank = len(kernel)
    size = draw.integers(rank, 1, small)
    extra = [draw.integer(0, max(stride[a], dilation[a]) - 1) for a in range(rank)]
    full = [(size[a] - 1) * stride[a] + dilation[a] * (kernel[a] - 1) + extra[a] for a in range(rank)]
    return size, [min(padding[a], full[a] // 2) for a in range(rank)], extra


def convolved(size: list[int], kernel: list[int], geometry: dict[str, Any]) -> list[int]:
    """Sizes of the result, asked of torch itself."""
    rank = len(size)
    module = torch.ops.aten.convolution.default
    x = torch.zeros([1, 1, *size], device="meta")
    weight = torch.zeros([1, 1, *kernel], device="meta")
    one = [geometry[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding")]
    return list(module(x, weight, None, *one, 1).shape[-rank:])


def linear_case(draw: Draw) -> Case:
    inputs, outputs = draw.integer(1, 9), draw.integer(1, 4)
    outer = draw.shape(draw.integer(0, 3))
    arguments, options = product_arguments(draw, [*outer, outputs], -1)
    x, weight = draw.operand([*outer, inputs]), draw.operand([outputs, inputs])
    return Case("linear", (x, weight, *arguments), options)


def matmul_case(draw: Draw) -> Case:
    m, n, k = draw.integer(1, 3), draw.integer(1, 3), draw.integer(1, 9)
    b, c = draw.integer(1, 3), draw.integer(1, 3)
    left, right = draw.one_of(
        ([m, k], [k, n]),
        ([b, m, k], [b, k, n]),
        ([b, m, k], [k, n]),
        ([m, k], [b, k, n]),
        ([b, 1, m, k], [c, k, n]),
        ([b, c, m, k], [1, c, k, n]),
        ([k], [k, n]),
        ([b, m, k], [k]),
        ([k], [b, k, n]),
        ([k], [k]),
    )
    text = draw.word()
    x, y = draw.operand(left), draw.operand(right)
    if draw.chance(0.2):
        return Case("matmul", (x, y, None, None), {"arithmetic": text, **draw.output("int32")})
    factors = draw.factors(text)
    return Case("matmul", (x, y, factors.multipliers[0], factors.shift), {"arithmetic": text, **draw.output()})


# --- elementwise ---------------------------------------------------------------------------------------------------


def requantize_case(draw: Draw) -> Case:
    text = draw.word(is_sum=draw.chance(0.5), accumulates=False)
    with_offset = parse_word(text).rule != "fixed_point_two" and draw.chance(0.6)
    n, c, h = draw.shape(3)
    shape, parameters = draw.one_of(
        ([n, c, h, 2], []),
        ([n, c, h, 2], [c, 1, 1]),
        ([n, c, h, 2], [1, c, 1, 1]),
        ([n, c], [c]),
        ([n, 1], [c]),
        ([], []),
    )
    x = draw.operand(shape, "int8", "int16", "int16", "int32")
    factors = draw.factors(text, parameters)
    offset = None
    if with_offset:
        count = int(torch.Size(parameters).numel())
        storage = torch.float32 if factors.shift is None else torch.int64
        offset = draw.tensor([offset_of(draw, factors) for _ in range(count)], parameters, storage)
    options = {"arithmetic": text, **draw.output()}
    return Case("requantize", (x, factors.multipliers[0], factors.shift, offset), options)


def offset_of(draw: Draw, factors: Factors) -> int | float:
    """An offset that makes a tie, a plain one, or a large one."""
    if factors.shift is None:
        return draw.one_of(0.5, -0.5, draw.integer(-9, 9), 1 / 3, float(draw.integer(-(1 << 26), 1 << 26)))
    shift = int(factors.shift.flatten()[0])
    half = (1 << shift) >> 1
    return draw.one_of(
        half, -half, 3 * half if shift < 61 else half, draw.integer(-9, 9), draw.integer(-(1 << 50), 1 << 50)
    )


def broadcasting_shapes(draw: Draw) -> tuple[list[int], list[int]]:
    n, c, h = draw.shape(3)
    return draw.one_of(
        ([n, c, h], [n, c, h]),
        ([n, c, h], [c, 1]),
        ([1, c, 1], [n, 1, h]),
        ([h], [n, c, h]),
        ([n, c], []),
        ([], []),
    )


def add_case(draw: Draw) -> Case:
    text = draw.word(is_sum=True, accumulates=False)
    left, right = broadcasting_shapes(draw)
    factors = draw.factors(text, [], 2)
    x, y = (draw.operand(shape, "int8", "int16", "int16", "int32") for shape in (left, right))
    return Case("add", (x, y, *factors.multipliers, factors.shift), {"arithmetic": text, **draw.output()})


def mul_case(draw: Draw) -> Case:
    text = draw.word()
    left, right = broadcasting_shapes(draw)
    factors = draw.factors(text)
    x, y = draw.operand(left), draw.operand(right)
    return Case("mul", (x, y, *factors.multipliers, factors.shift), {"arithmetic": text, **draw.output()})


def clamp_case(draw: Draw) -> Case:
    name = draw.one_of("int8", "int16", "int32")
    return Case("clamp", (draw.codes(name, draw.shape(draw.integer(0, 4))),), draw.output(name))


# --- tables --------------------------------------------------------------------------------------------------------


def lookup_case(draw: Draw) -> Case:
    source = draw.one_of("int8", "int8", "int16")
    target = draw.one_of("int8", "int16", "int32")
    bits = parse_format(source).bits
    intervals = draw.one_of(None, 1 << draw.integer(0, bits - 1), 1 << (bits - 4))
    size = 1 << bits if intervals is None else intervals + 1
    table = torch.tensor([draw.code(target, draw.one_of("uniform", "ends", "small")) for _ in range(size)])
    x = torch.cat([draw.codes(source, [20]), draw.codes(source, [20])]).reshape(2, 4, 5)
    return Case("lookup", (x, table.to(STORAGE[target])), {"source": source})


# --- windows and reductions ----------------------------------------------------------------------------------------


def outer_shape(draw: Draw) -> list[int]:
    return draw.shape(draw.one_of(2, 2, 1))


def max_pool_case(draw: Draw) -> Case:
    rank = draw.one_of(1, 2, 2, 3)
    kernel, stride, dilation = draw.integers(rank, 1, 3), draw.integers(rank, 1, 3), draw.integers(rank, 1, 2)
    padding = [draw.integer(0, size // 2) for size in kernel]
    size = [
        max(dilation[a], dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a]) + draw.integer(0, 2) for a in range(rank)
    ]
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw.chance(0.5),
    }
    return Case("max_pool", (draw.operand([*outer_shape(draw), *size]),), options)


def avg_pool_case(draw: Draw) -> Case:
    rank = draw.one_of(1, 2, 2, 3)
    kernel, stride = draw.integers(rank, 1, 3), draw.integers(rank, 1, 3)
    padding = [draw.integer(0, size // 2) for size in kernel]
    size = [max(1, kernel[a] - 2 * padding[a]) + draw.integer(0, 3) for a in range(rank)]
    ceil_mode = draw.chance(0.5)
    out = [pooled(size[a], kernel[a], stride[a], padding[a], ceil_mode) for a in range(rank)]
    text = draw.word()
    factors = draw.factors(text, draw.one_of([], out))
    x = draw.operand([*outer_shape(draw), *size])
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "output_size": out, "arithmetic": text}
    return Case("avg_pool", (x, *factors.multipliers, factors.shift), {**options, **draw.output()})


def pooled(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Length of a pooled axis, asked of torch itself."""
    return torch.nn.functional.avg_pool1d(torch.zeros(1, size), kernel, stride, padding, ceil_mode).shape[-1]


def adaptive_avg_pool_case(draw: Draw) -> Case:
    rank = draw.one_of(1, 2, 2, 3)
    size, out = draw.integers(rank, 1, 6), draw.integers(rank, 1, 4)
    text = draw.word()
    factors = draw.factors(text, draw.one_of([], out))
    x = draw.operand([*outer_shape(draw), *size])
    options = {"output_size": out, "arithmetic": text, **draw.output()}
    return Case("adaptive_avg_pool", (x, *factors.multipliers, factors.shift), options)


def reduce_sum_case(draw: Draw) -> Case:
    rank = draw.integer(1, 4)
    x = draw.operand(draw.shape(rank, 4))
    axes = draw.random.sample(range(rank), draw.integer(1, rank))
    text = draw.word()
    factors = draw.factors(text)
    options = {"dims": [axis - rank if draw.chance(0.5) else axis for axis in axes], "keepdim": draw.chance(0.5)}
    return Case(
        "reduce_sum", (x, *factors.multipliers, factors.shift), {**options, "arithmetic": text, **draw.output()}
    )


# --- resizing ------------------------------------------------------------------------------------------------------


def resize_bilinear_case(draw: Draw) -> Case:
    bits = draw.one_of(11, 11, 8, 1)
    height, width = draw.integers(2, 1, 4)
    text = draw.word()
    factors = draw.factors(text, extra_shift=2 * bits)
    x = draw.operand([draw.integer(1, 3), draw.integer(1, 2), height, width])
    rows, columns = (interpolation(draw, size, bits) for size in (height, width))
    options = {"weight_bits": bits, "arithmetic": text, **draw.output()}
    return Case("resize_bilinear", (x, rows, columns, *factors.multipliers, factors.shift), options)


def interpolation(draw: Draw, size: int, bits: int) -> torch.Tensor:
    """Two neighbours and the weight of the second, for each result along one axis."""
    count = draw.integer(1, 4)
    first = draw.integers(count, 0, size - 1)
    second = [min(index + draw.integer(0, 1), size - 1) for index in first]
    weights = [draw.one_of(0, 1 << bits, 1 << (bits - 1), draw.integer(0, 1 << bits)) for _ in range(count)]
    return torch.tensor([first, second, weights], dtype=draw.one_of(torch.int32, torch.int64))


CASES: dict[str, Callable[[Draw], Case]] = {
    "quantize": quantize_case,
    "dequantize": dequantize_case,
    "requantize": requantize_case,
    "conv": conv_case,
    "conv_pairs": conv_pairs_case,
    "linear": linear_case,
    "matmul": matmul_case,
    "add": add_case,
    "mul": mul_case,
    "clamp": clamp_case,
    "lookup": lookup_case,
    "max_pool": max_pool_case,
    "avg_pool": avg_pool_case,
    "adaptive_avg_pool": adaptive_avg_pool_case,
    "reduce_sum": reduce_sum_case,
    "resize_bilinear": resize_bilinear_case,
}


from tests.simulator.function_cases import FUNCTION_CASES, LOOKUPS  # noqa: E402 - draws with the classes above
from tests.simulator.sampling_cases import MOVES, SAMPLING_CASES  # noqa: E402 - draws with the classes above
from tests.simulator.softmax_cases import softmax_case  # noqa: E402 - draws with the classes above

CASES |= SAMPLING_CASES
CASES |= FUNCTION_CASES
CASES |= {"softmax": softmax_case}


# --- zero points ---------------------------------------------------------------------------------------------------

RESULT_ZERO = tuple(
    name for name in CASES if name not in ("dequantize", "clamp", "lookup", "max_pool", *MOVES, "compare", *LOOKUPS)
)
OPERAND_ZEROS = {"add": ("x", "y"), "mul": ("x", "y"), "matmul": ("x", "y"), "conv": ("x", "residual")}
OPERAND_ZEROS |= {"linear": ("x", "residual"), "quantize": (), "clamp": (), "lookup": (), "max_pool": ()}
OPERAND_ZEROS |= {"softmax": ()}
OPERAND_ZEROS |= {"compare": ("x", "y"), **dict.fromkeys(LOOKUPS, ())}
OPERAND_ZEROS |= dict.fromkeys(MOVES, ())
FORMATS = {dtype: name for name, dtype in STORAGE.items()}


def with_zero_points(draw: Draw, case: Case) -> Case:
    """The case with zero points of 8 and 16 bit operands and results, odd ones and the ends preferred."""
    if draw.chance(0.5):
        return case
    options = dict(case.options)
    if case.operator == "quantize":
        way = draw.one_of("reciprocal", "divide", "reciprocal:before", "divide:before", "reciprocal:fused")
        options["rounding"] = f"{way}:{draw.one_of(*ROUNDINGS)}"
    for name in OPERAND_ZEROS.get(case.operator, ("x",)):
        position = OPERANDS[f"{name}_zero"]
        operand = case.arguments[position]
        if operand is not None and operand.dtype is not torch.int32:
            options[f"{name}_zero"] = draw.code(FORMATS[operand.dtype], draw.one_of("ends", "small", "uniform"))
    raw = case.operator in ("conv", "linear", "matmul") and case.arguments[-1] is None and options["format"] == "int32"
    if case.operator in RESULT_ZERO and options["format"] != "int32" and not raw:
        options["zero"] = draw.code(options["format"], draw.one_of("ends", "small", "uniform"))
    return Case(case.operator, case.arguments, options)


# --- what the oracle says ------------------------------------------------------------------------------------------


def array_of(tensor: torch.Tensor | None) -> np.ndarray | None:
    """A tensor as the container of Python numbers the oracle takes."""
    if tensor is None:
        return None
    array = np.empty(tuple(tensor.shape), dtype=object)
    array[...] = np.array(tensor.tolist(), dtype=object)
    return array


def ask_oracle(case: Case) -> tuple[np.ndarray, Counts]:
    counts = Counts()
    arguments = [array_of(argument) for argument in case.arguments]
    return call(case.operator, arguments, case.options, counts), counts


def drawn(operator: str, seed: int) -> tuple[Case, np.ndarray, Counts]:
    """A case whose numbers all fit 64 bits, and what the oracle says of it."""
    for attempt in range(100):
        draw = Draw(f"{operator}-{seed}-{attempt}")
        case = with_zero_points(draw, CASES[operator](draw))
        expected, counts = ask_oracle(case)
        if counts.widest <= 63:
            return case, expected, counts
    raise AssertionError(f"no narrow case of {operator} for seed {seed}")
