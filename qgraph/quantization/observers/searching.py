"""Histogram observers named after their search."""

from __future__ import annotations

from typing import ClassVar

import torch

from qgraph.quantization.observers.histogram import HistogramObserver
from qgraph.quantization.observers.kl import KLSearch
from qgraph.quantization.observers.search import ClipStdSearch, MixSearch, MSESearch, PercentileSearch, whole


class PercentileObserver(HistogramObserver):
    """Covers `percentile` percent of the magnitudes; for affine codes it leaves out the rest at either end.

    Args:
        percentile: above 50, at most 100.
        bins, ch_axis: as for `HistogramObserver`.
    """

    registered_name: ClassVar[str] = "percentile"

    def __init__(self, percentile: float = 99.99, bins: int = 2048, ch_axis: int = -1) -> None:
        super().__init__(bins, PercentileSearch(percentile), ch_axis)


class MSEObserver(HistogramObserver):
    """Covers the range with the least mean squared error; see `MSESearch`.

    Args:
        stride: try every `stride`-th of 100 thresholds.
        bins, ch_axis: as for `HistogramObserver`.
    """

    registered_name: ClassVar[str] = "mse"

    def __init__(self, stride: int = 1, bins: int = 2048, ch_axis: int = -1) -> None:
        super().__init__(bins, MSESearch(stride), ch_axis)


class KLObserver(HistogramObserver):
    """Covers the range whose codes keep most information; see `KLSearch`.

    Args:
        bins: of the histogram that is kept and compared.
        update_interval: in training, search after every so many steps; calibration searches once, at the end.
        ch_axis: as for `HistogramObserver`.
    """

    registered_name: ClassVar[str] = "kl"

    def __init__(self, bins: int = 512, update_interval: int = 1, ch_axis: int = -1) -> None:
        super().__init__(bins, KLSearch(bins), ch_axis)
        whole("update_interval", update_interval, 1, 1 << 30)
        self.update_interval = update_interval
        self._steps = 0

    @property
    def due(self) -> bool:
        return (self._steps - 1) % self.update_interval == 0

    def _count(self, slices: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        super()._count(slices, low, high)
        self._steps += 1

    def extra_repr(self) -> str:
        return f"update_interval={self.update_interval}, {super().extra_repr()}"


class MixObserver(HistogramObserver):
    """Covers that of several percentiles which has the least mean squared error.

    Args:
        percentiles: those to try.
        bins, ch_axis: as for `HistogramObserver`.
    """

    registered_name: ClassVar[str] = "mix"

    def __init__(
        self, percentiles: tuple[float, ...] = MixSearch.percentiles, bins: int = 2048, ch_axis: int = -1
    ) -> None:
        super().__init__(bins, MixSearch(percentiles), ch_axis)


class ClipStdObserver(HistogramObserver):
    """Covers mean plus and minus `std_scale` standard deviations, both of the histogram.

    Args:
        std_scale: above 0.
        bins, ch_axis: as for `HistogramObserver`.
    """

    registered_name: ClassVar[str] = "clip_std"

    def __init__(self, std_scale: float = 6.0, bins: int = 2048, ch_axis: int = -1) -> None:
        super().__init__(bins, ClipStdSearch(std_scale), ch_axis)
