"""Takes composites apart into operators that hardware has.

    softmax(x)       m = amax(x)  e = exp(x - m)  y = e * reciprocal(sum(e))
    layer_norm(x)    c = x - mean(x)  y = c * rsqrt(mean(c * c) + eps) * weight + bias
    x / y            x * reciprocal(y)
    batch_norm(x)    x * weight + bias, where no convolution took it over

Inner steps are sites of their own, named after the composite (`norm.rsqrt`, `softmax.exp`); the last step keeps the
composite's site. Equal within 1e-5 relative. A composite stays whole if the target runs it as it is, and, in float, if
the target lacks a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import Refusal, info, module_of
from qgraph.ir.op import Op
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.lowering import support
from qgraph.nn import Affine
from qgraph.pipeline import Numerics, Pass, PassContext, PassResult, close
from qgraph.rewrite import Verdict, no, skip, yes


@dataclass(frozen=True)
class DecomposeComposites(Pass):
    """Decomposes softmax, layer norm, division and leftover batch norms.

    Args:
        skip: names of operators to leave whole.
    """

    name: ClassVar[str] = "decompose-composites"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"decomposed"})
    keeps: ClassVar[Numerics] = close(1e-5)

    skip: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        refusals = []
        for node in list(gm.graph.nodes):
            op = info(node).op
            rule = _RULES.get(op.decomposition or "")
            if rule is None or op.name in self.skip:
                continue
            if ctx.target is not None and support(node, ctx.target):
                continue
            verdict = rule.check(node)
            lacking = [step.name for step in rule.steps if ctx.target and ctx.target.rule(step.name) is None]
            if verdict and lacking:
                verdict = no(f"the target has no {', '.join(lacking)}", node)
            if verdict:
                rule.decompose(node, _Steps(node, edit))
            elif verdict.reason:
                refusals.append(Refusal(self.name, verdict.reason, info(node).site, info(node).source))
        return PassResult(gm, edit.changes > 0, refusals=tuple(refusals))


class _Steps:
    """Creates the steps of one composite, named after it."""

    def __init__(self, node: fx.Node, edit: Editor) -> None:
        self.node = node
        self.edit = edit
        self.site = info(node).site

    def step(self, name: str, op: Op, *operands: Any, shape: tuple[int, ...], **options: Any) -> fx.Node:
        """An inner step with a site of its own."""
        created = self.edit.call(op, *operands, like=self.node, site=f"{self.site}.{name}", **options)
        self.edit.annotate(
            created, inner=True, value=TensorSpec(shape, torch.float32), origins=info(self.node).stands_for
        )
        return created

    def finish(self, op: Op, *operands: Any, **options: Any) -> None:
        """The last step, which is the composite's own site."""
        last = self.edit.call(op, *operands, like=self.node, **options)
        self.edit.replace(self.node, last)
        self.edit.rename(last)

    def finish_affine(self, value: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """The last step as a scale and shift per channel."""
        path = self.edit.free_path(f"{self.site}.affine")
        self.edit.set_module(path, Affine(weight, bias).eval())
        last = self.edit.call_module(path, value, op=ops.AFFINE, like=self.node)
        self.edit.replace(self.node, last)
        self.edit.rename(last)


@dataclass(frozen=True)
class _Decomposition:
    """What may be taken apart, how, and which operators result."""

    check: Callable[[fx.Node], Verdict]
    decompose: Callable[[fx.Node, _Steps], None]
    steps: tuple[Op, ...]


def _float_input(node: fx.Node) -> Verdict:
    spec = tensor_spec(bind(node).operand("input"))
    if spec is None or spec.dtype is not torch.float32:
        return no("it does not compute in float32", node)
    return yes()


def _check_softmax(node: fx.Node) -> Verdict:
    bound = bind(node)
    if bound.option("dim") is None:
        return no("it leaves its dimension to torch's deprecated default", node)
    if bound.option("dtype") not in (None, torch.float32):
        return no(f"it computes in {bound.option('dtype')}", node)
    return _float_input(node)


def _softmax(node: fx.Node, steps: _Steps) -> None:
    bound = bind(node)
    x, dim = bound.operand("input"), bound.option("dim")
    spec = tensor_spec(x)
    assert spec is not None
    reduced = _reduced(spec.shape, (dim,))
    top = steps.step("max", ops.AMAX, x, dim=(dim,), keepdim=True, shape=reduced)
    shifted = steps.step("sub", ops.SUB, x, top, shape=spec.shape)
    powers = steps.step("exp", ops.EXP, shifted, shape=spec.shape)
    total = steps.step("sum", ops.SUM, powers, dim=(dim,), keepdim=True, shape=reduced)
    inverse = steps.step("reciprocal", ops.RECIPROCAL, total, shape=reduced)
    steps.finish(ops.MUL, powers, inverse)


def _check_layer_norm(node: fx.Node) -> Verdict:
    return no("its weights are computed in the forward", node) if node.op != "call_module" else _float_input(node)


def _layer_norm(node: fx.Node, steps: _Steps) -> None:
    module: Any = module_of(node)
    x = bind(node).operand("input")
    spec = tensor_spec(x)
    assert spec is not None
    dims = tuple(range(-len(module.normalized_shape), 0))
    reduced = _reduced(spec.shape, dims)
    mean = steps.step("var_mean.pre_mean", ops.MEAN, x, dim=dims, keepdim=True, shape=reduced)
    centred = steps.step("var_mean.sub", ops.SUB, x, mean, shape=spec.shape)
    squares = steps.step("var_mean.mul", ops.MUL, centred, centred, shape=spec.shape)
    variance = steps.step("var_mean.post_mean", ops.MEAN, squares, dim=dims, keepdim=True, shape=reduced)
    inverse = steps.step("rsqrt", ops.RSQRT, variance, eps=module.eps, shape=reduced)
    if module.weight is None and module.bias is None:
        steps.finish(ops.MUL, centred, inverse)
        return
    normal = steps.step("mul", ops.MUL, centred, inverse, shape=spec.shape)
    weight = torch.ones_like(module.bias) if module.weight is None else module.weight
    bias = torch.zeros_like(module.weight) if module.bias is None else module.bias
    steps.finish_affine(normal, weight, bias)


def _check_div(node: fx.Node) -> Verdict:
    bound = bind(node)
    if not isinstance(bound.operand("other"), fx.Node):
        return skip()  # division by a number is one operator: nothing to take apart
    if bound.option("rounding_mode") is not None:
        return no("it rounds its quotient", node)
    return _float_input(node)


def _div(node: fx.Node, steps: _Steps) -> None:
    bound = bind(node)
    divisor = bound.operand("other")
    spec = tensor_spec(divisor)
    inverse = steps.step("reciprocal", ops.RECIPROCAL, divisor, shape=() if spec is None else spec.shape)
    steps.finish(ops.MUL, bound.operand("input"), inverse)


def _check_batch_norm(node: fx.Node) -> Verdict:
    if node.op != "call_module":
        return no("its statistics are computed in the forward", node)
    module: Any = module_of(node)
    if module.training or module.running_mean is None:
        return no("it normalizes with the statistics of the batch", node)
    return _float_input(node)


def _batch_norm(node: fx.Node, steps: _Steps) -> None:
    module: Any = module_of(node)
    spec = tensor_spec(node)
    assert spec is not None
    mean, variance = module.running_mean.double(), module.running_var.double()
    gain = torch.ones_like(mean) if module.weight is None else module.weight.detach().double()
    shift = torch.zeros_like(mean) if module.bias is None else module.bias.detach().double()
    factor = gain / torch.sqrt(variance + module.eps)
    view = (-1, *[1] * (len(spec.shape) - 2))
    dtype = module.running_mean.dtype
    steps.finish_affine(
        bind(node).operand("input"),
        factor.to(dtype).reshape(view),
        (shift - mean * factor).to(dtype).reshape(view),
    )


def _reduced(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    axes = {dim % len(shape) for dim in dims}
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


_RULES: dict[str, _Decomposition] = {
    "softmax": _Decomposition(_check_softmax, _softmax, (ops.AMAX, ops.SUB, ops.EXP, ops.SUM, ops.RECIPROCAL, ops.MUL)),
    "layer_norm": _Decomposition(_check_layer_norm, _layer_norm, (ops.MEAN, ops.SUB, ops.MUL, ops.RSQRT, ops.AFFINE)),
    "div": _Decomposition(_check_div, _div, (ops.RECIPROCAL, ops.MUL)),
    "batch_norm": _Decomposition(_check_batch_norm, _batch_norm, (ops.AFFINE,)),
}
