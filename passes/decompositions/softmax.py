"""Softmax, also over what a mask allows.

    softmax            m = amax(x)   d = x - m   e = exp(d)   y = e * reciprocal(sum(e))
    masked by a in {0, 1}
        l = x + amax(-x)     lifted: the least of a row is 0
        k = l * a            so that 0 is no more than any allowed value
        e = exp(k - amax(k)) * a
        y = e * reciprocal(max(sum(e), 1))
A mask never enters as a large negative number, whose scale would leave nothing of the scores. Where anything is allowed
the sum is at least 1; a row with nothing allowed gives zeros, as torch's attention does.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.decompositions.masks import Mask, masked_scores
from passes.decompositions.steps import Decomposition, Steps, float_input
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.op import Op
from qgraph.rewrite import Verdict, no, skip, yes

PLAIN = (ops.AMAX, ops.SUB, ops.EXP, ops.SUM, ops.RECIPROCAL, ops.MUL)
MASKED = (*PLAIN, ops.ADD, ops.CLAMP)


def factors(steps: Steps, x: fx.Node, dim: int, mask: Mask, prefix: str = "") -> tuple[fx.Node, fx.Node]:
    """The two factors of the softmax of `x` along `dim`: powers and the reciprocal of their sum."""

    def over(name: str, op: Op, value: fx.Node) -> fx.Node:
        return steps.step(f"{prefix}{name}", op, value, dim=(dim,), keepdim=True)

    if mask.bias is not None:
        x = steps.step(f"{prefix}bias", ops.ADD, x, mask.bias)
    if mask.allowed is not None:
        negative = steps.step(f"{prefix}neg", ops.MUL, x, -1.0)
        lifted = steps.step(f"{prefix}lift", ops.ADD, x, over("min", ops.AMAX, negative))
        x = steps.step(f"{prefix}masked", ops.MUL, lifted, mask.allowed)
    shifted = steps.step(f"{prefix}sub", ops.SUB, x, over("max", ops.AMAX, x))
    powers = steps.step(f"{prefix}exp", ops.EXP, shifted)
    if mask.allowed is not None:
        powers = steps.step(f"{prefix}kept", ops.MUL, powers, mask.allowed)
    total = over("sum", ops.SUM, powers)
    if mask.allowed is not None and not mask.complete:
        total = steps.step(f"{prefix}clamp", ops.CLAMP, total, min=1.0)
    return powers, steps.step(f"{prefix}reciprocal", ops.RECIPROCAL, total)


def _check(node: fx.Node) -> Verdict:
    bound = bind(node)
    if bound.option("dim") is None:
        return no("it leaves its dimension to torch's deprecated default", node)
    if bound.option("dtype") not in (None, torch.float32):
        return no(f"it computes in {bound.option('dtype')}", node)
    return float_input(node)


def _check_masked(node: fx.Node) -> Verdict:
    """A softmax whose input is masked; without a mask it is left to `decompose-composites`."""
    if masked_scores(bind(node).operand("input")) is None or not _check(node):
        return skip()
    return yes()


def _softmax(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    steps.finish(ops.MUL, *factors(steps, bound.operand("input"), bound.option("dim"), Mask()))


def _masked_softmax(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    found = masked_scores(bound.operand("input"))
    assert found is not None
    mask = found.read(steps)
    steps.finish(ops.MUL, *factors(steps, found.scores, bound.option("dim"), mask))


SOFTMAX = Decomposition(_check, _softmax, PLAIN)
MASKED_SOFTMAX = Decomposition(_check_masked, _masked_softmax, MASKED)
