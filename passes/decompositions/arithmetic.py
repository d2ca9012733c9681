"""Division by a computed value: `x / y` is `x * reciprocal(y)`."""

from __future__ import annotations

from torch import fx

from passes.decompositions.steps import Decomposition, Steps, float_input
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.rewrite import Verdict, no, skip


def _check_div(node: fx.Node) -> Verdict:
    bound = bind(node)
    if not isinstance(bound.operand("other"), fx.Node):
        return skip()  # division by a number is one operator: nothing to take apart
    if bound.option("rounding_mode") is not None:
        return no("it rounds its quotient", node)
    return float_input(node)


def _div(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    inverse = steps.step("reciprocal", ops.RECIPROCAL, bound.operand("other"))
    steps.finish(ops.MUL, bound.operand("input"), inverse)


DIV = Decomposition(_check_div, _div, (ops.RECIPROCAL, ops.MUL))
