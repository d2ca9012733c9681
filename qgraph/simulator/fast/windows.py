"""Fast pooling, reductions and resizing: windows as shifted slices, one dimension after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qgraph.numerics import qint32
from qgraph.simulator.fast.exact import DOUBLE, SINGLE
from qgraph.simulator.fast.finish import Finish
from qgraph.simulator.fast.layout import channels_last, dense, memory, shaped_as
from qgraph.simulator.fast.loops import loops
from qgraph.simulator.fast.term import Term
from qgraph.simulator.kernel import Kernel, KernelCall, NoFastForm, Operand
from qgraph.simulator.reference.windows import max_pool_size
from qgraph.simulator.trace import KernelTrace


def prepare_max_pool(call: KernelCall) -> Kernel:
    """The largest of shifted slices, first down, then across; a max of maxima."""
    options = {name: call.options[name] for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    rank = len(options["kernel_size"])
    geometry = [tuple(options[name]) for name in ("kernel_size", "stride", "padding", "dilation")]

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        size = max_pool_size(x.shape[-rank:], **options)
        if rank == 2 and x.dim() == 4 and x.device.type == "cpu" and loops() is not None:
            return _pooled_by_loop(x, size, *geometry)
        moved = _channels_inside(x, rank)
        lowest = torch.iinfo(x.dtype).min
        result = moved
        for axis in range(rank):
            along = [values[axis] for values in geometry]
            result = _along(result, moved.dim() - rank - 1 + axis, size[axis], along, lowest, torch.maximum)
        return _channels_back(result, x, rank)

    return run


def _pooled_by_loop(x: torch.Tensor, size: list[int], *geometry: tuple[int, ...]) -> torch.Tensor:
    image = channels_last(x).permute(0, 2, 3, 1).contiguous()
    out = image.new_full((image.shape[0], *size, image.shape[3]), torch.iinfo(x.dtype).min)
    loops().max_pool(image.numpy(), *geometry, image.new_empty(image.shape[2:]).numpy(), out.numpy())
    return out.permute(0, 3, 1, 2)


def _channels_inside(x: torch.Tensor, rank: int) -> torch.Tensor:
    """`[N, C, *in]` as `[N, *in, C]`, without a copy for channels_last; `[*, *in]` without channels gets one."""
    return x.movedim(-rank - 1, -1) if x.dim() > rank else x.unsqueeze(-1)


def _channels_back(result: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    return result.movedim(-1, -rank - 1) if x.dim() > rank else result.squeeze(-1)


def _along(x: torch.Tensor, dim: int, count: int, geometry: list[int], value: int, join: Any) -> torch.Tensor:
    """Windows of one dimension joined: slices `[offset :: stride]` of the padded tensor."""
    kernel, stride, padding, dilation = geometry
    reach = (count - 1) * stride + dilation * (kernel - 1) + 1
    before, length = padding, x.shape[dim]
    if before or reach > length:
        shape = list(x.shape)
        shape[dim] = max(reach, before + length)
        padded = x.new_full(shape, value)
        padded.narrow(dim, before, length).copy_(x)
        x = padded
    index: list[Any] = [slice(None)] * x.dim()
    total: torch.Tensor | None = None
    for offset in range(kernel):
        start = offset * dilation
        index[dim] = slice(start, start + (count - 1) * stride + 1, stride)
        part = x[tuple(index)]
        total = part if total is None else join(total, part)
    assert total is not None
    return total if kernel > 1 else total.contiguous()


def prepare_avg_pool(call: KernelCall) -> Kernel:
    """Sums of shifted slices, separately along each dimension."""
    x, options = _operand(call), call.options
    count = 1
    for kernel in options["kernel_size"]:
        count *= kernel
    finish, zero, wide = _sums(call, x, count)
    rank = len(options["kernel_size"])

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        result = _counted(x, zero, wide)
        for axis, size in enumerate(options["output_size"]):
            geometry = [options[name][axis] for name in ("kernel_size", "stride", "padding")]
            result = _along(result, x.dim() - rank + axis, size, [*geometry, 1], 0, torch.add)
        return _ended(finish, result, trace)

    return run


def prepare_adaptive_avg_pool(call: KernelCall) -> Kernel:
    """Sums of windows `floor(i L / n)` to `ceil((i + 1) L / n)`."""
    x, sizes = _operand(call), list(call.options["output_size"])
    rank, count = len(sizes), 1
    for length, size in zip(x.shape[-rank:], sizes, strict=True):
        count *= max((-(-(i + 1) * length // size) - i * length // size for i in range(size)), default=1)
    finish, zero, wide = _sums(call, x, count)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        if sizes == [1] * rank and rank == 2 and x.dim() == 4 and _compiles(x, wide):
            image = channels_last(x).permute(0, 2, 3, 1).flatten(1, 2)
            totals = torch.empty(image.shape[0], image.shape[2], dtype=torch.int32)
            loops().column_sums(image.numpy(), -zero * image.shape[1], totals.numpy())
            return _ended(finish, totals.view(*totals.shape, 1, 1), trace)
        sums = _counted(x, zero, wide)
        if sizes == [1] * rank:
            return _ended(finish, sums.sum(dim=list(range(-rank, 0)), keepdim=True, dtype=wide), trace)
        for axis, size in enumerate(sizes):
            dim = x.dim() - rank + axis
            length = x.shape[dim]
            if size == 1:
                sums = sums.sum(dim, keepdim=True, dtype=wide)
                continue
            bounds = [(i * length // size, -((-(i + 1) * length) // size)) for i in range(size)]
            sums = torch.stack([sums.narrow(dim, a, b - a).sum(dim, dtype=wide) for a, b in bounds], dim)
        return _ended(finish, sums, trace)

    return run


def prepare_reduce_sum(call: KernelCall) -> Kernel:
    """Sums over dimensions."""
    x, dims, keepdim = _operand(call), list(call.options["dims"]), call.options["keepdim"]
    count = 1
    for dim in {dim % max(len(x.shape), 1) for dim in dims}:
        if dim == 0:
            raise NoFastForm("it sums over the batch, whose size is known only in a run")
        count *= x.shape[dim]
    finish, zero, wide = _sums(call, x, count)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        trailing = sorted(dim % x.dim() for dim in dims) == list(range(x.dim() - len(dims), x.dim()))
        if dims and trailing and _compiles(x, wide):
            kept = x.shape[: x.dim() - len(dims)]
            sums = _row_sums(x, kept.numel(), zero)
            shape = (*kept, *[1] * len(dims)) if keepdim else tuple(kept)
            if not finish.compiles or not finish.uniform:
                return _ended(finish, torch.from_numpy(sums).view(shape), trace)
            out = torch.empty(shape, dtype=finish.storage)
            finish.write_flat(sums, None, out.numpy().reshape(-1), trace)
            return out
        codes = _counted(x, zero, wide)
        sums = codes.sum(dim=dims, keepdim=keepdim, dtype=wide) if dims else codes
        return _ended(finish, sums, trace)

    return run


def _compiles(x: torch.Tensor, wide: torch.dtype) -> bool:
    return x.device.type == "cpu" and wide is not torch.int64 and x.numel() > 0 and loops() is not None


def _row_sums(x: torch.Tensor, rows: int, zero: int) -> Any:
    """int32 sums of contiguous parts of so many."""
    codes, out = x.contiguous().numpy().reshape(rows, -1), np.empty(rows, np.int32)
    loops("compiled_rows").row_sums(codes, np.int32(-zero * codes.shape[1]), out)
    return out


def prepare_resize_bilinear(call: KernelCall) -> Kernel:
    """The reference's two blends, in 32 bits where they fit."""
    x, rows, columns, options = _operand(call), call.args[1], call.args[2], call.options
    if isinstance(rows, Operand) or isinstance(columns, Operand):
        raise NoFastForm("positions are computed")
    one = 1 << options["weight_bits"]
    finish, zero, wide = _sums(call, x, one * one, first=3)
    if wide.is_floating_point:
        wide = torch.int32
    down, across = rows[2].reshape(-1, 1).to(wide), columns[2].to(wide)

    def run(x: torch.Tensor, trace: KernelTrace | None = None) -> torch.Tensor:
        codes = _counted(x.contiguous(), zero, wide)
        mixed = codes.index_select(2, rows[0]).mul_(one - down).add_(codes.index_select(2, rows[1]).mul_(down))
        left, right = mixed.index_select(3, columns[0]), mixed.index_select(3, columns[1])
        return _ended(finish, left.mul_(one - across).add_(right.mul_(across)), trace)

    return run


def _operand(call: KernelCall) -> Operand:
    x = call.args[0]
    if not isinstance(x, Operand):
        raise NoFastForm("an operand is a constant")
    return x


def _sums(call: KernelCall, x: Operand, count: int, first: int = 1) -> tuple[Finish, int, torch.dtype]:
    """The end of a sum of `count` codes, their zero point, and the dtype in which sums are exact."""
    multiplier, shift = call.args[first], call.args[first + 1]
    if isinstance(multiplier, Operand) or isinstance(shift, Operand):
        raise NoFastForm("a multiplier is computed")
    zero = call.options.get("x_zero", 0)
    bound = count * max(abs(x.low - zero), abs(x.high - zero))
    if bound > DOUBLE:
        raise NoFastForm("sums have more than 53 bits")
    wide = torch.float32 if bound <= SINGLE else torch.int32 if bound <= qint32.qmax else torch.int64
    return Finish(call.options, [Term(multiplier, bound)], shift), zero, wide


def _counted(x: torch.Tensor, zero: int, wide: torch.dtype) -> torch.Tensor:
    codes = x.to(wide)
    return codes.sub_(zero) if zero else codes


def _ended(finish: Finish, sums: torch.Tensor, trace: KernelTrace | None) -> torch.Tensor:
    if finish.terms[0].multiplier.dim() or (finish.shift is not None and finish.shift.dim()):
        return finish.any(sums, None, trace)
    if sums.is_contiguous():
        return finish.flat(sums.view(-1), None, trace).view(sums.shape)
    full = dense(sums)
    return shaped_as(finish.flat(memory(full), None, trace), full)


KERNELS = {
    "max_pool": prepare_max_pool,
    "avg_pool": prepare_avg_pool,
    "adaptive_avg_pool": prepare_adaptive_avg_pool,
    "reduce_sum": prepare_reduce_sum,
    "resize_bilinear": prepare_resize_bilinear,
}
