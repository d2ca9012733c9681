"""Markers of the border between real numbers and integers."""

from __future__ import annotations

import torch
from torch import nn


class QuantStub(nn.Module):
    """Marks a tensor that enters integer arithmetic; the identity in float.

    Args:
        scale: a fixed scale for this input, never updated by calibration or training; None to observe it.
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, any shape and float dtype, unchanged."""
        return x

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale}"


class DeQuantStub(nn.Module):
    """Marks a tensor that leaves integer arithmetic; the identity in float."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, any shape and float dtype, unchanged."""
        return x
