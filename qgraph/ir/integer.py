"""Recognizing integer operators: nodes that call `torch.ops.qgraph.*`."""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "qgraph"


def integer_operator(name: str) -> Any:
    """The torch operator of an integer operator's name; `qgraph.simulator.operators` registers them."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def integer_name(target: object) -> str | None:
    """Name of the integer operator a target is; None if it is something else."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return str(target._opname)
    return None
