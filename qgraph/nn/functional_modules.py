"""Operators as modules, so that each call has a name of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class FloatFunctional(nn.Module):
    """Arithmetic whose calls are named after the module: `self.skip.add(x, y)` is the site `skip[add]`.

    It has no `forward`; use one instance per place, because one instance is one name.
    """

    def add(self, x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
        """`x + y`."""
        return torch.add(x, y)

    def sub(self, x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
        """`x - y`."""
        return torch.sub(x, y)

    def mul(self, x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
        """`x * y`."""
        return torch.mul(x, y)

    def matmul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Matrix product of `x` and `y`."""
        return torch.matmul(x, y)

    def cat(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """`tensors` joined along `dim`."""
        return torch.cat(list(tensors), dim)

    def add_relu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`relu(x + y)`."""
        return torch.relu(torch.add(x, y))
