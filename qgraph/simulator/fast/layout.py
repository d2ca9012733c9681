"""Memory layouts: activations stay channels_last, and elementwise kernels see flat memory or rows."""

from __future__ import annotations

from typing import Any

import torch

from qgraph.numerics import qint8


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` `[N, C, H, W]` with channels innermost in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """A channels_last `[N, C, H, W]` as contiguous rows `[N * H * W, C]`."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image_of(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Rows as a channels_last tensor of `shape` `[N, C, H, W]`."""
    return rows.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if it fills its memory in a layout that `torch.empty_like` keeps, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def memory(x: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory, `[n]`."""
    return x.as_strided((x.numel(),), (1,))


def array_of(x: torch.Tensor) -> Any:
    """As `memory`, a numpy array: torch takes ten times as long to make a view."""
    array = x.numpy()
    return (array if x.is_contiguous() else array.transpose(0, 2, 3, 1)).reshape(-1)


def array_of_rows(x: torch.Tensor) -> Any:
    """As `rows_of`, a numpy array that shares the memory of a channels_last `x`."""
    return x.numpy().transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


def shaped_as(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Elements in the order of `x`'s memory, as a tensor of its shape and strides."""
    return flat.as_strided(x.shape, x.stride())


def as_unsigned(x: torch.Tensor, low: int, zero: int) -> tuple[torch.Tensor, int]:
    """8-bit codes as uint8, and the code that is their zero point then.

    Codes that are never negative are viewed; others have their sign bit flipped, which adds 128.
    """
    if x.dtype is torch.uint8:
        return x, zero
    if low >= 0:
        return x.view(torch.uint8), zero
    return x.view(torch.uint8) ^ (qint8.qmax + 1), zero - qint8.qmin
