"""The threshold that loses the least information.

After S. Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from qgraph.numerics import QType, Scheme
from qgraph.quantization.observers.distribution import Distribution
from qgraph.quantization.observers.search import Search, first_least, power_of_two

_BLOCK = 1 << 22
"""Entries of the largest table at a time: thresholds by bins."""


@dataclass(frozen=True)
class KLSearch(Search):
    """The threshold whose codes' histogram is closest to that of the values, in Kullback-Leibler divergence.

    Every threshold at a bin edge is tried that leaves at least one bin per code. A format with more codes than there
    are bins keeps everything, because nothing is lost then: int16 with the usual 512 bins.

    Args:
        bins: of the histogram of magnitudes that is compared; finer ones are merged, coarser ones taken as they are.
    """

    name: ClassVar[str] = "kl"
    bins: int = 512

    def __post_init__(self) -> None:
        power_of_two("bins", self.bins)

    def find(self, seen: Distribution, qtype: QType, scheme: Scheme) -> tuple[float, float]:
        coarse = seen.coarsened(min(self.bins, seen.bins))
        used = max(int(coarse.magnitudes.nonzero().max()) + 1, 1)
        levels = min(_levels(seen, qtype, scheme), used)
        tried = torch.arange(used, levels - 1, -1)
        kept = int(tried[first_least(divergence(coarse.magnitudes, tried, levels))])
        return seen.clipped(seen.reach if kept == used else kept * coarse.width)


def _levels(seen: Distribution, qtype: QType, scheme: Scheme) -> int:
    """How many codes stand for magnitudes."""
    codes = qtype.qmax - qtype.qmin + 1
    if scheme is not Scheme.AFFINE or seen.reach == 0:
        return codes // 2
    return ceil(codes * seen.reach / (max(seen.high, 0.0) - min(seen.low, 0.0)))


def divergence(counts: torch.Tensor, kept: torch.Tensor, levels: int) -> torch.Tensor:
    """Divergence of the values, clipped to the first bins, from what `levels` codes make of those bins.

    Args:
        counts: int64 `[bins]`, the histogram of magnitudes.
        kept: int64 `[K]`, bins below each threshold; values above count for the last of them.
        levels: codes, at most `kept`.

    Returns:
        float64 `[K]`, in nats; infinite where a value has no code, as when only values above the threshold are in the
        last bin.
    """
    per_block = max(_BLOCK // counts.numel(), 1)
    return torch.cat([_divergence(counts.double(), block.unsqueeze(1), levels) for block in kept.split(per_block)])


def _divergence(counts: torch.Tensor, kept: torch.Tensor, levels: int) -> torch.Tensor:
    bins = torch.arange(counts.numel())
    inside, filled = bins < kept, (counts > 0).double()
    starts = (torch.arange(levels + 1) * kept + levels - 1) // levels  # of each code's bins
    share = _sums(counts, starts) / _sums(filled, starts).clamp(min=1)
    code = (bins * levels // kept).clamp(max=levels - 1)
    coded = torch.where(inside, filled * share.gather(1, code), 0.0)
    clipped = torch.where(inside, counts, 0.0).scatter_add(1, kept - 1, torch.where(inside, 0.0, counts).sum(1, True))
    p, q = clipped / clipped.sum(1, True), coded / coded.sum(1, True).clamp(min=1)
    return torch.where(p > 0, p * torch.where(p > 0, p / q, 1.0).log(), 0.0).sum(1)


def _sums(values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sums of `values` between neighbouring `starts` `[K, L + 1]`: `[K, L]`."""
    before = torch.cat([values.new_zeros(1), values.cumsum(0)])[starts]
    return before[:, 1:] - before[:, :-1]
