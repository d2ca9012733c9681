"""Fixed-point rescaling in float32, where that is proven to give the same codes.

    y = rint(fl(acc * m))                               one rounding
    y = rint(fl(fl(acc * m) + copysign(d, acc * m)))    two roundings; d is half a unit of the inner one

Exact codes are a rising staircase over the accumulator, and so is each formula. Two staircases are equal if they agree
around every step of one of them, because both are flat in between. So for every column and every code the accumulators around
the step are computed both ways; a column where a float32 product falls on the wrong side tries neighbouring factors.
"""

from __future__ import annotations

import torch

from qgraph.numerics import Factor, RequantizeRule, ScaleForm
from qgraph.simulator.fast.exact import SINGLE

_HIGH_BITS = 31
_TRIES = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6)


def step_factors(
    rule: RequantizeRule, factor: Factor, bound: int, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`m` and `d` (empty for one rounding) of the float32 formula, shaped as the multiplier; None if there are none.

    Args:
        rule: a fixed-point rule.
        factor: its multipliers and shifts.
        bound: bound of the accumulator's magnitude.
        low, high: codes between which the result is clamped, zero point aside.
    """
    multiplier, shift = factor.multiplier.to(torch.int64), factor.shifts().to(torch.int64)
    if bound > SINGLE or bound == 0 or bool((multiplier <= 0).any()):
        return None
    rows, places = torch.broadcast_tensors(multiplier.reshape(-1), shift.reshape(-1))
    points, wanted = _around_steps(rule, rows, places, bound, low, high)
    if points is None:
        return None
    real = torch.ldexp(rows.double(), -places.double())
    addend = torch.zeros(0)
    if rule.form is ScaleForm.FIXED_POINT_TWO:
        # A little more than half a unit: a tie of the inner rounding goes up.
        addend = torch.ldexp(torch.ones(()), -(places - _HIGH_BITS).clamp(min=0).float() - 1) * (1 + 2.0**-20)
        addend = torch.where(places <= _HIGH_BITS, torch.zeros(()), addend)
    chosen, open_rows = real.float(), torch.ones(len(rows), dtype=torch.bool)
    for tries in _TRIES:
        candidate = _neighbour(real.float(), tries)
        found = _formula(points, candidate[:, None], addend[:, None] if addend.numel() else addend)
        agrees = (found.clamp(low - 1, high + 1) == wanted).all(1)
        chosen = torch.where(open_rows & agrees, candidate, chosen)
        open_rows &= ~agrees
        if not bool(open_rows.any()):
            shape = factor.multiplier.shape if multiplier.numel() >= shift.numel() else shift.shape
            return chosen.reshape(shape), addend.reshape(shape) if addend.numel() else addend
    return None


def _around_steps(
    rule: RequantizeRule, multiplier: torch.Tensor, shift: torch.Tensor, bound: int, low: int, high: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Accumulators around every step, float32 `[columns, points]`, and their exact codes; None if a step was not found."""
    codes = torch.arange(low, high + 2, dtype=torch.float64)
    real = torch.ldexp(multiplier.double(), -shift.double())
    first = torch.ceil((codes - 0.5) / real[:, None]).clamp(-2.0 * bound, 2.0 * bound).to(torch.int64)
    # Two roundings begin up to half an inner unit, below one accumulator unit, away.
    reach = torch.tensor([-2, -1, 0, 1])
    points = (first[:, :, None] + reach).clamp(-bound, bound)
    column = (slice(None), None, None)
    exact = rule.apply(points, Factor(multiplier[column], shift[column]))
    begins = (exact[:, :, 0] < codes) | (points[:, :, 0] == -bound)
    ends = (exact[:, :, -1] >= codes) | (points[:, :, -1] == bound)
    wanted = exact.clamp(low - 1, high + 1).flatten(1).float()
    return (points.flatten(1).float() if bool((begins & ends).all()) else None), wanted


def _formula(accumulators: torch.Tensor, factor: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    scaled = accumulators * factor
    if addend.numel():
        scaled = scaled + torch.copysign(addend, scaled)
    return torch.round(scaled)


def _neighbour(values: torch.Tensor, count: int) -> torch.Tensor:
    """The float32 numbers `count` places up (down if negative)."""
    for _ in range(abs(count)):
        values = torch.nextafter(values, torch.full_like(values, float("inf") if count > 0 else 0.0))
    return values
