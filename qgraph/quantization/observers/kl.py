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
        tried = range(used, min(_levels(seen, qtype, scheme), used) - 1, -1)
        loss = torch.tensor([divergence(coarse.magnitudes, kept, tried[-1]) for kept in tried], dtype=torch.float64)
        kept = tried[first_least(loss)]
        return seen.clipped(seen.reach if kept == used else kept * coarse.width)


def _levels(seen: Distribution, qtype: QType, scheme: Scheme) -> int:
    """How many codes stand for magnitudes."""
    codes = qtype.qmax - qtype.qmin + 1
    if scheme is not Scheme.AFFINE or seen.reach == 0:
        return codes // 2
    return ceil(codes * seen.reach / (max(seen.high, 0.0) - min(seen.low, 0.0)))


def divergence(counts: torch.Tensor, kept: int, levels: int) -> float:
    """Divergence of the values, clipped to `kept` bins, from what `levels` codes make of those bins.

    Args:
        counts: int64 `[bins]`, the histogram of magnitudes.
        kept: bins below the threshold; values above count for the last of them.
        levels: codes, at most `kept`.

    Returns:
        The divergence in nats; infinite where a value has no code, as when only values above the threshold are in the
        last bin.
    """
    inner = counts[:kept].double()
    clipped = inner.clone()
    clipped[-1] += counts[kept:].sum()
    code = torch.arange(kept) * levels // kept
    filled = (inner > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add(0, code, inner)
    shares = torch.zeros(levels, dtype=torch.float64).index_add(0, code, filled)
    coded = filled * (sums / shares.clamp(min=1))[code]
    if bool(((clipped > 0) & (coded == 0)).any()):
        return float("inf")
    there = clipped > 0
    p, q = clipped[there] / clipped.sum(), coded[there] / coded.sum()
    return float((p * (p / q).log()).sum())
