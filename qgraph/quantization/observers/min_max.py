"""Ranges from extremes: of all data, or averaged over batches."""

from __future__ import annotations

from typing import ClassVar

import torch

from qgraph.errors import QuantizationError
from qgraph.quantization.observers.base import Observer


class MinMaxObserver(Observer):
    """The smallest and largest value ever seen."""

    registered_name: ClassVar[str] = "min_max"


class MovingAverageMinMaxObserver(Observer):
    """Moving averages of each batch's extremes: `range += averaging_constant * (batch range - range)`.

    Args:
        averaging_constant: weight of a new batch; 0 keeps the first range for ever.
        ch_axis: as for `Observer`.
    """

    registered_name: ClassVar[str] = "moving_average"

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int = -1) -> None:
        super().__init__(ch_axis)
        if not 0.0 <= averaging_constant <= 1.0:
            raise QuantizationError(f"averaging_constant is {averaging_constant}", fix="give a number from 0 to 1")
        self.averaging_constant = averaging_constant

    def _update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        if self._has_range:
            low = self.min_val + self.averaging_constant * (low - self.min_val)
            high = self.max_val + self.averaging_constant * (high - self.max_val)
        self.min_val, self.max_val = low, high

    def merge(self, other: Observer) -> None:
        """Refused: an average over batches depends on their order, which two observers do not tell.

        Raises:
            QuantizationError: always.
        """
        raise QuantizationError(
            "moving averages cannot be merged",
            why="they depend on the order of the batches",
            fix="use the observer min_max, or one that keeps a histogram",
        )

    def extra_repr(self) -> str:
        return f"averaging_constant={self.averaging_constant}, {super().extra_repr()}"


class PerChannelMinMaxObserver(MinMaxObserver):
    """`MinMaxObserver` with one range per slice of dimension 0, the output channels of most weights."""

    registered_name: ClassVar[str] = "min_max"

    def __init__(self, ch_axis: int = 0) -> None:
        super().__init__(ch_axis)


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver):
    """`MovingAverageMinMaxObserver` with one range per slice of dimension 0."""

    registered_name: ClassVar[str] = "moving_average"

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int = 0) -> None:
        super().__init__(averaging_constant, ch_axis)
