"""Reference kernels: pooling, reductions and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """The largest code in each window of `x` `[N, C, *in]`; padding never wins.

    torch's own integer kernels index channels_last windows in the tensor's dtype and overflow, so this takes windows
    as views.
    """
    size = max_pool_size(x.shape[-len(kernel_size) :], kernel_size, stride, padding, dilation, ceil_mode)
    reach = [step * (kernel - 1) + 1 for step, kernel in zip(dilation, kernel_size, strict=True)]
    windows = _windows(wide(x), reach, stride, padding, size, value=torch.iinfo(x.dtype).min)
    kept: Any = (..., *(slice(None, None, step) for step in dilation))
    return windows[kept].amax(dim=tuple(range(-len(kernel_size), 0))).to(x.dtype)


def max_pool_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Output size of a max pool over spatial dimensions of `size`, as torch computes it."""
    result = []
    for n, kernel, step, pad, spread in zip(size, kernel_size, stride, padding, dilation, strict=True):
        span = n + 2 * pad - spread * (kernel - 1) - 1
        count = -(-span // step) + 1 if ceil_mode else span // step + 1
        # The last window must start inside the input or its left padding.
        result.append(count - 1 if ceil_mode and (count - 1) * step >= n + pad else count)
    return result


def _windows(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_size: Sequence[int],
    *,
    value: int,
) -> torch.Tensor:
    """`x` `[*, *in]` as windows `[*, *output_size, *kernel_size]`, padded with `value` on both sides as needed."""
    rank = len(kernel_size)
    reach = [(out - 1) * step + kernel for out, step, kernel in zip(output_size, stride, kernel_size, strict=True)]
    after = [max(0, r - n - pad) for r, n, pad in zip(reach, x.shape[-rank:], padding, strict=True)]
    pads = [amount for axis in reversed(range(rank)) for amount in (padding[axis], after[axis])]
    windows = F.pad(x, pads, value=value)
    first = x.dim() - rank
    for axis in range(rank):
        windows = windows.unfold(first + axis, kernel_size[axis], stride[axis])
        windows = windows.narrow(first + axis, 0, output_size[axis])
    return windows


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
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum of each window of `x` `[N, C, *in]`; the factor includes one over the number of elements.

    `multiplier` and `shift` broadcast against `[N, C, *output_size]`, because windows at the edge may count fewer.
    """
    windows = _windows(wide(x, x_zero), kernel_size, stride, padding, output_size, value=0)
    sums = windows.sum(dim=tuple(range(-len(kernel_size), 0)))
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


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
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum of each adaptive window: window `i` of `n` over `L` covers floor(iL/n) to ceil((i+1)L/n)."""
    rank = len(output_size)
    sums = wide(x, x_zero)
    for axis, count in enumerate(output_size):
        dim = x.dim() - rank + axis
        length = x.shape[dim]
        bounds = [(i * length // count, -((-(i + 1) * length) // count)) for i in range(count)]
        sums = torch.stack([sums.narrow(dim, a, b - a).sum(dim) for a, b in bounds], dim)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


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
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The rescaled sum over `dims`; for a mean the factor includes one over the number of elements."""
    codes = wide(x, x_zero)
    sums = codes.sum(dim=list(dims), keepdim=keepdim) if dims else codes  # torch sums everything for no dims
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


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
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Weighted means of four neighbours of `x` `[N, C, H, W]`.

    `rows` and `columns` are int64 `[3, size]`: index before, index after, and the weight of the one after in units of
    `2**-weight_bits`; the weight of the one before is the rest to 1. The factor includes `2**(-2 * weight_bits)`.
    """
    one = 1 << weight_bits
    codes = wide(x, x_zero)
    above, below = codes.index_select(2, rows[0]), codes.index_select(2, rows[1])
    weight = rows[2].reshape(-1, 1)
    mixed = above * (one - weight) + below * weight
    left, right = mixed.index_select(3, columns[0]), mixed.index_select(3, columns[1])
    sums = left * (one - columns[2]) + right * columns[2]
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


def clamp_codes(x: torch.Tensor, *, low: int, high: int, format: str, trace: KernelTrace | None = None) -> torch.Tensor:
    """Codes between two bounds, at an unchanged scale."""
    return x.clamp(low, high).to(parse_qtype(format).storage)
