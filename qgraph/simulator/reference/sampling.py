"""Reference kernels: weighted neighbours at fixed and at computed positions.

Positions are integers in units of `2**-position_bits` pixels; cell and weight of a position are its high and low bits.
"""

from __future__ import annotations

import torch

from qgraph.simulator.reference.common import requantized, wide
from qgraph.simulator.trace import KernelTrace


def resize(
    x: torch.Tensor,
    depth: torch.Tensor | None,
    rows: torch.Tensor | None,
    columns: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Weighted sums of neighbours of `x` `[N, C, *in]`, one spatial dimension after the other.

    The tables, for as many spatial dimensions as `x` has, are integer `[2, taps, size]`: which elements of the
    dimension each result takes, and their weights.
    """
    tables = [table for table in (depth, rows, columns) if table is not None]
    sums = wide(x, x_zero)
    for dim, (indices, weights) in enumerate(tables, start=2):
        terms = [
            sums.index_select(dim, taken) * weight.to(torch.int64).reshape(-1, *[1] * (x.dim() - 1 - dim))
            for taken, weight in zip(indices, weights, strict=True)
        ]
        sums = torch.stack(terms).sum(dim=0)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


def sample_bilinear(
    x: torch.Tensor,
    positions: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor | None,
    *,
    position_bits: int,
    padding: str,
    align_corners: bool,
    arithmetic: str,
    low: int,
    high: int,
    format: str,
    x_zero: int = 0,
    zero: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """Weighted sums of the four neighbours of computed positions.

    Args:
        x: `[N, C, H, W]`.
        positions: int32 `[N, *out, 2]`, column before row, in units of `2**-position_bits`.
        padding: what lies outside, as in `torch.nn.functional.grid_sample`: `zeros`, `border` or `reflection`.

    Returns:
        `[N, C, *out]`.
    """
    one = 1 << position_bits
    codes = wide(x, x_zero)
    column, row = _inside(positions, x.shape[-2:], position_bits, padding, align_corners)
    left, top = column >> position_bits, row >> position_bits
    to_right, to_bottom = column & (one - 1), row & (one - 1)
    sums = torch.zeros((), dtype=torch.int64, device=x.device)
    for i, vertical in enumerate((one - to_bottom, to_bottom)):
        for j, horizontal in enumerate((one - to_right, to_right)):
            weight = (vertical * horizontal).unsqueeze(1)
            sums = sums + weight * _taken(codes, top + i, left + j, outside=0)
    return requantized(sums, multiplier, shift, arithmetic, low, high, format, zero, trace)


def sample_nearest(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    position_bits: int,
    padding: str,
    align_corners: bool,
    outside: int = 0,
    trace: KernelTrace | None = None,
) -> torch.Tensor:
    """The codes nearest to computed positions, halves to the even element; arguments as for `sample_bilinear`."""
    column, row = _inside(positions, x.shape[-2:], position_bits, padding, align_corners)
    return _taken(x, _nearest(row, position_bits), _nearest(column, position_bits), outside=outside)


def _nearest(position: torch.Tensor, bits: int) -> torch.Tensor:
    half = (1 << bits) >> 1
    below, rest = position >> bits, position & ((1 << bits) - 1)
    up = (rest > half) | ((rest == half) & (below % 2 == 1)) if bits else rest > 0
    return below + up


def _inside(
    positions: torch.Tensor, size: torch.Size, bits: int, padding: str, align_corners: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and row positions (int64), moved inside where the padding says so."""
    height, width = size
    column, row = wide(positions).unbind(-1)
    if padding == "reflection":
        column, row = _reflected(column, width, bits, align_corners), _reflected(row, height, bits, align_corners)
    if padding != "zeros":
        column, row = column.clamp(0, (width - 1) << bits), row.clamp(0, (height - 1) << bits)
    return column, row


def _reflected(position: torch.Tensor, size: int, bits: int, align_corners: bool) -> torch.Tensor:
    """Mirrored at the centres of the first and last element, or (without `align_corners`) at their outer edges."""
    edge = 0 if align_corners else (1 << bits) >> 1
    span = ((size - 1) << bits) + 2 * edge
    if span == 0:
        return torch.zeros_like(position)
    rest = (position + edge) % (2 * span)
    return torch.minimum(rest, 2 * span - rest) - edge


def _taken(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor, *, outside: int) -> torch.Tensor:
    """`x[n, :, row, column]` `[N, C, *out]`, and `outside` where these lie beyond the borders."""
    (batch, channels, height, width), out = x.shape, row.shape[1:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    index = flat.reshape(batch, 1, -1).expand(batch, channels, -1)
    taken = x.reshape(batch, channels, height * width).gather(2, index).reshape(batch, channels, *out)
    return torch.where(inside.unsqueeze(1), taken, torch.full((), outside, dtype=x.dtype, device=x.device))
