"""Bit-exact execution of integer graphs."""

from qgraph.simulator.cost import OpCost
from qgraph.simulator.simulator import (
    KERNEL_SETS,
    OpReport,
    Simulator,
    SimulatorRun,
    register_kernel,
    register_operator,
)
from qgraph.simulator.trace import KernelTrace

__all__ = [
    "KERNEL_SETS",
    "KernelTrace",
    "OpCost",
    "OpReport",
    "Simulator",
    "SimulatorRun",
    "register_kernel",
    "register_operator",
]
