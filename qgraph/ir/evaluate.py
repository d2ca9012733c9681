"""One loop over a graph; what happens at a node is a function.

Numeric checks, shape recording, per-site comparisons and the simulator all run this loop with another `call`.
Values are dropped after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qgraph.errors import UserError
from qgraph.ir.node_info import has_info, submodule_at, tensor_at, where

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
Observe = Callable[[fx.Node, Any], None]


def evaluate(
    gm: fx.GraphModule,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    call: Call | None = None,
    observe: Observe | None = None,
) -> Any:
    """Runs the graph.

    Args:
        gm: the module.
        args, kwargs: its inputs, as for calling it.
        call: computes a call node's value from its evaluated arguments; fx semantics if not given.
        observe: sees every node that has a value, with the value.

    Returns:
        What the graph returns.

    Raises:
        UserError: the inputs do not fit the placeholders.
        Exception: whatever a node raises, with the node and its line noted on it.
    """
    compute = call or (lambda node, values, named: call_node(gm, node, values, named))
    environment = bind_inputs(gm.graph, args, kwargs or {})
    last_uses = last_users(gm.graph)

    def load(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: environment[node])

    for node in gm.graph.nodes:
        if node.op == "output":
            return load(node.args[0])
        if node.op == "get_attr":
            tensor = tensor_at(gm, str(node.target))
            # What a parameter was folded from needed no gradient either; attention picks its kernel by that.
            environment[node] = tensor if torch.is_grad_enabled() else tensor.detach()
        elif node.op != "placeholder":
            try:
                environment[node] = compute(node, load(node.args), load(node.kwargs))
            except Exception as error:
                note_node(error, node)
                raise
        if observe is not None:
            observe(node, environment[node])
        for dead in last_uses.get(node, ()):
            del environment[dead]
    return None


def call_node(gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a call node under fx semantics."""
    if node.op == "call_module":
        return submodule_at(gm, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def bind_inputs(graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Placeholder to value.

    Raises:
        UserError: too many, missing or unknown arguments.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    if len(args) > len(placeholders):
        raise UserError(f"the graph takes {len(placeholders)} inputs ({', '.join(names)}), got {len(args)}")
    unknown = sorted(set(kwargs) - set(names))
    if unknown:
        raise UserError(f"the graph has no input {unknown}", fix=f"its inputs are {', '.join(names)}")
    bound = dict(zip(placeholders, args, strict=False))
    for node, name in zip(placeholders, names, strict=True):
        if node in bound:
            if name in kwargs:
                raise UserError(f"input {name!r} is given twice, by position and by name")
        elif name in kwargs:
            bound[node] = kwargs[name]
        elif node.args:
            bound[node] = node.args[0]
        else:
            raise UserError(f"input {name!r} is missing", fix=f"the graph's inputs are {', '.join(names)}")
    return bound


def last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose value nobody needs after it."""
    seen: set[fx.Node] = set()
    dead_after: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                dead_after.setdefault(node, []).append(used)
        if node not in seen and node.op != "output":
            dead_after.setdefault(node, []).append(node)
    return dead_after


def note_node(error: Exception, node: fx.Node) -> None:
    """Adds the node, its source line and its neighbourhood to an error in flight."""
    lines = [f"while running {where(node)}", f"  {node.format_node()}"]
    if has_info(node):
        lines += [f"  input: {used.format_node()}" for used in node.all_input_nodes]
    notes: list[str] = getattr(error, "__notes__", [])
    error.__notes__ = [*notes, "\n".join(lines)]
