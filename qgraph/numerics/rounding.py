"""Rounding and overflow, named, for integers and for floats.

Integer shifts are exact: they work on int64 tensors and never pass through floating point.
"""

from __future__ import annotations

from enum import Enum

import torch

from qgraph.numerics.formats import QType


class Rounding(str, Enum):
    """How a value between two integers is rounded."""

    HALF_EVEN = "half_even"
    HALF_UP = "half_up"
    HALF_AWAY = "half_away"
    FLOOR = "floor"

    def __str__(self) -> str:
        return self.value


class Overflow(str, Enum):
    """What happens to a value outside its format."""

    SATURATE = "saturate"
    WRAP = "wrap"

    def __str__(self) -> str:
        return self.value

    def apply(self, codes: torch.Tensor, qtype: QType) -> torch.Tensor:
        """`codes` (any shape, int64) brought into `qtype`'s bounds, dtype unchanged."""
        return qtype.saturate(codes) if self is Overflow.SATURATE else qtype.wrap(codes)


def round_float(values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """`values` (any shape, float dtype) rounded to integers, in the same dtype.

    Adding one half would itself round for values just below it, so the directed modes look at the distance to
    the nearest integer on the side of zero (exact by Sterbenz' lemma); they are exact for every finite input.
    """
    if rounding is Rounding.HALF_EVEN:
        return torch.round(values)
    if rounding is Rounding.FLOOR:
        return torch.floor(values)
    whole = torch.trunc(values)
    rest = values - whole
    away = rest.abs() >= 0.5 if rounding is Rounding.HALF_AWAY else (rest >= 0.5) | (rest < -0.5)
    return whole + away.to(values.dtype) * torch.sign(rest)


def rounding_shift_right(values: torch.Tensor, shift: torch.Tensor | int, rounding: Rounding) -> torch.Tensor:
    """`values / 2**shift` rounded to integers.

    Args:
        values: int64, any shape.
        shift: int64, broadcastable to `values`, each entry between 0 and 62.
        rounding: the rule for what lies between two integers.

    Returns:
        int64 tensor of the broadcast shape.
    """
    amount = torch.as_tensor(shift, dtype=torch.int64, device=values.device)
    quotient = values >> amount
    if rounding is Rounding.FLOOR:
        return quotient
    remainder = values - (quotient << amount)
    # 2 * remainder against 2**shift needs no fraction, and shift 0 (remainder 0) never rounds up.
    twice, whole = remainder << 1, torch.ones_like(amount) << amount
    if rounding is Rounding.HALF_UP:
        up = twice >= whole
    elif rounding is Rounding.HALF_AWAY:
        up = torch.where(values < 0, twice > whole, twice >= whole)
    else:
        up = (twice > whole) | ((twice == whole) & ((quotient & 1) == 1))
    return quotient + up.to(torch.int64)
