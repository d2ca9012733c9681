"""Which sums of an integer graph may leave their accumulator.

    product   abs(acc) <= max(h * P - l * Q, h * Q - l * P) + abs(b)
    window    abs(acc) <= n * max(abs(l), abs(h))
with P and Q the sums of a row's positive weights and of its negative ones' magnitudes, l and h the bounds of the
operand's codes counted from their zero point, b the integer bias and n the number of elements added.
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
from qgraph.lowering.options import shape_of
from qgraph.numerics import Arithmetic, parse_arithmetic
from qgraph.simulator.fast.exact import largest, product_bound
from qgraph.simulator.ranges import Range, code_ranges


@dataclass(frozen=True)
class Overflowing:
    """A node whose sums may leave the accumulator.

    Args:
        bound: the largest magnitude the operands' codes allow.
        arithmetic: with the accumulator.
    """

    node: fx.Node
    bound: int
    arithmetic: Arithmetic

    def __str__(self) -> str:
        record, word = info(self.node), self.arithmetic
        held = f"its accumulator (int{word.accumulator.bits}:{word.overflow}) holds {word.accumulator.qmax}"
        return f"accumulator: {record.site} ({record.op}): sums may reach {self.bound}, {held}"

    @property
    def where(self) -> str:
        """Node, module path and source line."""
        return f"{where(self.node)}: sums may reach {self.bound}"


def overflowing(gm: fx.GraphModule) -> list[Overflowing]:
    """Every sum of an integer graph that some codes could take out of its accumulator."""
    ranges = code_ranges(gm)
    found = []
    for node in gm.graph.nodes:
        bound_of = _BOUNDS.get(integer_name(node.target) or "")
        if bound_of is None:
            continue
        arithmetic = parse_arithmetic(str(node.kwargs["arithmetic"]))
        bound = bound_of(node, gm, ranges)
        if bound > arithmetic.accumulator.qmax:
            found.append(Overflowing(node, bound, arithmetic))
    return found


_Bound = Callable[[fx.Node, fx.GraphModule, Mapping[fx.Node, Range]], int]


def _counted(node: fx.Node, operand: int, zero: str, ranges: Mapping[fx.Node, Range]) -> Range:
    """Bounds of an operand's codes, counted from the zero point."""
    low, high = ranges[node.args[operand]]  # type: ignore[index]
    shift: Any = node.kwargs.get(zero) or 0
    return low - shift, high - shift


def _product(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> int:
    low, high = _counted(node, 0, "x_zero", ranges)
    weight, bias = _tensor(gm, node.args[1]), _tensor(gm, node.args[2])
    assert weight is not None
    bias = None if bias is None or bias.is_floating_point() else bias
    rows = weight
    if node.kwargs.get("transposed"):
        groups: Any = node.kwargs["groups"]
        rows = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    terms = math.prod(rows.shape[1:])
    rough = terms * max(abs(low), abs(high)) * (1 << (8 * weight.element_size() - 1)) + largest(bias)
    word = parse_arithmetic(str(node.kwargs["arithmetic"]))
    return rough if rough <= word.accumulator.qmax else product_bound(rows, low, high, bias)


def _matmul(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> int:
    sides = [max(map(abs, _counted(node, i, zero, ranges))) for i, zero in enumerate(("x_zero", "y_zero"))]
    return int(sides[0] * sides[1] * shape_of(node.args[0])[-1])


def _sum_of(count: Callable[[fx.Node], int]) -> _Bound:
    def bound(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> int:
        return count(node) * max(map(abs, _counted(node, 0, "x_zero", ranges)))

    return bound


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
    dims: Any = node.kwargs["dims"]
    return math.prod(shape_of(node.args[0])[dim] for dim in dims)


def _running(node: fx.Node) -> int:
    dim: Any = node.kwargs["dim"]
    return int(shape_of(node.args[0])[dim])


def _tensor(gm: fx.GraphModule, node: Any) -> torch.Tensor | None:
    return tensor_at(gm, str(node.target)).detach() if isinstance(node, fx.Node) else None


_BOUNDS: dict[str, _Bound] = {
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
