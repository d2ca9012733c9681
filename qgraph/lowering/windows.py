"""Lowering of pooling, reductions and resizing.

max pool      the largest code, scale unchanged
average       qy = saturate(rescale(sum(qx); sx / (n * sy)))     n: elements of the window, per position if it varies
sum           the same with n = 1
nearest       codes moved, scale unchanged
bilinear      qy = saturate(rescale(sum(qx * w); sx / (sy * 2**(2 * bits))))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import info
from qgraph.ir.op_table import INDEX_SELECT, MEAN
from qgraph.lowering.base import Lowering, LoweringContext, batch_is_free, bounds, encode_saturating, register_lowering
from qgraph.lowering.options import shape_of, spatial
from qgraph.numerics import AtenPool, Factor, MeanRule
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target


def _rank(node: fx.Node) -> int:
    return int(info(node).op.name[-2])


class MaxPoolLowering(Lowering):
    """Max pooling: selection, so any scale fits."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        return no("it also returns indices", node) if bind(node).option("return_indices") else yes()

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, rank = bind(node), _rank(node)
        kernel = spatial(bound.option("kernel_size"), rank)
        stride = bound.option("stride")
        x = bound.operand("input")
        return ctx.integer(
            "max_pool",
            x,
            like=node,
            result=ctx.qparams(x),
            kernel_size=kernel,
            stride=kernel if stride is None else spatial(stride, rank),
            padding=spatial(bound.option("padding"), rank),
            dilation=spatial(bound.option("dilation"), rank),
            ceil_mode=bool(bound.option("ceil_mode")),
        )


def _check_layout(node: fx.Node, target: Target) -> Verdict:
    """Engines that average channels in memory order know images only."""
    rule = target.step("product", info(node).op.name).rule
    if isinstance(rule, AtenPool) and len(shape_of(bind(node).operand("input"))) != 4:
        return no(f"{target.name} averages batches of images only", node)
    return yes()


class AvgPoolLowering(Lowering):
    """Average pooling; the number of elements counted may differ at the edges."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        verdict = _check_layout(node, target)
        if not verdict:
            return verdict
        bound, rank = bind(node), _rank(node)
        kernel = spatial(bound.option("kernel_size"), rank)
        padded = any(spatial(bound.option("padding"), rank)) or bound.values.get("divisor_override")
        rule = target.step("product", bound.op.name).rule
        counts_more = bound.values.get("divisor_override") or (padded and bound.option("count_include_pad"))
        if isinstance(rule, MeanRule) and rule.raw and counts_more:
            return no(f"{target.name} divides by the number of elements inside the image only", node)
        whole = list(shape_of(bound.operand("input"))[-rank:]) == kernel and not padded
        return yes() if whole else _needs_global(node, target)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound, rank = bind(node), _rank(node)
        x = bound.operand("input")
        kernel = spatial(bound.option("kernel_size"), rank)
        stride = kernel if bound.option("stride") is None else spatial(bound.option("stride"), rank)
        padding = spatial(bound.option("padding"), rank)
        size_in, size_out = shape_of(x)[-rank:], shape_of(node)[-rank:]
        counts = _window_counts(size_in, size_out, kernel, stride, padding, bool(bound.option("count_include_pad")))
        divisor = bound.values.get("divisor_override")
        if divisor:
            counts = torch.full_like(counts, float(divisor))
        return _averaged(
            "avg_pool",
            node,
            x,
            counts,
            ctx,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            output_size=list(size_out),
        )


class AdaptiveAvgPoolLowering(Lowering):
    """Adaptive average pooling: windows of up to two lengths per dimension."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        verdict = _check_layout(node, target)
        if not verdict:
            return verdict
        return yes() if set(shape_of(node)[-_rank(node) :]) == {1} else _needs_global(node, target)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        return self.over(node, _rank(node), ctx)

    @staticmethod
    def over(node: fx.Node, rank: int, ctx: LoweringContext) -> fx.Node:
        """The average over windows of the last `rank` dimensions, of any operator that means it."""
        x = bind(node).operand("input")
        size_in, size_out = shape_of(x)[-rank:], shape_of(node)[-rank:]
        lengths = [
            torch.tensor([-((-(i + 1) * length) // n) - i * length // n for i in range(n)], dtype=torch.float64)
            for length, n in zip(size_in, size_out, strict=True)
        ]
        return _averaged("adaptive_avg_pool", node, x, _outer(lengths), ctx, output_size=list(size_out))


class ReduceLowering(Lowering):
    """mean and sum over fixed dimensions."""

    def supports(self, node: fx.Node, target: Target) -> Verdict:
        bound = bind(node)
        dims = _dims(node)
        if bound.option("dtype") not in (None, torch.float32):
            return no(f"it computes in {bound.option('dtype')}", node)
        if info(node).op is MEAN and 0 in dims and batch_is_free(node):
            return no("it averages over the batch, whose size is free", node)
        rank = len(shape_of(bound.operand("input")))
        return yes() if rank > 2 and dims == list(range(2, rank)) else _needs_global(node, target)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        x, dims = bind(node).operand("input"), _dims(node)
        count = math.prod(shape_of(x)[dim] for dim in dims) if info(node).op is MEAN else 1
        keepdim = bool(bind(node).option("keepdim"))
        counts = torch.tensor(float(count), dtype=torch.float64)
        return _averaged("reduce_sum", node, x, counts, ctx, dims=dims, keepdim=keepdim)


class InterpolateLowering(Lowering):
    """Nearest and bilinear resizing to a fixed size; `qgraph.lowering.sampling` has the other modes."""

    @staticmethod
    def fits_integer_positions(node: fx.Node, target: Target) -> Verdict:
        """Whether a device that computes positions from the two sizes, in integers, can run the call."""
        bound = bind(node)
        mode = bound.option("mode")
        if mode not in ("nearest", "bilinear") or bound.option("antialias"):
            return no(f"{target.name} resizes by nearest and bilinear only", node)
        sizes = (shape_of(bound.operand("input"))[2:], shape_of(node)[2:])
        if len(sizes[0]) != 2:
            return no(f"{target.name} resizes images only", node)
        exact = [n_in / n_out for n_in, n_out in zip(*sizes, strict=True)]
        fits = _steps(bound, *sizes) == exact
        return yes() if fits else no(f"{target.name} resizes by the ratio of sizes, not by a given factor", node)

    def lower(self, node: fx.Node, ctx: LoweringContext) -> fx.Node:
        bound = bind(node)
        x = bound.operand("input")
        rank = len(shape_of(x)) - 2
        steps = _steps(bound, shape_of(x)[2:], shape_of(node)[2:])
        if bound.option("mode").startswith("nearest"):
            return self._nearest(node, x, rank, steps, ctx)
        bits = ctx.target.weight_bits
        align = bool(bound.option("align_corners"))
        make = _integer_table if ctx.target.integer_positions else _bilinear_table
        rows, columns = (
            make(size_in, size_out, step, align, bits)
            for size_in, size_out, step in zip(shape_of(x)[2:], shape_of(node)[2:], steps, strict=True)
        )
        weights = torch.tensor(2.0 ** (2 * bits), dtype=torch.float64)
        multiplier, shift, options = _mean_factor(node, x, weights, "sample", ctx)
        tables = [ctx.tensor(node, "rows", rows), ctx.tensor(node, "columns", columns)]
        return ctx.integer("resize_bilinear", x, *tables, multiplier, shift, like=node, weight_bits=bits, **options)

    def _nearest(self, node: fx.Node, x: fx.Node, rank: int, steps: list[float], ctx: LoweringContext) -> fx.Node:
        current = x
        middle = 0.5 if bind(node).option("mode") == "nearest-exact" else 0.0
        for axis in range(rank):
            size_in, size_out = shape_of(x)[2 + axis], shape_of(node)[2 + axis]
            scale = torch.tensor(steps[axis], dtype=torch.float32)
            positions = (torch.arange(size_out, dtype=torch.float32) + middle) * scale
            index = torch.floor(positions).to(torch.int64).clamp(max=size_in - 1)
            indices = ctx.tensor(node, f"index_{axis}", index)
            # Only the last step is the resize itself; the others are sites of their own.
            site = None if axis == rank - 1 else f"{info(node).site}.axis{axis}"
            current = ctx.edit.call(INDEX_SELECT, current, like=node, site=site, dim=2 + axis, index=indices)
            shape = [*shape_of(x)[:2], *shape_of(node)[2 : 3 + axis], *shape_of(x)[3 + axis :]]
            ctx.moved(current, node, ctx.qparams(x), tuple(shape))
        return current


def _needs_global(node: fx.Node, target: Target) -> Verdict:
    """For an average of something else than all positions of each channel."""
    rule = target.rule(info(node).op.name)
    if rule is not None and rule.global_only:
        return no(f"{target.name} averages over all positions of a channel only", node)
    return yes()


def _averaged(
    name: str, node: fx.Node, x: fx.Node, counts: torch.Tensor, ctx: LoweringContext, **options: Any
) -> fx.Node:
    multiplier, shift, word = _mean_factor(node, x, counts, "product", ctx)
    return ctx.integer(name, x, multiplier, shift, like=node, **options, **word)


def _mean_factor(
    node: fx.Node, x: fx.Node, counts: torch.Tensor, step: str, ctx: LoweringContext
) -> tuple[fx.Node, fx.Node | None, dict[str, Any]]:
    """Multiplier and shift of a sum divided by `counts`; arithmetic, bounds and zero points."""
    result, arithmetic = ctx.qparams(node), ctx.step(node, step)
    rule, zeros = arithmetic.rule, ctx.zeros(node, x=x)
    if isinstance(rule, AtenPool):
        factor = Factor(rule.stages(counts), None)
    elif isinstance(rule, MeanRule):
        factor = rule.encode_mean(ctx.ratio(node, ctx.qparams(x)), counts)
        zeros = {} if rule.raw else zeros
    else:
        factor = encode_saturating(rule, ctx.ratio(node, ctx.qparams(x), divisor=counts), result.qtype)
    return *ctx.factor(node, factor), {"arithmetic": str(arithmetic), **bounds(result), **zeros}


def _window_counts(
    size_in: tuple[int, ...],
    size_out: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    include_pad: bool,
) -> torch.Tensor:
    """Elements each window counts, float64 `[*size_out]`, or `[]` if all count the same.

    As torch counts: padding within the padded input is counted if asked for; what a window of ceil_mode reaches
    beyond the padded input never is.
    """
    lengths = []
    for n_in, n_out, k, step, pad in zip(size_in, size_out, kernel, stride, padding, strict=True):
        starts = torch.arange(n_out, dtype=torch.float64) * step - pad
        ends = torch.clamp(starts + k, max=n_in + pad)
        if not include_pad:
            starts, ends = torch.clamp(starts, min=0), torch.clamp(ends, max=n_in)
        lengths.append(ends - starts)
    return _outer(lengths)


def _outer(lengths: list[torch.Tensor]) -> torch.Tensor:
    """The outer product of per-dimension lengths; 0-d where it is constant."""
    total = torch.ones((), dtype=torch.float64)
    for axis, values in enumerate(lengths):
        total = total * values.reshape(-1, *[1] * (len(lengths) - 1 - axis))
    return total.flatten()[0] if bool((total == total.flatten()[0]).all()) else total


def _dims(node: fx.Node) -> list[int]:
    """Reduced dimensions, not negative; all of them if none is given."""
    bound = bind(node)
    rank = len(shape_of(bound.operand("input")))
    dim = bound.option("dim")
    chosen = range(rank) if dim is None or dim == () or dim == [] else dim if isinstance(dim, (list, tuple)) else [dim]
    return sorted({int(d) % rank for d in chosen})


def _steps(bound: Any, size_in: tuple[int, ...], size_out: tuple[int, ...]) -> list[float]:
    """Input elements per output element as torch uses them: one over a given scale factor, else the ratio of sizes."""
    factor = bound.option("scale_factor")
    recompute = bound.option("recompute_scale_factor")
    if factor is None or recompute:
        return [n_in / n_out for n_in, n_out in zip(size_in, size_out, strict=True)]
    factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * len(size_in)
    return [1.0 / float(f) for f in factors]


def _bilinear_table(size_in: int, size_out: int, step: float, align: bool, bits: int) -> torch.Tensor:
    """Index before, index after, weight of the one after, int64 `[3, size_out]`; positions in float32 as in torch."""
    position = torch.arange(size_out, dtype=torch.float32)
    if align:
        scale = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
        source = position * torch.tensor(scale, dtype=torch.float32)
    else:
        source = ((position + 0.5) * torch.tensor(step, dtype=torch.float32) - 0.5).clamp(min=0)
    before = torch.floor(source).to(torch.int64).clamp(max=size_in - 1)
    after = (before + 1).clamp(max=size_in - 1)
    weight = torch.round((source - before) * float(1 << bits)).to(torch.int64)
    return torch.stack([before, after, weight])


def _integer_table(size_in: int, size_out: int, step: float, align: bool, bits: int) -> torch.Tensor:
    """As `_bilinear_table` with positions in whole units of `2**-bits`, as LiteRT computes them.

    Weights may leave 0..1 at the borders, where both indices are the same.
    """
    one = 1 << bits
    stride = (one * size_in + size_out // 2) // size_out
    if align and size_out > 1:
        stride = (one * (size_in - 1) + (size_out - 1) // 2) // (size_out - 1)
    position = torch.arange(size_out) * stride + (0 if align else stride // 2 - one // 2)
    before = torch.div(position, one, rounding_mode="trunc").clamp(min=0)
    after = torch.div(position + one - 1, one, rounding_mode="trunc").clamp(max=size_in - 1)
    return torch.stack([before, after, position - one * before])


for _name, _lowering in {
    "max_pool": MaxPoolLowering(),
    "avg_pool": AvgPoolLowering(),
    "adaptive_avg_pool": AdaptiveAvgPoolLowering(),
    "reduce": ReduceLowering(),
}.items():
    register_lowering(_name, _lowering)
