"""Einstein sums of two tensors, and products that add.

    einsum(e, a, b)    one matmul: letters in a, b and the result are batch dimensions, those in the result and one
                       operand its rows or columns, those in no result its inner dimension
    addmm(c, x, w)     a linear where c and w are the model's own, else c * beta + x @ w * alpha
Sizes are never written down, so that any dimension may be the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.decompositions.steps import Decomposition, Steps, constant_of, float_input, is_float32, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import tensor_at
from qgraph.lowering.base import is_number
from qgraph.rewrite import Verdict, no, yes


@dataclass(frozen=True)
class _Equation:
    """An equation of one or two operands: a letter per dimension."""

    operands: tuple[str, ...]
    result: str


def _parsed(equation: str) -> _Equation | str:
    """The equation, or why it is not handled."""
    text = equation.replace(" ", "")
    if "." in text:
        return "its equation has an ellipsis"
    left, arrow, result = text.partition("->")
    operands = tuple(left.split(","))
    if not arrow:
        result = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    if len(operands) > 2:
        return f"it multiplies {len(operands)} tensors at once"
    if any(len(set(letters)) < len(letters) for letters in (*operands, result)):
        return "its equation has a diagonal"
    return _Equation(operands, result)


def _check_einsum(node: fx.Node) -> Verdict:
    bound = bind(node)
    tensors = tuple(bound.operand("operands"))
    parsed = _parsed(bound.option("equation"))
    if isinstance(parsed, str):
        return no(parsed, node)
    if not all(map(is_float32, tensors)):
        return no("it does not compute in float32", node)
    sizes: dict[str, set[int]] = {}
    for letters, tensor in zip(parsed.operands, tensors, strict=True):
        for letter, size in zip(letters, shape_of(tensor), strict=True):
            sizes.setdefault(letter, set()).add(size)
    if any(len(found) > 1 for found in sizes.values()):
        return no("it broadcasts a dimension of size 1", node)
    return yes()


def _einsum(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    parsed = _parsed(bound.option("equation"))
    assert isinstance(parsed, _Equation)
    names = ("left", "right")
    terms = []
    for index, (letters, tensor) in enumerate(zip(parsed.operands, bound.operand("operands"), strict=True)):
        others = "".join(other for place, other in enumerate(parsed.operands) if place != index)
        terms.append(_summed(steps, names[index], tensor, letters, others + parsed.result))
    if len(terms) == 1:
        value, letters = terms[0]
    else:
        value, letters = _multiplied(steps, terms, parsed.result)
    steps.finish(ops.PERMUTE, value, dims=tuple(letters.index(letter) for letter in parsed.result))


def _summed(steps: Steps, name: str, x: fx.Node, letters: str, needed: str) -> tuple[fx.Node, str]:
    """A tensor summed over the dimensions nobody else has."""
    alone = tuple(axis for axis, letter in enumerate(letters) if letter not in needed)
    if not alone:
        return x, letters
    kept = "".join(letter for letter in letters if letter in needed)
    return steps.step(f"{name}_sum", ops.SUM, x, dim=alone), kept


def _multiplied(steps: Steps, terms: list[tuple[fx.Node, str]], result: str) -> tuple[fx.Node, str]:
    """The product of two tensors, with the letters of its dimensions."""
    (x, a), (y, b) = terms
    batch = [letter for letter in result if letter in a and letter in b]
    rows = [letter for letter in result if letter in a and letter not in b]
    columns = [letter for letter in result if letter in b and letter not in a]
    summed = [letter for letter in a if letter in b and letter not in result]
    if not summed:
        x, y = _laid_out(steps, "left", x, a, list(result)), _laid_out(steps, "right", y, b, list(result))
        return steps.step("product", ops.MUL, x, y, inner=False), result
    # All rows and columns but the last are batch dimensions of size 1 on the other side: no size is written down.
    lead = [*batch, *rows[:-1], *columns[:-1]]
    x = _laid_out(steps, "left", x, a, [*lead, *rows[-1:], *summed])
    y = _laid_out(steps, "right", y, b, [*lead, *summed, *columns[-1:]])
    x = _joined(steps, "left", x, len(summed), at_end=True)
    y = _joined(steps, "right", y, len(summed), at_end=not columns)
    if not rows:
        x = steps.step("left_row", ops.UNSQUEEZE, x, dim=-2)
    if not columns:
        y = steps.step("right_column", ops.UNSQUEEZE, y, dim=-1)
    value = steps.step("product", ops.MATMUL, x, y, inner=False)
    if not rows:
        value = steps.step("no_row", ops.SQUEEZE, value, dim=-2)
    if not columns:
        value = steps.step("no_column", ops.SQUEEZE, value, dim=-1)
    return value, "".join([*lead, *rows[-1:], *columns[-1:]])


def _laid_out(steps: Steps, name: str, x: fx.Node, letters: str, wanted: list[str]) -> fx.Node:
    """The dimensions in the order of `wanted`, size 1 where `x` has none."""
    own = [letter for letter in wanted if letter in letters]
    order = tuple(letters.index(letter) for letter in own)
    if order != tuple(range(len(order))):
        x = steps.step(f"{name}_order", ops.PERMUTE, x, dims=order)
    for axis, letter in enumerate(wanted):
        if letter not in letters:
            x = steps.step(f"{name}_{letter}", ops.UNSQUEEZE, x, dim=axis)
    return x


def _joined(steps: Steps, name: str, x: fx.Node, count: int, *, at_end: bool) -> fx.Node:
    """The summed dimensions, last or last but one, as one."""
    if count == 1:
        return x
    end = -1 if at_end else -2
    return steps.step(f"{name}_inner", ops.FLATTEN, x, start_dim=end - count + 1, end_dim=end)


def _check_addmm(node: fx.Node) -> Verdict:
    bound = bind(node)
    if not is_number(bound.option("beta")) or not is_number(bound.option("alpha")):
        return no("beta or alpha is computed in the forward", node)
    return float_input(node, "input", "mat1", "mat2")


def _addmm(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    added, x, y = (bound.operand(name) for name in ("input", "mat1", "mat2"))
    beta, alpha = float(bound.option("beta")), float(bound.option("alpha"))
    weight, bias = constant_of(y), constant_of(added)
    if weight is not None and bias is not None and weight.dim() == 2 and bias.dim() == 1 and alpha == beta == 1:
        linear = steps.linear("linear", x, _own(y, weight.t()), _own(added, bias), key=(id(node),))
        steps.finish_with(linear)
        return
    product = steps.step("product", ops.MATMUL, x, y)
    if alpha != 1:
        product = steps.step("alpha", ops.MUL, product, alpha)
    if beta != 1:
        added = steps.step("beta", ops.MUL, added, beta)
    steps.finish(ops.ADD, product, added)


def _own(node: fx.Node, tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that is trained if the tensor at `node` is."""
    owner = node.graph.owning_module
    assert owner is not None
    trained = tensor_at(owner, str(node.target)).requires_grad
    return nn.Parameter(tensor.contiguous().clone(), trained)


EINSUM = Decomposition(
    _check_einsum,
    _einsum,
    (ops.MATMUL, ops.MUL, ops.SUM, ops.PERMUTE, ops.UNSQUEEZE, ops.SQUEEZE, ops.FLATTEN),
)
ADDMM = Decomposition(_check_addmm, _addmm, (ops.MATMUL, ops.MUL, ops.ADD, ops.LINEAR))
