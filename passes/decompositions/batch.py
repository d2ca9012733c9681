"""Which sizes of a graph grow with its batch, and so are no constants for a decomposition."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from qgraph.capture.values.variants import with_batch
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import GUARD
from qgraph.ir.shapes import tensor_spec
from qgraph.rewrite import Verdict, no, yes


def fixed_axis(node: fx.Node, axis: int, what: str) -> Verdict:
    """Whether a dimension of a value is the same at every batch size.

    Args:
        node: the value.
        axis: its dimension.
        what: what the dimension counts, for the reason.
    """
    doubled = _shape_at_twice_the_batch(node)
    spec = tensor_spec(node)
    if spec is None or (doubled is not None and doubled[axis] != spec.shape[axis]):
        return no(f"the number of {what} is the batch size, which the graph leaves open", node)
    return yes()


def _shape_at_twice_the_batch(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a value when the example is given twice; None where no batch size is left open."""
    gm = node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    example = graph_info(gm).example
    guard: Any = next((module_of(other) for other in gm.graph.nodes if info(other).op is GUARD), None)
    if graph_info(gm).batch_fixed is not None or example is None or guard is None or guard.choice is None:
        return None
    found: list[tuple[int, ...]] = []

    def observe(other: fx.Node, value: Any) -> None:
        if other is node:
            found.append(tuple(value.shape))
            raise _Found

    with contextlib.suppress(_Found), torch.no_grad():
        evaluate(gm, (), with_batch(dict(example.kwargs), guard.choice, 2, 0), observe=observe)
    return found[0] if found else None


class _Found(Exception):
    """The value asked for is there; the rest of the graph need not run."""
