"""A scale and a shift per channel, as a step of its own."""

from __future__ import annotations

import torch
from torch import nn


class Affine(nn.Module):
    """`x * weight + bias`; both broadcast against `x`.

    What remains of a batch norm that no convolution took over, and the end of a layer norm. Hardware does it while
    rescaling, so `weight` is never rounded to a few bits: it becomes part of the multiplier.

    Args:
        weight: factors, float, any shape that broadcasts.
        bias: what is added, same rules.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, any shape."""
        return x * self.weight + self.bias
