"""Lowering of convolutions, linear and matrix products.

    real:     y = activation(sum(x * w) + b + r)
    integer:  acc = sum(qx * qw) + qb           qb = round(b / (sx * sw))
              qy  = saturate(rescale(acc; sx * sw / sy))
              qy  = saturate(round(acc * Ma + qr * Mr, shift))    with a residual, Ma ~ sx * sw / sy, Mr ~ sr / sy
The activation is the pair of bounds of the saturation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.errors import InternalError, QuantizationError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.op_table import LINEAR, RELU6, TRANSPOSED
from qgraph.lowering.base import Lowering, LoweringContext, bounds, encode_saturating, register_lowering, sum_rule
from qgraph.lowering.options import shape_of, spatial
from qgraph.nn import Activation
from qgraph.numerics import (
    Arithmetic,
    Fbgemm,
    OneDnn,
    QParams,
    bias_codes,
    dispatches_pairs,
    one_column_is_wrong,
    pairs_may_saturate,
    qint32,
    quantize,
    sees_input,
)
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target

_LIMITS: dict[Activation, tuple[float | None, float | None]] = {
    Activation.NONE: (None, None),
    Activation.RELU: (0.0, None),
    Activation.RELU6: (0.0, 6.0),
}


class ProductLowering(Lowering):
    """Convolutions and linear: a constant weight."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if node.op != "call_module":
            return no("its weight is computed in the forward", node)
        module = module_of(node)
        if isinstance(getattr(module, "padding", 0), str) or getattr(module, "padding_mode", "zeros") != "zeros":
            return no("its padding is not canonical", node)
        if node.kwargs or len(node.args) > 2:
            return no("it is given an output size", node)
        return _onednn_is_right(node, module, target)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        module: Any = module_of(node)
        x, residual = bind(node).operand("input"), bind(node).operand("residual")
        weight = info(node).weight_qparams
        if weight is None:
            raise InternalError("a weight has no scale", where=where(node))
        product = accumulator_step(ctx.qparams(x), weight, scale_repeats(node))
        codes = quantize(module.weight.detach(), weight)
        arguments = self._arguments(node, ctx, weight, product, module.activation)
        operands = [x, ctx.tensor(node, "weight", codes), None, residual]
        if module.bias is not None:
            operands[2] = ctx.tensor(node, "bias", _stored_bias(node, module.bias.detach(), product, ctx))
        if _saturates_pairs(node, module, codes, ctx):
            geometry = {name: _geometry(node, module)[name] for name in ("stride", "padding")}
            parts = [*operands[:3], *arguments[0][:2]]
            return ctx.integer("conv_pairs", *parts, like=node, **geometry, **arguments[1], **ctx.zeros(node, x=x))
        options = {} if info(node).op is LINEAR else _geometry(node, module)
        zeros = ctx.zeros(node, x=x, residual=residual)
        name = "linear" if info(node).op is LINEAR else "conv"
        return ctx.integer(name, *operands, *arguments[0], like=node, **options, **arguments[1], **zeros)

    def _arguments(
        self, node: fx.Node, ctx: LoweringContext, weight: QParams, product: torch.Tensor, activation: Activation
    ) -> tuple[list[fx.Node | None], dict[str, Any]]:
        """Multiplier, shift and residual multiplier; arithmetic and bounds."""
        result, residual = ctx.qparams(node), bind(node).operand("residual")
        if activation is Activation.RELU6:
            ctx.check_scale(node, RELU6.name)
        limits = ctx.bounds(result, *_LIMITS[activation]) if result.qtype != qint32 else _raw_bounds(activation)
        arithmetic = product_arithmetic(node, ctx)
        if result.qtype == qint32:
            return [None, None, None], {"arithmetic": str(arithmetic), **limits}
        if isinstance(arithmetic.rule, OneDnn):
            scales = [ctx.qparams(bind(node).operand("input")).scale, weight.scale, result.scale]
            stages = arithmetic.rule.stages(*scales, linear=info(node).op is LINEAR)
            return [ctx.tensor(node, "multiplier", stages), None, None], {"arithmetic": str(arithmetic), **limits}
        real = ctx.ratio(node, product)
        if residual is None:
            factor = encode_saturating(arithmetic.rule, real, result.qtype)
            return [*ctx.factor(node, factor), None], {"arithmetic": str(arithmetic), **limits}
        total = ctx.step(node, "sum")
        terms = torch.broadcast_tensors(real, ctx.ratio(node, ctx.qparams(residual)))
        factor = sum_rule(total).encode_sum(torch.stack(list(terms)))
        multiplier = ctx.tensor(node, "multiplier", factor.multiplier[0])
        shift = None if factor.shift is None else ctx.tensor(node, "shift", factor.shift)
        other = ctx.tensor(node, "residual_multiplier", factor.multiplier[1])
        word = Arithmetic(arithmetic.accumulator, arithmetic.overflow, total.rule)
        return [multiplier, shift, other], {"arithmetic": str(word), **limits}


def _stored_bias(node: fx.Node, bias: torch.Tensor, step: torch.Tensor, ctx: LoweringContext) -> torch.Tensor:
    """The bias `[C_out]` as the target adds it: in steps of the accumulator, int32 or float32, or as it is (oneDNN)."""
    rule = product_arithmetic(node, ctx).rule
    if isinstance(rule, OneDnn):
        return bias.to(torch.float32)
    if isinstance(rule, Fbgemm):
        return bias.to(torch.float32) / step.to(torch.float32)
    return bias_codes(bias, step).to(torch.int32)


def product_arithmetic(node: fx.Node, ctx: LoweringContext) -> Arithmetic:
    """The target's arithmetic of a convolution or linear, which may differ for many groups."""
    arithmetic = ctx.step(node, _step(node, ctx.target))
    weight = info(node).weight_qparams
    if isinstance(arithmetic.rule, (Fbgemm, OneDnn)) and weight is not None and not weight.per_channel:
        raise QuantizationError(
            f"{arithmetic.rule} is given a weight with one scale for all channels",
            why="the engine computes another formula for such weights, which no word describes",
            fix="use weights with a scale per channel",
        )
    return arithmetic


def _step(node: fx.Node, target: Target) -> str:
    most = target.many_groups
    return "many_groups" if most is not None and getattr(module_of(node), "groups", 1) > most else "product"


def _onednn_is_right(node: fx.Node, module: Any, target: Target) -> Verdict:
    if info(node).op is LINEAR or not isinstance(target.step(_step(node, target), info(node).op.name).rule, OneDnn):
        return yes()
    sizes, kernel = shape_of(bind(node).operand("input"))[2:], module.weight.shape[2:]
    geometry = _geometry(node, module)
    if not sees_input(sizes, kernel, *(geometry[name] for name in ("stride", "padding", "dilation"))):
        return no("oneDNN computes wrong sums where windows see nothing but padding", node)
    if one_column_is_wrong(module.weight.shape, module.groups) and shape_of(node)[-1] == 1:
        return no("oneDNN computes wrong sums for convolutions whose result is one column wide", node)
    return yes()


def _saturates_pairs(node: fx.Node, module: Any, codes: torch.Tensor, ctx: LoweringContext) -> bool:
    """Whether fbgemm takes this convolution to a kernel that adds in 16 bits, and some input shows it."""
    if info(node).op is LINEAR or not isinstance(product_arithmetic(node, ctx).rule, Fbgemm):
        return False
    geometry = _geometry(node, module)
    given = {name: geometry[name] for name in ("groups", "stride", "padding", "dilation")}
    return dispatches_pairs(codes.shape, **given) and pairs_may_saturate(
        codes, ctx.qparams(bind(node).operand("input")).qtype
    )


class MatmulLowering(Lowering):
    """Products of two computed tensors."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        x, y = bound.operand("input"), bound.operand("other")
        result = ctx.qparams(node)
        arithmetic, zeros = str(ctx.step(node, "product")), ctx.zeros(node, x=x, y=y)
        if result.qtype == qint32:
            limits = _raw_bounds(Activation.NONE)
            return ctx.integer("matmul", x, y, None, None, like=node, arithmetic=arithmetic, **limits, **zeros)
        real = ctx.ratio(node, ctx.qparams(x), ctx.qparams(y))
        multiplier, shift, _ = ctx.rescale(node, real, "product")
        options = {"arithmetic": arithmetic, **bounds(result), **zeros}
        return ctx.integer("matmul", x, y, multiplier, shift, like=node, **options)


def accumulator_step(operand: QParams, weight: QParams, groups: int = 1) -> torch.Tensor:
    """Value of one unit of the accumulator: the product of the two scales.

    Args:
        groups: how often the weight's scales repeat over the output channels; the groups of a transposed convolution,
            whose weight holds the channels of one group only, and 1 otherwise.

    Returns:
        float64, `[C_out]` or `[]`.
    """
    scale = weight.scale.double()
    return operand.scale.double() * (scale if scale.dim() == 0 else scale.repeat(groups))


def scale_repeats(node: fx.Node) -> int:
    """`groups` for `accumulator_step` of a convolution or linear node."""
    return int(getattr(module_of(node), "groups", 1)) if info(node).op in TRANSPOSED else 1


def _raw_bounds(activation: Activation) -> dict[str, Any]:
    low = qint32.qmin if activation is Activation.NONE else 0
    return {"low": low, "high": qint32.qmax, "format": str(qint32)}


def _geometry(node: fx.Node, module: Any) -> dict[str, Any]:
    rank = module.weight.dim() - 2
    return {
        "stride": spatial(module.stride, rank),
        "padding": spatial(module.padding, rank),
        "dilation": spatial(module.dilation, rank),
        "output_padding": spatial(getattr(module, "output_padding", 0), rank),
        "transposed": info(node).op in TRANSPOSED,
        "groups": module.groups,
    }


register_lowering("conv", ProductLowering())
register_lowering("linear", ProductLowering())
register_lowering("matmul", MatmulLowering())
