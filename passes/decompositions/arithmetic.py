"""Division by a computed value, and sums with a product inside.

x / y                  x * reciprocal(y)
addcmul(x, a, b, v)    x + v * (a * b)
addcdiv(x, a, b, v)    x + v * (a * reciprocal(b))
lerp(x, end, w)        x + w * (end - x)
"""

from __future__ import annotations

from torch import fx

from passes.decompositions.steps import Decomposition, Steps, float_input
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info
from qgraph.ir.shapes import tensor_spec
from qgraph.lowering.base import is_number
from qgraph.rewrite import Verdict, no, skip


def _check_div(node: fx.Node) -> Verdict:
    bound = bind(node)
    divisor = bound.operand("other")
    if not isinstance(divisor, fx.Node):
        return skip()  # division by a number is one operator: nothing to take apart
    if tensor_spec(divisor) is None:
        return no(
            f"it divides by {info(divisor).site}, a number that follows from the batch size at every call: "
            "divide by a constant, or by a tensor",
            node,
        )
    if bound.option("rounding_mode") is not None:
        return no("it rounds its quotient", node)
    return float_input(node)


def _div(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    inverse = steps.step("reciprocal", ops.RECIPROCAL, bound.operand("other"))
    steps.finish(ops.MUL, bound.operand("input"), inverse)


DIV = Decomposition(_check_div, _div, (ops.RECIPROCAL, ops.MUL))


def _check_sum(node: fx.Node) -> Verdict:
    value = bind(node).values.get("value", 1)
    return float_input(node) if is_number(value) else no(f"it multiplies by {value!r}", node)


def _addcmul(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    product = steps.step("mul", ops.MUL, bound.operand("tensor1"), bound.operand("tensor2"))
    steps.finish(ops.ADD, bound.operand("input"), product, alpha=bound.option("value"))


def _addcdiv(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    inverse = steps.step("reciprocal", ops.RECIPROCAL, bound.operand("tensor2"))
    product = steps.step("mul", ops.MUL, bound.operand("tensor1"), inverse)
    steps.finish(ops.ADD, bound.operand("input"), product, alpha=bound.option("value"))


def _lerp(node: fx.Node, steps: Steps) -> None:
    x, end, weight = (bind(node).operand(name) for name in ("input", "end", "weight"))
    way = steps.step("sub", ops.SUB, end, x)
    if isinstance(weight, fx.Node):
        steps.finish(ops.ADD, x, steps.step("mul", ops.MUL, way, weight))
    else:
        steps.finish(ops.ADD, x, way, alpha=weight)


ADDCMUL = Decomposition(_check_sum, _addcmul, (ops.MUL, ops.ADD))
ADDCDIV = Decomposition(_check_sum, _addcdiv, (ops.RECIPROCAL, ops.MUL, ops.ADD))
LERP = Decomposition(_check_sum, _lerp, (ops.SUB, ops.MUL, ops.ADD))
