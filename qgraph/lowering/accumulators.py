"""Which sums of an integer graph may leave their accumulator, how many bits they would need, and what would do.

    product   h * P - l * Q + b  and  l * P - h * Q + b   of the rows where they are largest and smallest
    matmul    plus and minus n * max(abs(x)) * max(abs(y))
    window    n * h  and  n * l
with P and Q the sums of a row's positive weights and of its negative ones' magnitudes, l <= 0 and h >= 0 the bounds of
the operand's codes counted from their zero point, b the row's integer bias and n the number of elements added. Some
codes reach the bounds of products and windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, tensor_at, where
from qgraph.ir.op import QuantRule
from qgraph.lowering.options import shape_of
from qgraph.numerics import Arithmetic, parse_arithmetic, qint8, quint8
from qgraph.simulator.fast.exact import largest
from qgraph.simulator.ranges import Range, code_ranges


@dataclass(frozen=True)
class Overflowing:
    """A node whose sums may leave the accumulator.

    Args:
        low, high: bounds of the sums that the operands' codes allow.
        arithmetic: with the accumulator.
        narrowed: sites of the 16-bit operands, where 8 bits would make the sums fit.
    """

    node: fx.Node
    low: int
    high: int
    arithmetic: Arithmetic
    narrowed: tuple[str, ...] = ()

    @property
    def bound(self) -> int:
        """The largest magnitude."""
        return max(self.high, -self.low)

    @property
    def bits(self) -> int:
        """How many bits hold every sum."""
        return max(self.high, -self.low - 1).bit_length() + 1

    @property
    def fix(self) -> str:
        """What would make the sums fit."""
        if self.narrowed:
            return f"int8 codes for {' and '.join(self.narrowed)} would fit"
        return "fewer or smaller terms would fit: a smaller bias, fewer channels, or a target with a wider accumulator"

    def __str__(self) -> str:
        record, word = info(self.node), self.arithmetic
        held = f"its accumulator (int{word.accumulator.bits}:{word.overflow}) holds {word.accumulator.qmax}"
        needed = f"sums may reach {self.bound} and need {self.bits} bits"
        return f"accumulator: {record.site} ({record.op}): {needed}, {held}; {self.fix}"

    @property
    def where(self) -> str:
        """Node, module path and source line."""
        return f"{where(self.node)} ({info(self.node).op}): sums may reach {self.bound}, {self.bits} bits"


def overflowing(gm: fx.GraphModule) -> list[Overflowing]:
    """Every sum of an integer graph that some codes could take out of its accumulator."""
    ranges = code_ranges(gm)
    found = []
    for node in gm.graph.nodes:
        sums_of = _SUMS.get(integer_name(node.target) or "")
        if sums_of is None:
            continue
        arithmetic = parse_arithmetic(str(node.kwargs["arithmetic"]))
        low, high = sums_of(node, gm, ranges)
        if not _fits((low, high), arithmetic):
            narrowed = _narrowed(node, ranges)
            helps = narrowed and _fits(sums_of(node, gm, {**ranges, **narrowed}), arithmetic)
            sites = dict.fromkeys(info(_source(operand)).site for operand in narrowed)
            found.append(Overflowing(node, low, high, arithmetic, tuple(sites) if helps else ()))
    return found


def _fits(sums: Range, arithmetic: Arithmetic) -> bool:
    return arithmetic.accumulator.qmin <= sums[0] and sums[1] <= arithmetic.accumulator.qmax


def _narrowed(node: fx.Node, ranges: Mapping[fx.Node, Range]) -> dict[fx.Node, Range]:
    """Operands with 16-bit codes, with the bounds that codes of 8 bits would have."""
    found = {}
    for operand in node.args[:2]:
        if isinstance(operand, fx.Node) and operand in ranges and operand.op != "get_attr":
            low, high = ranges[operand]
            if high - low > quint8.qmax:
                found[operand] = max(low, qint8.qmin), min(high, qint8.qmax)
    return found


def _source(operand: fx.Node) -> fx.Node:
    """Where an operand's codes were made, before they were moved."""
    while info(operand).op.quant is QuantRule.SAME and operand.args and isinstance(operand.args[0], fx.Node):
        operand = operand.args[0]
    return operand


_Sums = Callable[[fx.Node, fx.GraphModule, Mapping[fx.Node, Range]], Range]


def _counted(node: fx.Node, operand: int, zero: str, ranges: Mapping[fx.Node, Range]) -> Range:
    """Bounds of an operand's codes, counted from the zero point; 0 is among them, as padding adds it."""
    low, high = ranges[node.args[operand]]  # type: ignore[index]
    shift: Any = node.kwargs.get(zero) or 0
    return min(low - shift, 0), max(high - shift, 0)


def _product(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> Range:
    low, high = _counted(node, 0, "x_zero", ranges)
    weight, bias = _tensor(gm, node.args[1]), _tensor(gm, node.args[2])
    assert weight is not None
    bias = None if bias is None or bias.is_floating_point() else bias
    rows = weight
    if node.kwargs.get("transposed"):
        groups: Any = node.kwargs["groups"]
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    terms = math.prod(rows.shape[1:])
    rough = terms * max(-low, high) * (1 << (8 * weight.element_size() - 1)) + largest(bias)
    word = parse_arithmetic(str(node.kwargs["arithmetic"]))
    return (-rough, rough) if rough <= word.accumulator.qmax else _row_sums(rows, low, high, bias)


def _row_sums(rows: torch.Tensor, low: int, high: int, bias: torch.Tensor | None) -> Range:
    """Smallest and largest sum of any row, exact."""
    if not rows.numel():
        return 0, 0
    dims = tuple(range(1, rows.dim()))
    positive = rows.clamp(min=0).sum(dims, dtype=torch.int64)
    negative = positive - rows.sum(dims, dtype=torch.int64)
    added = torch.zeros_like(positive) if bias is None else bias.to(torch.int64)
    smallest = low * positive - high * negative + added
    return int(smallest.min()), int((high * positive - low * negative + added).max())


def _matmul(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> Range:
    sides = [max(map(abs, _counted(node, i, zero, ranges))) for i, zero in enumerate(("x_zero", "y_zero"))]
    bound = int(sides[0] * sides[1] * shape_of(node.args[0])[-1])
    return -bound, bound


def _sum_of(count: Callable[[fx.Node], int]) -> _Sums:
    def sums(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> Range:
        low, high = _counted(node, 0, "x_zero", ranges)
        return count(node) * low, count(node) * high

    return sums


def _window(node: fx.Node) -> int:
    sizes: Any = node.kwargs["kernel_size"]
    return math.prod(sizes)


def _longest_window(node: fx.Node) -> int:
    """Windows reach from `floor(i * L / n)` to `ceil((i + 1) * L / n)`."""
    sizes: Any = node.kwargs["output_size"]
    lengths = shape_of(node.args[0])[-len(sizes) :]
    along = zip(lengths, sizes, strict=True)
    return math.prod(max(-(-(i + 1) * n // k) - i * n // k for i in range(k)) for n, k in along)


def _reduced(node: fx.Node) -> int:
    shape = shape_of(node.args[0])
    dims: Any = node.kwargs["dims"]
    return math.prod(shape[dim] for dim in dims)


def _running(node: fx.Node) -> int:
    dim: Any = node.kwargs["dim"]
    return int(shape_of(node.args[0])[dim])


def _tensor(gm: fx.GraphModule, node: Any) -> torch.Tensor | None:
    return tensor_at(gm, str(node.target)).detach() if isinstance(node, fx.Node) else None


_SUMS: dict[str, _Sums] = {
    "conv": _product,
    "conv_pairs": _product,
    "linear": _product,
    "matmul": _matmul,
    "avg_pool": _sum_of(_window),
    "adaptive_avg_pool": _sum_of(_longest_window),
    "reduce_sum": _sum_of(_reduced),
    "cumsum": _sum_of(_running),
    "fold": _sum_of(_window),
}
