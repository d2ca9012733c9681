"""Reference kernels: prefix sums, windows as columns, and indices by value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from qgraph.simulator.reference.common import requantized, wide
from qgraph.simulator.trace import KernelTrace


def cumsum(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    dim: int,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Rescaled sums of each element and all before it along `dim`; every sum enters the accumulator once."""
    sums = wide(x, x_zero).cumsum(dim)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


def unfold(
    x: torch.Tensor,
    *,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    outside: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Windows of `x` `[N, C, H, W]` as columns `[N, C * kernel, windows]`; padding is real zero."""
    size = unfolded_size(x.shape[-2:], kernel_size, dilation, padding, stride)
    (above, before) = padding
    padded = torch.nn.functional.pad(x, (before, before, above, above), value=outside)
    taps = [padded[..., rows, columns] for rows, columns in _taps(size, kernel_size, dilation, stride)]
    return torch.stack(taps, dim=-3).reshape(*x.shape[:-3], -1, size[0] * size[1])


def fold(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Columns `[N, C * kernel, windows]` added up where their windows overlap, and rescaled: `[N, C, *output_size]`."""
    size = unfolded_size(output_size, kernel_size, dilation, padding, stride)
    taps = list(_taps(size, kernel_size, dilation, stride))
    columns = wide(x, x_zero).reshape(*x.shape[:-2], -1, len(taps), *size)
    full = [length + 2 * pad for length, pad in zip(output_size, padding, strict=True)]
    sums = columns.new_zeros([*columns.shape[:-3], *full])
    for tap, (rows, places) in enumerate(taps):
        sums[..., rows, places] += columns[..., tap, :, :]
    for dim, (pad, length) in enumerate(zip(padding, output_size, strict=True), start=-2):
        sums = sums.narrow(dim, pad, length)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


def unfolded_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> list[int]:
    """Windows along each dimension."""
    geometry = zip(size, kernel_size, dilation, padding, stride, strict=True)
    return [(length + 2 * pad - spread * (k - 1) - 1) // step + 1 for length, k, spread, pad, step in geometry]


def _taps(
    size: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> list[tuple[slice, slice]]:
    """For each element of the kernel, the rows and columns that it meets over all windows."""

    def slices(axis: int) -> list[slice]:
        starts = [tap * dilation[axis] for tap in range(kernel_size[axis])]
        return [slice(start, start + (size[axis] - 1) * stride[axis] + 1, stride[axis]) for start in starts]

    return list(product(slices(0), slices(1)))


def arg_extreme(
    x: torch.Tensor, *, dim: int | None, keepdim: bool, largest: bool, trace: KernelTrace | None = None
) -> torch.Tensor:
    """The index (int64) of the first largest or smallest code along `dim`, or in the flattened tensor."""
    if dim is None:
        index = arg_extreme(x.reshape(-1), dim=0, keepdim=False, largest=largest)
        return index.reshape([1] * x.dim()) if keepdim else index
    index = order(x, dim=dim, descending=largest, count=1)
    return index if keepdim else index.squeeze(dim)


def order(
    x: torch.Tensor, *, dim: int, descending: bool, count: int | None, trace: KernelTrace | None = None
) -> torch.Tensor:
    """Indices (int64) that put codes in order along `dim`, the first `count` of them; equal codes keep their order."""
    indices = torch.sort(wide(x), dim=dim, descending=descending, stable=True).indices
    return indices if count is None else indices.narrow(dim, 0, count)
