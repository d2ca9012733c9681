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

from qgraph.errors import InternalError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.op_table import LINEAR, TRANSPOSED
from qgraph.lowering.base import Lowering, LoweringContext, bounds, register_lowering, spatial, sum_rule
from qgraph.nn import Activation
from qgraph.numerics import Arithmetic, Fbgemm, OneDnn, QParams, bias_codes, qint32, quantize
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
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        module: Any = module_of(node)
        x, residual = bind(node).operand("input"), bind(node).operand("residual")
        weight = info(node).weight_qparams
        if weight is None:
            raise InternalError("a weight has no scale", where=where(node))
        product = accumulator_step(ctx.qparams(x), weight, scale_repeats(node))
        arguments = self._arguments(node, ctx, residual, product, module.activation)
        operands = [x, ctx.tensor(node, "weight", quantize(module.weight.detach(), weight)), None, residual]
        if module.bias is not None:
            operands[2] = ctx.tensor(node, "bias", _stored_bias(node, module.bias.detach(), product, ctx))
        options = {} if info(node).op is LINEAR else _geometry(node, module)
        zeros = ctx.zeros(node, x=x, residual=residual)
        name = "linear" if info(node).op is LINEAR else "conv"
        return ctx.integer(name, *operands, *arguments[0], like=node, **options, **arguments[1], **zeros)

    def _arguments(
        self, node: fx.Node, ctx: LoweringContext, residual: Any, product: torch.Tensor, activation: Activation
    ) -> tuple[list[fx.Node | None], dict[str, Any]]:
        """Multiplier, shift and residual multiplier; arithmetic and bounds."""
        result = ctx.qparams(node)
        limits = ctx.bounds(result, *_LIMITS[activation]) if result.qtype != qint32 else _raw_bounds(activation)
        arithmetic = ctx.step(node, "product")
        if result.qtype == qint32:
            return [None, None, None], {"arithmetic": str(arithmetic), **limits}
        if isinstance(arithmetic.rule, OneDnn):
            stages = ctx.tensor(node, "multiplier", _onednn_stages(node, ctx))
            return [stages, None, None], {"arithmetic": str(arithmetic), **limits}
        real = ctx.ratio(node, product)
        if residual is None:
            multiplier, shift, _ = ctx.rescale(node, real, "product")
            return [multiplier, shift, None], {"arithmetic": str(arithmetic), **limits}
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
    rule = ctx.step(node, "product").rule
    if isinstance(rule, OneDnn):
        return bias.to(torch.float32)
    if isinstance(rule, Fbgemm):
        return bias.to(torch.float32) / step.to(torch.float32)
    return bias_codes(bias, step).to(torch.int32)


def _onednn_stages(node: fx.Node, ctx: LoweringContext) -> torch.Tensor:
    """OneDNN's factors of input, weight and result, float32 `[3, C_out]` or `[3]`.

    torch hands scales over as reciprocals of reciprocals, which rounds them twice.
    """
    source, weight = ctx.qparams(bind(node).operand("input")).scale, info(node).weight_qparams
    assert weight is not None

    def twice(scale: torch.Tensor) -> torch.Tensor:
        return (1.0 / (1.0 / scale.double()).float().double()).float()

    linear = info(node).op is LINEAR
    held = 1.0 / (1.0 / weight.scale) if linear else weight.scale
    result = 1.0 / twice(ctx.qparams(node).scale)
    return torch.stack(torch.broadcast_tensors(twice(source), held, result))


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
