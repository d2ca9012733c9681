"""How far values lie from their mean.

var(x)    mean((x - mean(x)) ** 2 * n / (n - correction))
std(x)    sqrt(var(x))
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from passes.decompositions.steps import Decomposition, Steps, float_input, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info
from qgraph.lowering.base import batch_is_free
from qgraph.rewrite import Verdict, no


def _check(node: fx.Node) -> Verdict:
    if _divisor(node) <= 0:
        return no("it divides by zero: one element has no variance", node)
    if 0 in _dims(node) and batch_is_free(node):
        return no("it averages over the batch, whose size is free", node)
    return float_input(node)


def _dims(node: fx.Node) -> tuple[int, ...]:
    bound = bind(node)
    rank, dim = len(shape_of(bound.operand("input"))), bound.option("dim")
    chosen = range(rank) if dim is None or dim == () or dim == [] else dim if isinstance(dim, (list, tuple)) else (dim,)
    return tuple(sorted({d % rank for d in chosen}))


def _divisor(node: fx.Node) -> float:
    """What the sum of squares is divided by: the number of elements less the correction."""
    bound = bind(node)
    shape, correction = shape_of(bound.operand("input")), bound.option("correction")
    count = math.prod(shape[dim] for dim in _dims(node))
    return count - (float(bool(bound.option("unbiased"))) if correction is None else float(correction))


def _spread(node: fx.Node, steps: Steps) -> None:
    x, dims, keepdim = bind(node).operand("input"), _dims(node), bool(bind(node).option("keepdim"))
    mean = steps.step("mean", ops.MEAN, x, dim=dims, keepdim=True)
    centred = steps.step("sub", ops.SUB, x, mean)
    squares = steps.step("mul", ops.MUL, centred, centred)
    average: dict[str, Any] = {"dim": dims, "keepdim": True} if keepdim else {"dim": dims}
    factor = math.prod(shape_of(x)[dim] for dim in dims) / _divisor(node)
    if factor != 1:
        squares = steps.step("scaled", ops.MUL, squares, factor)
    if info(node).op is ops.VAR:
        steps.finish(ops.MEAN, squares, **average)
        return
    variance = steps.step("var", ops.MEAN, squares, **average)
    steps.finish(ops.SQRT, variance)


VAR = Decomposition(_check, _spread, (ops.MEAN, ops.SUB, ops.MUL))
STD = Decomposition(_check, _spread, (ops.MEAN, ops.SUB, ops.MUL, ops.SQRT))
