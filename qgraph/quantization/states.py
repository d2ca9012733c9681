"""The states of a prepared graph and the moves between them."""

from __future__ import annotations

from enum import Enum


class FakeQuantState(str, Enum):
    """What every site does when the graph runs."""

    FLOAT = "float"
    """Nothing: the graph computes what the float model does."""
    CALIBRATION = "calibration"
    """Observe ranges, pass values on unchanged."""
    QAT = "qat"
    """Observe ranges and round, with straight-through gradients."""
    VALIDATION = "validation"
    """Round with fixed scales: what the integer graph will compute."""

    def __str__(self) -> str:
        return self.value
