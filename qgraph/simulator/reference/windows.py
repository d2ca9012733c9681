"""Reference kernels: pooling, reductions and resizing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qgraph.numerics import parse_qtype
from qgraph.simulator.reference.common import requantized, wide
from qgraph.simulator.trace import KernelTrace


def max_pool(
    x: torch.Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The largest code in each window of `x` `[N, C, *in]`; padding never wins."""
    rank = len(kernel_size)
    if rank == 1:  # torch has no one-dimensional integer kernel
        pooled = max_pool(
            x.unsqueeze(-2),
            kernel_size=(1, *kernel_size),
            stride=(1, *stride),
            padding=(0, *padding),
            dilation=(1, *dilation),
            ceil_mode=ceil_mode,
        )
        return pooled.squeeze(-2)
    pool = F.max_pool2d if rank == 2 else F.max_pool3d
    result: torch.Tensor = pool(x, list(kernel_size), list(stride), list(padding), list(dilation), ceil_mode)
    return result


def avg_pool(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_size: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum of each window of `x` `[N, C, *in]`; the factor includes one over the number of elements.

    `multiplier` and `shift` broadcast against `[N, C, *output_size]`, because windows at the edge may count fewer.
    """
    rank = len(kernel_size)
    reach = [(out - 1) * step + kernel for out, step, kernel in zip(output_size, stride, kernel_size, strict=True)]
    spatial = x.shape[-rank:]
    after = [max(0, r - size - pad) for r, size, pad in zip(reach, spatial, padding, strict=True)]
    pads = [amount for axis in reversed(range(rank)) for amount in (padding[axis], after[axis])]
    windows = F.pad(wide(x), pads)
    for axis in range(rank):
        windows = windows.unfold(x.dim() - rank + axis, kernel_size[axis], stride[axis])
    for axis in range(rank):
        windows = windows.narrow(x.dim() - rank + axis, 0, output_size[axis])
    sums = windows.sum(dim=tuple(range(-rank, 0)))
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, trace)


def adaptive_avg_pool(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    output_size: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum of each adaptive window: window `i` of `n` over `L` covers floor(iL/n) to ceil((i+1)L/n)."""
    rank = len(output_size)
    sums = wide(x)
    for axis, count in enumerate(output_size):
        dim = x.dim() - rank + axis
        length = x.shape[dim]
        bounds = [(i * length // count, -((-(i + 1) * length) // count)) for i in range(count)]
        sums = torch.stack([sums.narrow(dim, a, b - a).sum(dim) for a, b in bounds], dim)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, trace)


def reduce_sum(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    dims: Sequence[int],
    keepdim: bool,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum over `dims`; for a mean the factor includes one over the number of elements."""
    sums = wide(x).sum(dim=list(dims), keepdim=keepdim)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, trace)


def resize_bilinear(
    x: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    weight_bits: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Weighted means of four neighbours of `x` `[N, C, H, W]`.

    `rows` and `columns` are int64 `[3, size]`: index before, index after, and the weight of the one after in units of
    `2**-weight_bits`; the weight of the one before is the rest to 1. The factor includes `2**(-2 * weight_bits)`.
    """
    one = 1 << weight_bits
    codes = wide(x)
    above, below = codes.index_select(2, rows[0]), codes.index_select(2, rows[1])
    weight = rows[2].reshape(-1, 1)
    mixed = above * (one - weight) + below * weight
    left, right = mixed.index_select(3, columns[0]), mixed.index_select(3, columns[1])
    sums = left * (one - columns[2]) + right * columns[2]
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, trace)


def clamp_codes(x: torch.Tensor, *, low: int, high: int, format: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """Codes between two bounds, at an unchanged scale."""
    return x.clamp(low, high).to(parse_qtype(format).storage)
