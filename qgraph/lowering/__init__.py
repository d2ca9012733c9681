"""From float operators to integer operators; see `qgraph.lowering.base`."""

import qgraph.simulator.operators  # noqa: F401 - registers what lowerings emit
from qgraph.lowering import elementwise, functions, indexing, movement, products, sampling, selection, windows
from qgraph.lowering.base import (
    LOWERINGS,
    Lowering,
    LoweringContext,
    bounds,
    lowering_of,
    register_lowering,
    support,
)
from qgraph.lowering.elementwise import requantized_to

__all__ = [
    "LOWERINGS",
    "Lowering",
    "LoweringContext",
    "bounds",
    "elementwise",
    "functions",
    "indexing",
    "lowering_of",
    "movement",
    "products",
    "register_lowering",
    "requantized_to",
    "sampling",
    "selection",
    "support",
    "windows",
]
