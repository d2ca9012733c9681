"""Lowering of what orders elements, adds them up along a dimension, or lays windows out as columns.

argmax, argsort, topk   indices of codes: int64, ties in order; the scale does not matter
cumsum                  qy = saturate(rescale(qx[0] + ... + qx[i]; sx / sy))
unfold                  codes moved, padded with real zero
fold                    qy = saturate(rescale(sum of overlapping qx; sx / sy))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info
from qgraph.ir.op_table import ARGMAX, CONSTANT, DYNAMIC_SHAPE
from qgraph.ir.shapes import tensor_spec
from qgraph.lowering.base import Lowering, LoweringContext, batch_is_free, register_lowering
from qgraph.lowering.movement import MoveLowering
from qgraph.lowering.options import shape_of, spatial
from qgraph.numerics import QParams
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


def outside(x: QParams) -> dict[str, int]:
    """The option that says which code stands for real zero, if it is not 0."""
    return {"outside": x.zero} if x.zero else {}


class SliceLowering(MoveLowering):
    """Slices and indexing with integers; a computed mask as index has as many results as it has true elements."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        for used in node.all_input_nodes:
            spec = tensor_spec(used)
            if spec is not None and spec.dtype is torch.bool and info(used).op is not CONSTANT:
                return no(DYNAMIC_SHAPE, node)
        return yes()


class EmbeddingLowering(MoveLowering):
    """Rows of a table of codes."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if node.op == "call_module":
            return no("its table is renormalized in the forward (max_norm)", node)
        return yes()


class ArgExtremeLowering(Lowering):
    """argmax and argmin."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        dim = bind(node).option("dim")
        if isinstance(dim, fx.Node):
            return no("its dimension is computed in the forward", node)
        if dim is None and batch_is_free(node):
            return no("it searches the whole batch, whose size is free", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, largest = bind(node), info(node).op is ARGMAX
        options = {"dim": bound.option("dim"), "keepdim": bool(bound.option("keepdim"))}
        return ctx.integer("arg_extreme", bound.operand("input"), like=node, **options, largest=largest)


class ArgsortLowering(Lowering):
    """argsort, and the indices of sort: always stable."""

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        options = {"dim": bound.option("dim"), "descending": bool(bound.option("descending"))}
        return ctx.integer("order", bound.operand("input"), like=node, **options, count=None)


class TopIndicesLowering(Lowering):
    """The indices of topk, in order of their values whether asked for or not."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        if isinstance(bind(node).option("k"), fx.Node):
            return no("the number of elements is computed in the forward", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        options = {"dim": bound.option("dim"), "descending": bool(bound.option("largest"))}
        return ctx.integer("order", bound.operand("input"), like=node, **options, count=int(bound.option("k")))


class CumsumLowering(Lowering):
    """Prefix sums."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        if bound.option("dtype") not in (None, torch.float32):
            return no(f"it computes in {bound.option('dtype')}", node)
        if isinstance(bound.option("dim"), fx.Node):
            return no("its dimension is computed in the forward", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x = bind(node).operand("input")
        return _summed("cumsum", node, x, ctx, dim=int(bind(node).option("dim")))


class UnfoldLowering(Lowering):
    """Windows as columns."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        return _fixed_geometry(node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x = bind(node).operand("input")
        options = {**_geometry(node), **outside(ctx.qparams(x))}
        return ctx.integer("unfold", x, like=node, result=ctx.qparams(x), **options)


class FoldLowering(Lowering):
    """Columns added up where their windows overlap."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        return _fixed_geometry(node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x = bind(node).operand("input")
        return _summed("fold", node, x, ctx, output_size=list(shape_of(node)[-2:]), **_geometry(node))


def _summed(name: str, node: fx.Node, x: fx.Node, ctx: LoweringContext, **options: Any) -> fx.Node:
    result = ctx.qparams(node)
    real = ctx.ratio(node, ctx.qparams(x))
    multiplier, shift, arithmetic = ctx.rescale(node, real, "product")
    options |= {"arithmetic": str(arithmetic), **ctx.bounds(result), **ctx.zeros(node, x=x)}
    return ctx.integer(name, x, multiplier, shift, like=node, **options)


_GEOMETRY = ("kernel_size", "dilation", "padding", "stride")


def _geometry(node: fx.Node) -> dict[str, list[int]]:
    return {name: spatial(bind(node).option(name), 2) for name in _GEOMETRY}


def _fixed_geometry(node: fx.Node) -> Verdict:
    bound = bind(node)
    for name in (*_GEOMETRY, "output_size"):
        value = bound.values.get(name)
        if any(isinstance(v, fx.Node) for v in (value if isinstance(value, (tuple, list)) else (value,))):
            return no(f"its {name} is computed in the forward", node)
    return yes()


for _name, _lowering in {
    "slice": SliceLowering(),
    "embedding": EmbeddingLowering(),
    "arg_extreme": ArgExtremeLowering(),
    "argsort": ArgsortLowering(),
    "top_indices": TopIndicesLowering(),
    "cumsum": CumsumLowering(),
    "unfold": UnfoldLowering(),
    "fold": FoldLowering(),
}.items():
    register_lowering(_name, _lowering)
