"""Which sizes of a graph grow with its batch, and so are no constants."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qgraph.capture.values.structure import map_leaves
from qgraph.capture.values.variants import empty_with_batch, with_batch
from qgraph.ir.evaluate import call_node, evaluate
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


def fixed_sizes(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """Sizes the graph reads that are the same at every batch size that the input guard lets through.

    The graph runs without values: at one sample, at the example's batch, and at far larger ones. Where it cannot,
    because a size depends on values, nothing is known. What is computed from sizes is not compared: a remainder is
    the same at many batch sizes.
    """
    example = graph_info(gm).example
    guard: Any = next((module_of(node) for node in gm.graph.nodes if info(node).op is GUARD), None)
    if example is None or guard is None:
        return {}
    inputs, choice = dict(example.kwargs), guard.choice
    try:
        if choice is None:
            return _sizes(gm, inputs, inputs)
        sizes = dict.fromkeys((1, *(choice.size * factor for factor in (1, *_FAR))))
        first, *others = [_sizes(gm, inputs, empty_with_batch(inputs, choice, size)) for size in sizes]
    except Exception:  # noqa: BLE001 - kernels without values raise what they like; the sizes stay computed
        return {}
    return {node: size for node, size in first.items() if all(size == other.get(node) for other in others)}


_FAR = (1008, 1009)


def _sizes(gm: fx.GraphModule, example: dict[str, Any], inputs: dict[str, Any]) -> dict[fx.Node, int]:
    """The sizes that are read in a run on tensors without values, shaped as `inputs`, on the example's device."""
    found: dict[fx.Node, int] = {}
    numbers: set[fx.Node] = set()
    device = next(value.device for value in tree_leaves(example) if isinstance(value, torch.Tensor))

    def like(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    def call(node: fx.Node, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return None if info(node).op is GUARD else call_node(gm, node, args, named)

    def observe(node: fx.Node, value: Any) -> None:
        if isinstance(value, (int, float)) and node.op != "placeholder":
            numbers.add(node)
            if isinstance(value, int) and numbers.isdisjoint(node.all_input_nodes):
                found[node] = value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        evaluate(gm, (), {name: map_leaves(like, value) for name, value in inputs.items()}, call=call, observe=observe)
    return found


class _Found(Exception):
    """The value asked for is there; the rest of the graph need not run."""
