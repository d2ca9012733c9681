"""Shapes and dtypes of values, as the run on the example inputs saw them."""

from __future__ import annotations

from torch import fx

from qgraph.ir.node_info import info
from qgraph.ir.values import TensorSpec


def tensor_spec(node: fx.Node) -> TensorSpec | None:
    """Shape and dtype of a node whose value is one tensor; None if it is something else or unknown."""
    value = info(node).value
    return value if isinstance(value, TensorSpec) else None
