"""The histogram of one slice, and what rounding to a grid would cost its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from qgraph.numerics import QType, Scheme, choose_qparams

_Formula: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_NARROW = 1e-6
"""Bins below this part of the reach count as points: the difference of two integrals would be rounding noise."""
_BLOCK = 1 << 14
"""Entries of the largest table at a time, grids by bins: small ones stay in the cache."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """How often which values occurred; searches work on it, in float64 on the CPU.

    Args:
        counts: int64 `[2 * bins]`; entry `bins - 1 + i` counts values `x` with `ceil(x / width) == i`.
        width: of a bin, a power of two.
        low, high: the smallest and largest value, finite.
    """

    counts: torch.Tensor
    width: float
    low: float
    high: float

    @property
    def bins(self) -> int:
        """Bins per sign."""
        return self.counts.numel() // 2

    @property
    def reach(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @cached_property
    def edges(self) -> torch.Tensor:
        """float64 `[2 * bins + 1]`: ends of the bins, cut to where values are.

        Where none is negative, the bin of zero has no width: nothing but zeros is in it.
        """
        return (torch.arange(-self.bins, self.bins + 1, dtype=torch.float64) * self.width).clamp(self.low, self.high)

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        """int64 `[bins]`: the histogram of `|x|`; values on an edge count below it if positive, else above."""
        return self.counts[self.bins :] + self.counts[: self.bins].flip(0)

    @cached_property
    def occupied(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count, lower end and upper end of the bins that hold values, float64 `[M]` each."""
        index = self.counts.nonzero().flatten()
        return self.counts[index].double(), self.edges[index], self.edges[index + 1]

    def coarsened(self, bins: int) -> Distribution:
        """The same values in `bins` bins per sign, a power of two not above the present number."""
        step = (self.bins // bins).bit_length() - 1
        counts = merge_bins(self.counts, torch.tensor(step))
        spare = self.bins - bins
        return Distribution(counts[spare : spare + 2 * bins], self.width * 2**step, self.low, self.high)

    def quantile(self, part: float) -> float:
        """The value that `part` (0 to 1) of all values do not exceed, linear within a bin."""
        return _quantile(self.counts, self.edges, part)

    def magnitude_quantile(self, part: float) -> float:
        """As `quantile`, for `|x|`."""
        least = max(self.low, -self.high, 0.0)
        edges = (torch.arange(self.bins + 1, dtype=torch.float64) * self.width).clamp(least, self.reach)
        return _quantile(self.magnitudes, edges, part)

    def clipped(self, threshold: float) -> tuple[float, float]:
        """The range of the values, widened to hold zero, without magnitudes above `threshold`."""
        return max(min(self.low, 0.0), -threshold), min(max(self.high, 0.0), threshold)

    def errors(self, ranges: list[tuple[float, float]], qtype: QType, scheme: Scheme, metric: str) -> torch.Tensor:
        """Mean error of rounding to the grids that cover `ranges`, values spread evenly in their bins.

        Args:
            ranges: K of them.
            qtype: format of the codes.
            scheme: how a range becomes a grid.
            metric: a key of `METRICS`.

        Returns:
            float64 `[K]`.
        """
        bounds = torch.tensor(ranges, dtype=torch.float64).to(torch.float32)
        grids = choose_qparams(bounds[:, 0], bounds[:, 1], qtype, scheme=scheme, axis=0)
        step, zero = grids.scale.double().unsqueeze(1), grids.zero_points().unsqueeze(1)
        table = torch.cat([step, (qtype.qmin - zero) * step, (qtype.qmax - zero) * step], dim=1)
        per_block = max(_BLOCK // self.occupied[0].numel(), 1)
        return torch.cat([self._errors(grid, *METRICS[metric]) for grid in table.split(per_block)])

    def _errors(self, grids: torch.Tensor, point: _Formula, integral: _Formula) -> torch.Tensor:
        """Mean errors `[K]` for rows `step, lowest value, highest value` of `grids` `[K, 3]`."""
        counts, lower, upper = self.occupied
        narrow = upper - lower <= _NARROW * self.reach
        middle = ((lower + upper) / 2)[narrow]
        sums = (_apply(point, middle, grids) * counts[narrow]).sum(1)
        low, high = lower[~narrow], upper[~narrow]
        ends, where = torch.unique(torch.cat([low, high]), return_inverse=True)  # neighbours share theirs
        first, last = _apply(integral, ends, grids)[:, where].tensor_split(2, dim=1)
        sums += ((last - first) * (counts[~narrow] / (high - low))).sum(1)
        return sums / counts.sum()


def merge_bins(counts: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Counts `[..., 2 * bins]` after merging bins in pairs `times` (int64 `[...]`) times; the outer ones end empty."""
    bins = counts.shape[-1] // 2
    index = torch.arange(1 - bins, bins + 1, device=counts.device)
    moved = -(-index >> times.clamp(max=62).unsqueeze(-1))  # ceil(index / 2**times)
    return torch.zeros_like(counts).scatter_add(-1, (moved + bins - 1).expand_as(counts), counts)


def _quantile(counts: torch.Tensor, edges: torch.Tensor, part: float) -> float:
    total = counts.cumsum(0).double()
    wanted = part * float(total[-1])
    index = min(int(torch.searchsorted(total, wanted)), counts.numel() - 1)
    inside = (wanted - float(total[index] - counts[index])) / max(int(counts[index]), 1)
    return float(edges[index] + inside * (edges[index + 1] - edges[index]))


def _apply(formula: _Formula, x: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """A formula at values `[M]` for grids `[K, 3]`: `[K, M]`."""
    step, lowest, highest = grids.unsqueeze(2).unbind(1)
    inside = x.clamp(lowest, highest)
    whole = torch.round(inside / step)
    return formula(step, whole, inside / step - whole, x - inside)


# In the formulas a value is `(whole + rest) * step + beyond`: `beyond` is what clipping took away, `rest * step` what
# rounding did; one of the two is zero. The integrals run from real zero to the value: every whole step passed adds the
# same amount.


def _squared(step: torch.Tensor, whole: torch.Tensor, rest: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    return (rest * step + beyond) ** 2


def _squared_integral(
    step: torch.Tensor, whole: torch.Tensor, rest: torch.Tensor, beyond: torch.Tensor
) -> torch.Tensor:
    return step**3 * (whole / 12 + rest**3 / 3) + beyond**3 / 3


def _absolute(step: torch.Tensor, whole: torch.Tensor, rest: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    return (rest * step + beyond).abs()


def _absolute_integral(
    step: torch.Tensor, whole: torch.Tensor, rest: torch.Tensor, beyond: torch.Tensor
) -> torch.Tensor:
    return step**2 * (whole / 4 + rest * rest.abs() / 2) + beyond * beyond.abs() / 2


METRICS: dict[str, tuple[_Formula, _Formula]] = {
    "mse": (_squared, _squared_integral),
    "mae": (_absolute, _absolute_integral),
}
"""Error of a value, and its integral from zero."""
