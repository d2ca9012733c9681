"""Lowering of resizing and of sampling at computed positions.

resize        qy = saturate(rescale(sum(qx * w * v); sx / (sy * 2**(rank * bits))))   w, v: integer weights of a table
grid sample   p  = round(g * M + B, shift)                                            positions in 2**-bits pixels
              qy = saturate(rescale(sum of four qx * w; sx / (sy * 2**(2 * bits))))   w: the low bits of p
nearest       codes moved, scale unchanged

A weight has as many bits as the target says, or fewer where the accumulator could not hold the sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qgraph.errors import QuantizationError
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info, where
from qgraph.ir.values import TensorSpec
from qgraph.lowering.base import Lowering, LoweringContext, register_lowering, sum_rule
from qgraph.lowering.indexing import outside
from qgraph.lowering.options import shape_of
from qgraph.lowering.windows import AdaptiveAvgPoolLowering, InterpolateLowering, _steps
from qgraph.numerics import QParams, qint16, qint32
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target

_CUBIC = -0.75
_CUBIC_ANTIALIASED = -0.5
_TABLES = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
_EDGES = ("depth", "rows", "columns")


class ResizeLowering(InterpolateLowering):
    """All modes of interpolate, to a fixed size."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        mode = bound.option("mode")
        if mode not in (*_TABLES, "nearest", "nearest-exact", "area"):
            return no(f"mode {mode!r} has no integer form", node)
        if mode not in ("nearest", "nearest-exact") and "sample" not in target.arithmetic:
            return no(f"{target.name} only copies codes where it resizes", node)
        sizes = (bound.option("size"), bound.option("scale_factor"))
        if any(isinstance(v, fx.Node) for size in sizes for v in (size if isinstance(size, (list, tuple)) else [size])):
            return no("its size is computed in the forward", node)
        return self.fits_integer_positions(node, target) if target.integer_positions else yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        mode, antialias = bound.option("mode"), bool(bound.option("antialias"))
        if mode == "area":
            return adaptive_average(node, ctx)
        if mode in ("nearest", "nearest-exact") or (mode == "bilinear" and not antialias):
            return super().lower(node, ctx)
        x, result = bound.operand("input"), ctx.qparams(node)
        sizes = list(zip(shape_of(x)[2:], shape_of(node)[2:], strict=True))
        steps = _steps(bound, shape_of(x)[2:], shape_of(node)[2:])
        bits = weight_bits(node, ctx.qparams(x), len(sizes), ctx, overshoots=mode == "bicubic")
        tables: list[fx.Node | None] = [None, None, None]
        for axis, ((size_in, size_out), step) in enumerate(zip(sizes, steps, strict=True), start=3 - len(sizes)):
            table = _table(mode, antialias, size_in, size_out, step, bool(bound.option("align_corners")))
            tables[axis] = ctx.tensor(node, _EDGES[axis], _in_integers(*table, bits))
        real = ctx.ratio(node, ctx.qparams(x)) / 2.0 ** (len(sizes) * bits)
        multiplier, shift, arithmetic = ctx.rescale(node, real, "sample")
        options = {"arithmetic": str(arithmetic), **ctx.bounds(result), **ctx.zeros(node, x=x)}
        return ctx.integer("resize", x, *tables, multiplier, shift, like=node, **options)


def adaptive_average(node: fx.Node, ctx: LoweringContext) -> fx.Node:
    """`area` is adaptive average pooling under another name."""
    return AdaptiveAvgPoolLowering.over(node, len(shape_of(node)) - 2, ctx)


def weight_bits(like: fx.Node, x: QParams, rank: int, ctx: LoweringContext, *, overshoots: bool = False) -> int:
    """Fractional bits of each of `rank` weights: the target's, or what the accumulator has room for.

    Args:
        overshoots: whether weights may be negative, so that the sum of their magnitudes exceeds 1 (but not 2 in all).
    """
    room = ctx.step(like, "sample").accumulator.bits - x.qtype.bits - overshoots - (not x.symmetric)
    return min(ctx.target.weight_bits, room // rank)


def _table(
    mode: str, antialias: bool, size_in: int, size_out: int, step: float, align: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (int64) and real weights (float64) of each result, `[taps, size_out]`.

    Positions are computed in float32, as in torch.
    """
    if align:
        step = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
    scale = torch.tensor(step, dtype=torch.float32)
    position = torch.arange(size_out, dtype=torch.float32)
    if antialias:
        return _antialiased(mode, size_in, position, scale)
    source = position * scale if align else (position + 0.5) * scale - 0.5
    if mode == "bicubic":
        before = torch.floor(source)
        rest = (source - before).double()
        indices = torch.stack([before + tap for tap in (-1, 0, 1, 2)]).to(torch.int64).clamp(0, size_in - 1)
        return indices, torch.stack([_cubic(rest - tap, _CUBIC) for tap in (-1, 0, 1, 2)])
    source = source.clamp(min=0)
    before = torch.floor(source).to(torch.int64).clamp(max=size_in - 1)
    rest = (source - before).double()
    return torch.stack([before, (before + 1).clamp(max=size_in - 1)]), torch.stack([1 - rest, rest])


def _antialiased(
    mode: str, size_in: int, position: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a kernel as wide as an output pixel, normalized, as in torch's `upsample_*2d_aa`."""
    reach = 2.0 if mode == "bicubic" else 1.0
    stretch = max(float(scale), 1.0)
    center = float(scale) * (position.double() + 0.5)
    first = torch.floor(center - reach * stretch + 0.5).clamp(min=0)
    last = torch.floor(center + reach * stretch + 0.5).clamp(max=size_in)
    taps = first + torch.arange(math.ceil(reach * stretch) * 2 + 1, dtype=torch.float64).unsqueeze(1)
    distance = (taps - center + 0.5) / stretch
    weight = _cubic(distance, _CUBIC_ANTIALIASED) if mode == "bicubic" else (1 - distance.abs()).clamp(min=0)
    weight = torch.where(taps < last, weight, 0.0)
    return taps.to(torch.int64).clamp(max=size_in - 1), weight / weight.sum(0)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel ("Cubic convolution interpolation for digital image processing", 1981)."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def _in_integers(indices: torch.Tensor, weights: torch.Tensor, bits: int) -> torch.Tensor:
    """`[2, taps, size]`: indices, and weights in units of `2**-bits` that sum to 1.

    The largest weight takes what rounding left.
    """
    rounded = torch.round(weights * float(1 << bits)).to(torch.int64)
    largest = weights.argmax(dim=0, keepdim=True)
    rest = (1 << bits) - rounded.sum(dim=0, keepdim=True)
    return torch.stack([indices, rounded.scatter_add(0, largest, rest)])


class GridSampleLowering(Lowering):
    """Sampling of feature maps at positions computed in 16 bits."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        if bound.option("mode") not in ("bilinear", "nearest"):
            return no(f"mode {bound.option('mode')!r} has no integer form", node)
        if bound.option("padding_mode") not in ("zeros", "border", "reflection"):
            return no(f"padding {bound.option('padding_mode')!r} has no integer form", node)
        if len(shape_of(bound.operand("input"))) != 4:
            return no("it samples volumes; only feature maps [N, C, H, W] have an integer form", node)
        return yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, result = bind(node), ctx.qparams(node)
        x, grid = bound.operand("input"), bound.operand("grid")
        if ctx.qparams(grid).qtype.bits < qint16.bits:
            raise QuantizationError(
                f"the grid of a grid_sample is {ctx.qparams(grid).qtype}",
                where=where(node),
                why="8 bits tell 256 positions apart, and samples lie between pixels",
                fix=f"let {info(grid).site} be int16",
            )
        align = bool(bound.option("align_corners"))
        bits = weight_bits(node, ctx.qparams(x), 2, ctx)
        positions = _positions(node, grid, shape_of(x)[-2:], align, bits, ctx)
        options: dict[str, Any] = {
            "position_bits": bits,
            "padding": bound.option("padding_mode"),
            "align_corners": align,
        }
        if bound.option("mode") == "nearest":
            options |= outside(ctx.qparams(x))
            return ctx.integer("sample_nearest", x, positions, like=node, result=ctx.qparams(x), **options)
        real = ctx.ratio(node, ctx.qparams(x)) / 2.0 ** (2 * bits)
        multiplier, shift, arithmetic = ctx.rescale(node, real, "sample")
        options |= {"arithmetic": str(arithmetic), **ctx.bounds(result), **ctx.zeros(node, x=x)}
        return ctx.integer("sample_bilinear", x, positions, multiplier, shift, like=node, **options)


def _positions(
    node: fx.Node, grid: fx.Node, size: tuple[int, ...], align: bool, bits: int, ctx: LoweringContext
) -> fx.Node:
    """Column and row of each sample in units of `2**-bits` pixels, int32: the grid's codes, scaled and moved."""
    source, result = ctx.qparams(grid), QParams(torch.tensor(2.0**-bits), qint32)
    edges = torch.tensor([size[1], size[0]], dtype=torch.float64)
    reach = (edges - 1) / 2 if align else edges / 2
    arithmetic = ctx.step(node, "sum")
    factor = sum_rule(arithmetic).encode_sum((source.scale.double() * reach * 2.0**bits).unsqueeze(0))
    multiplier, offset = factor.multiplier[0], (edges - 1) / 2 * 2.0**bits
    if factor.shift is None:
        offset = offset.to(torch.float32)
    else:
        offset = torch.round(torch.ldexp(offset, factor.shift.double())).to(torch.int64)
    shift = None if factor.shift is None else ctx.tensor(node, "position_shift", factor.shift)
    stored = (ctx.tensor(node, "position_multiplier", multiplier), shift, ctx.tensor(node, "position_offset", offset))
    word = {"arithmetic": str(arithmetic), **ctx.bounds(result), **({"x_zero": source.zero} if source.zero else {})}
    positions = ctx.integer("requantize", grid, *stored, like=node, result=result, **word)
    value = info(grid).value
    shape = value.shape if isinstance(value, TensorSpec) else ()
    ctx.edit.annotate(
        positions, site=f"{info(node).site}.positions", value=TensorSpec(shape, qint32.storage), inner=True
    )
    return positions


register_lowering("resize", ResizeLowering())
register_lowering("grid_sample", GridSampleLowering())
