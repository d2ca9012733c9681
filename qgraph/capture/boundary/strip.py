"""`jit_strip`: of a captured graph, only what lies between the model's QuantStubs and DeQuantStubs.

    x -> resize -> quant -> network -> dequant -> softmax          becomes
         resize -> quant -> network -> dequant

What crosses into that part becomes an input, what a DeQuantStub returns an output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qgraph.capture.boundary.guard import InputGuard
from qgraph.capture.values.layout import copy_tensor
from qgraph.capture.values.structure import Inputs
from qgraph.capture.values.variants import BatchChoice, with_batch
from qgraph.errors import CaptureError
from qgraph.ir.editor import node_name
from qgraph.ir.evaluate import evaluate
from qgraph.ir.node_info import ExampleInputs, NodeInfo, graph_info, info, set_info, update_graph_info, where
from qgraph.ir.op_table import DEQUANT_STUB, GUARD, INPUT, OUTPUT, QUANT_STUB, SIZE
from qgraph.ir.values import spec_of


def strip(gm: fx.GraphModule) -> fx.GraphModule:
    """Cuts a captured graph down to what lies between its stubs; it is changed.

    Raises:
        CaptureError: there are no stubs, or a number computed outside is needed inside.
    """
    kept = _between_stubs(gm)
    _refuse_writes(kept)
    guard_node = gm.graph.find_nodes(op="call_module", target=_guard_path(gm))[0]
    guard = gm.get_submodule(str(guard_node.target))
    assert isinstance(guard, InputGuard)
    outside = _crossing(gm, kept)
    sizes = [node for node in outside if info(node).op is SIZE]
    inputs = [node for node in outside if info(node).op is not SIZE]
    example = dict(graph_info(gm).example.kwargs)  # type: ignore[union-attr]
    seen = _values(gm, inputs, example)
    choice = None if guard.choice is None else _batch(gm, inputs, seen, example, guard.choice)
    placeholders = _add_inputs(gm, inputs, kept)
    _measure(sizes, kept, placeholders, choice)
    _replace_output(gm, kept)
    named = {str(placeholders[node].target): copy_tensor(seen[node]) for node in inputs}
    fixed = guard.fixed if choice is not None or guard.fixed else "what is stripped changes with the batch size"
    conditions = guard.conditions if choice is not None else ()
    gm.add_module(str(guard_node.target), InputGuard(named, choice, fixed, layout=guard.layout, conditions=conditions))
    _drop_the_rest(gm, kept, guard_node, placeholders)
    _record(gm, named, fixed if choice is None else None)
    gm.recompile()
    return gm


def _guard_path(gm: fx.GraphModule) -> str:
    return next(str(node.target) for node in gm.graph.nodes if info(node).op is GUARD)


def _between_stubs(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes behind a QuantStub and before a DeQuantStub, stubs included, and the constants they read."""
    behind: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if info(node).op is QUANT_STUB or any(used in behind for used in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if info(node).op is DEQUANT_STUB or any(user in before for user in node.users):
            before.add(node)
    between = behind & before
    if not between:
        raise CaptureError(
            "there is nothing between a QuantStub and a DeQuantStub",
            where=graph_info(gm).model,
            why="jit_strip keeps only what lies between them",
            fix="put qgraph.QuantStub() behind the preprocessing and qgraph.DeQuantStub() before the postprocessing, "
            'or use method="jit"',
        )
    fixed = _constant(gm)
    needed = set(between)
    for node in reversed(gm.graph.nodes):
        if node in fixed and any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in gm.graph.nodes if node in needed]


def _constant(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on no input."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output") and all(used in found for used in node.all_input_nodes):
            found.add(node)
    return found


def _refuse_writes(kept: list[fx.Node]) -> None:
    for node in kept:
        if info(node).in_place or info(node).unstable:
            raise CaptureError(
                "jit_strip cannot cut a graph in which memory is written to between the stubs",
                where=where(node),
                why="what else the memory belongs to may be cut away",
                fix='write it without changing tensors in place, or use method="jit"',
            )


def _crossing(gm: fx.GraphModule, kept: list[fx.Node]) -> list[fx.Node]:
    """Nodes outside that the kept ones read, in order."""
    inside = set(kept)
    read = {used for node in kept for used in node.all_input_nodes if used not in inside}
    return [node for node in gm.graph.nodes if node in read]


def _values(gm: fx.GraphModule, nodes: list[fx.Node], inputs: Inputs) -> dict[fx.Node, torch.Tensor]:
    seen: dict[fx.Node, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted:
            if not isinstance(value, torch.Tensor):
                raise CaptureError(
                    f"what lies between the stubs reads a {type(value).__name__} computed before them",
                    where=where(node),
                    why="an input of the stripped graph is a tensor",
                    fix='compute it behind the QuantStub, or use method="jit"',
                )
            seen[node] = value

    wanted = set(nodes)
    with torch.no_grad():
        evaluate(gm, (), inputs, observe=observe)
    return seen


def _batch(
    gm: fx.GraphModule,
    nodes: list[fx.Node],
    seen: dict[fx.Node, torch.Tensor],
    example: Inputs,
    choice: BatchChoice,
) -> BatchChoice | None:
    """Which of the new inputs grow with the batch; None if one of them grows in another way."""
    larger = _values(gm, nodes, with_batch(example, choice, 2, seed=6))
    places = []
    for node in nodes:
        small, large = tuple(seen[node].shape), tuple(larger[node].shape)
        if small == large:
            continue
        if not small or large != (2 * small[0], *small[1:]):
            return None
        places.append((_input_name(node), ()))
    sizes = [seen[node].size(0) for node in nodes if (_input_name(node), ()) in places]
    return BatchChoice(tuple(places), sizes[0]) if places and sizes[0] == choice.size else None


def _input_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else f"{node_name(info(node).site)}_input"


def _add_inputs(gm: fx.GraphModule, nodes: list[fx.Node], kept: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    first = next(iter(gm.graph.nodes))
    inside, found = set(kept), {}
    for node in nodes:
        found[node] = node
        if node.op == "placeholder":
            continue
        with gm.graph.inserting_before(first):
            found[node] = gm.graph.placeholder(_input_name(node))
        name = str(found[node].target)
        set_info(found[node], NodeInfo(INPUT, name, source=info(node).source, value=info(node).value))
        node.replace_all_uses_with(found[node], delete_user_cb=lambda user: user in inside)
    return found


def _measure(
    sizes: list[fx.Node], kept: list[fx.Node], placeholders: dict[fx.Node, fx.Node], choice: BatchChoice | None
) -> None:
    """Sizes of what is cut away are read from an input that has the same batch."""
    names = {str(node.target): node for node in placeholders.values()}
    for node in sizes:
        if choice is None or tuple(node.args[1:]) != (0,) or node.op != "call_method":
            raise CaptureError(
                "what lies between the stubs reads a size of what comes before them",
                where=where(node),
                why="that is cut away",
                fix='read the size behind the QuantStub, or use method="jit"',
            )
        graph = node.graph
        with graph.inserting_before(next(used for used in kept if node in used.all_input_nodes)):
            own = graph.call_method("size", (names[choice.places[0][0]], 0))
        set_info(own, replace(info(node), site=own.name))
        node.replace_all_uses_with(own, delete_user_cb=lambda user: user in kept)
        kept.insert(0, own)


def _replace_output(gm: fx.GraphModule, kept: list[fx.Node]) -> None:
    """The graph returns what it did if all of that is kept, else the values of the DeQuantStubs."""
    inside = set(kept)
    old = next(iter(gm.graph.find_nodes(op="output")))
    if all(used in inside or _is_structure(used) for used in old.all_input_nodes):
        return
    returned = tuple(node for node in kept if info(node).op is DEQUANT_STUB)
    gm.graph.erase_node(old)
    set_info(gm.graph.output(returned[0] if len(returned) == 1 else returned), NodeInfo(OUTPUT, "output"))


def _is_structure(node: fx.Node) -> bool:
    return info(node).op.name == "rebuild" and all(info(used).op is DEQUANT_STUB for used in node.all_input_nodes)


def _drop_the_rest(
    gm: fx.GraphModule, kept: list[fx.Node], guard: fx.Node, placeholders: dict[fx.Node, fx.Node]
) -> None:
    live = {*kept, *placeholders.values(), guard}
    guard.args = tuple(placeholders.values())
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "output" and node not in live and not node.users:
            gm.graph.erase_node(node)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs[-1].append(guard)
    gm.graph.lint()


def _record(gm: fx.GraphModule, example: Inputs, fixed: str | None) -> None:
    with torch.no_grad():
        expected = evaluate(gm, (), example)
    update_graph_info(gm, method="jit_strip", example=ExampleInputs((), example), expected=expected, batch_fixed=fixed)
    for node in gm.graph.find_nodes(op="placeholder"):
        set_info(node, replace(info(node), value=spec_of(example[str(node.target)])))
