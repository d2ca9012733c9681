"""The four stages of a graph on its way from float to integers."""

from __future__ import annotations

from enum import Enum


class Stage(str, Enum):
    """What a graph promises; `qgraph.ir.verifier` holds the rules of each stage."""

    CAPTURED = "captured"
    """As the model ran: the user's modules and spellings."""
    FUSED = "fused"
    """Canonical float ops, fused as the hardware fuses them; annotated step by step."""
    PREPARED = "prepared"
    """Float graph with fake quantization at every site: calibration, training, analysis."""
    INTEGER = "integer"
    """Integer operators, with declared float islands between quantize and dequantize."""

    def __str__(self) -> str:
        return self.value
