"""Normalizations.

    layer norm       c = x - mean(x)   y = c * rsqrt(mean(c * c) + eps) * weight + bias
    group norm       the same over the channels of a group and all positions
    instance norm    the same over the positions of a channel; with running statistics it is a batch norm
    rms norm         y = x * rsqrt(mean(x * x) + eps) * weight
    normalize        y = x * rsqrt(max(sum(x * x), eps ** 2))
    batch norm       y = x * factor + shift per channel, where no convolution took it over
Weight and bias enter one rescaling; they are not rounded to 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.decompositions.steps import Decomposition, Steps, float_input, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import module_of
from qgraph.lowering.base import is_number
from qgraph.rewrite import Verdict, no


def _check_weights(node: fx.Node) -> Verdict:
    return no("its weights are computed in the forward", node) if node.op != "call_module" else float_input(node)


def _centred_and_inverse(steps: Steps, x: fx.Node, dims: tuple[int, ...], eps: float) -> tuple[fx.Node, fx.Node]:
    """`x - mean(x)` and one over its standard deviation."""
    mean = steps.step("var_mean.pre_mean", ops.MEAN, x, dim=dims, keepdim=True)
    centred = steps.step("var_mean.sub", ops.SUB, x, mean)
    squares = steps.step("var_mean.mul", ops.MUL, centred, centred)
    variance = steps.step("var_mean.post_mean", ops.MEAN, squares, dim=dims, keepdim=True)
    return centred, steps.step("rsqrt", ops.RSQRT, variance, eps=eps)


def _finish_scaled(
    steps: Steps, x: fx.Node, inverse: fx.Node, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """`x * inverse * weight + bias` as the composite's result."""
    given = weight if weight is not None else bias
    if given is None:
        steps.finish(ops.MUL, x, inverse)
        return
    normal = steps.step("mul", ops.MUL, x, inverse)
    steps.finish_affine(
        normal,
        torch.ones_like(given) if weight is None else weight,
        torch.zeros_like(given) if bias is None else bias,
    )


def _layer_norm(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    dims = tuple(range(-len(module.normalized_shape), 0))
    centred, inverse = _centred_and_inverse(steps, bind(node).operand("input"), dims, module.eps)
    _finish_scaled(steps, centred, inverse, module.weight, module.bias)


def _rms_norm(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    x = bind(node).operand("input")
    dims = tuple(range(-len(module.normalized_shape), 0))
    squares = steps.step("square", ops.MUL, x, x)
    mean = steps.step("mean", ops.MEAN, squares, dim=dims, keepdim=True)
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    _finish_scaled(steps, x, steps.step("rsqrt", ops.RSQRT, mean, eps=eps), module.weight, None)


def _group_norm(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    x = bind(node).operand("input")
    rank = len(shape_of(x))
    grouped = steps.step("groups", ops.UNFLATTEN, x, dim=1, sizes=(module.num_groups, -1))
    centred, inverse = _centred_and_inverse(steps, grouped, tuple(range(2 - rank - 1, 0)), module.eps)
    normal = steps.step("mul", ops.MUL, centred, inverse)
    if module.weight is None:
        steps.finish(ops.FLATTEN, normal, start_dim=1, end_dim=2)
        return
    flat = steps.step("channels", ops.FLATTEN, normal, start_dim=1, end_dim=2)
    view = (-1, *[1] * (rank - 2))
    steps.finish_affine(flat, module.weight.detach().reshape(view), module.bias.detach().reshape(view))


def _check_instance_norm(node: fx.Node) -> Verdict:
    verdict = _check_weights(node)
    if verdict and len(shape_of(bind(node).operand("input"))) == len(_instance_dims(node)) + 1:
        return no("its input has no batch", node)
    return verdict


def _instance_dims(node: fx.Node) -> tuple[int, ...]:
    """The positions an instance norm averages over."""
    kinds = {torch.nn.InstanceNorm1d: 1, torch.nn.InstanceNorm2d: 2, torch.nn.InstanceNorm3d: 3}
    return tuple(range(-kinds[type(module_of(node))], 0))  # type: ignore[index]


def _instance_norm(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    if not module.training and module.running_mean is not None:
        _batch_norm(node, steps)
        return
    dims = _instance_dims(node)
    centred, inverse = _centred_and_inverse(steps, bind(node).operand("input"), dims, module.eps)
    view = (-1, *[1] * len(dims))
    weight, bias = (None if t is None else t.detach().reshape(view) for t in (module.weight, module.bias))
    _finish_scaled(steps, centred, inverse, weight, bias)


def _check_normalize(node: fx.Node) -> Verdict:
    bound = bind(node)
    if bound.option("p") != 2:
        return no(f"it normalizes by the norm of order {bound.option('p')}", node)
    if not isinstance(bound.option("dim"), int) or not is_number(bound.option("eps")):
        return no("its dimension or eps is computed in the forward", node)
    return float_input(node)


def _normalize(node: fx.Node, steps: Steps) -> None:
    bound = bind(node)
    x = bound.operand("input")
    squares = steps.step("square", ops.MUL, x, x)
    total = steps.step("sum", ops.SUM, squares, dim=(bound.option("dim"),), keepdim=True)
    least = steps.step("clamp", ops.CLAMP, total, min=float(bound.option("eps")) ** 2)
    steps.finish(ops.MUL, x, steps.step("rsqrt", ops.RSQRT, least))


def _check_batch_norm(node: fx.Node) -> Verdict:
    if node.op != "call_module":
        return no("its statistics are computed in the forward", node)
    module: Any = module_of(node)
    if module.training or module.running_mean is None:
        return no("it normalizes with the statistics of the batch", node)
    return float_input(node)


def _batch_norm(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    mean, variance = module.running_mean.double(), module.running_var.double()
    gain = torch.ones_like(mean) if module.weight is None else module.weight.detach().double()
    shift = torch.zeros_like(mean) if module.bias is None else module.bias.detach().double()
    factor = gain / torch.sqrt(variance + module.eps)
    view = (-1, *[1] * (len(shape_of(node)) - 2))
    dtype = module.running_mean.dtype
    steps.finish_affine(
        bind(node).operand("input"),
        factor.to(dtype).reshape(view),
        (shift - mean * factor).to(dtype).reshape(view),
    )


_CENTRED = (ops.MEAN, ops.SUB, ops.MUL, ops.RSQRT, ops.AFFINE)
LAYER_NORM = Decomposition(_check_weights, _layer_norm, _CENTRED)
GROUP_NORM = Decomposition(_check_weights, _group_norm, (*_CENTRED, ops.UNFLATTEN, ops.FLATTEN))
INSTANCE_NORM = Decomposition(_check_instance_norm, _instance_norm, _CENTRED)
RMS_NORM = Decomposition(_check_weights, _rms_norm, (ops.MUL, ops.MEAN, ops.RSQRT, ops.AFFINE))
NORMALIZE = Decomposition(_check_normalize, _normalize, (ops.MUL, ops.SUM, ops.CLAMP, ops.RSQRT))
BATCH_NORM = Decomposition(_check_batch_norm, _batch_norm, (ops.AFFINE,))
