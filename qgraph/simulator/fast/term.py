"""A term of a rescaled sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qgraph.simulator.fast.exact import SINGLE, largest


@dataclass(frozen=True)
class Term:
    """One term of a sum.

    Args:
        multiplier: its factor, broadcastable to the result.
        bound: bound of the magnitude of `value - zero + start`.
        zero: zero point of its codes.
        start: int32, what is added to its values before all else, as a bias; `[]` or broadcastable.
    """

    multiplier: torch.Tensor
    bound: int
    zero: int = 0
    start: torch.Tensor | None = None

    def is_single(self) -> bool:
        """Whether float32 holds its value, `start` and what arises while they are added."""
        return self.bound + largest(self.start) + abs(self.zero) <= SINGLE
