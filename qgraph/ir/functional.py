"""Functions that canonical graphs call and torch does not have as pure functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def set_item(input: torch.Tensor, index: Any, value: torch.Tensor | float) -> torch.Tensor:
    """A copy of `input` (any shape) with `copy[index] = value`."""
    result = input.clone()
    result[index] = value
    return result


def rsqrt_eps(input: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """`1 / sqrt(input + eps)` elementwise: the root of a normalization, as one table."""
    return torch.rsqrt(input + eps)


def item(value: Any, index: Any) -> Any:
    """`value[index]` of a tuple, list or dict: access to a part of a structure, not of a tensor."""
    return value[index]


def field(value: Any, name: str) -> Any:
    """`value.name` of a dataclass or named tuple among the inputs."""
    return getattr(value, name)


def copy_to(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`other` in the shape, dtype and layout of `input`: the pure form of `input.copy_(other)`."""
    return torch.empty_like(input).copy_(other)


def top_indices(input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> torch.Tensor:
    """The indices of `torch.topk`, int64."""
    return torch.topk(input, k, dim, largest, sorted).indices


def argsort(input: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> torch.Tensor:
    """`torch.argsort`, whose `stable` may be given by name only and not to every overload."""
    return torch.sort(input, dim=dim, descending=descending, stable=stable).indices


def windows(input: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    """`input.unfold(dimension, size, step)`: windows along one dimension, as a last dimension."""
    return input.unfold(dimension, size, step)


def grid_sample(
    input: torch.Tensor,
    grid: torch.Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> torch.Tensor:
    """`F.grid_sample`, which warns unless `align_corners` is given."""
    return F.grid_sample(input, grid, mode, padding_mode, align_corners)


def mask(input: torch.Tensor, above: float | None = None, inverted: bool = False) -> torch.Tensor:
    """Where attention may look: 1.0 where `input` holds (a boolean), or lies above a threshold, else 0.0.

    Args:
        input: any shape, boolean; a float tensor if `above` is given.
        above: the threshold.
        inverted: whether 1.0 and 0.0 change places.
    """
    allowed = input if above is None else input > above
    return (~allowed if inverted else allowed).to(torch.float32)


def mask_bias(input: torch.Tensor, above: float) -> torch.Tensor:
    """What an additive mask (float, any shape) adds where it allows anything: 0 at and below the threshold `above`."""
    return torch.where(input > above, input, 0.0)
