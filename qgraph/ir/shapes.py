"""Shapes and dtypes of every value, from one real run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import info, set_info
from qgraph.ir.values import TensorSpec, spec_of


def record_values(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs the graph once without gradients and writes every node's `value`; returns the outputs."""

    def observe(node: fx.Node, value: Any) -> None:
        record, spec = info(node), spec_of(value)
        if record.value != spec:
            set_info(node, replace(record, value=spec))

    with torch.no_grad():
        return evaluate(gm, args, kwargs, observe=observe)


def tensor_spec(node: fx.Node) -> TensorSpec | None:
    """Shape and dtype of a node whose value is one tensor; None if it is something else or unknown."""
    value = info(node).value
    return value if isinstance(value, TensorSpec) else None
