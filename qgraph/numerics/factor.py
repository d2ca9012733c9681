"""A rescaling factor as a device stores it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qgraph.errors import UserError


@dataclass(frozen=True, eq=False)
class Factor:
    """A stored factor: `multiplier` (float32, or int64 mantissas) and `shift` (int64, None for floats)."""

    multiplier: torch.Tensor
    shift: torch.Tensor | None

    def shifts(self) -> torch.Tensor:
        """The shifts of a form that has them."""
        if self.shift is None:
            raise UserError("this factor was encoded as a float and has no shift")
        return self.shift

    def real(self) -> torch.Tensor:
        """The factor it stands for, float64, shape of `multiplier`."""
        if self.shift is None:
            return self.multiplier.to(torch.float64)
        return torch.ldexp(self.multiplier.to(torch.float64), -self.shift.to(torch.float64))
