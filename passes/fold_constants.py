"""Computes once what depends on no input.

Positions, masks, index tables and normalized weights are a seventh of the nodes of real graphs. Nodes whose operands
are all constants are evaluated and replaced by a tensor where an input-dependent node reads them: a parameter, which
training goes on changing, if it is computed from parameters that are trained, a buffer otherwise. Not folded: what
draws random numbers, writes in place, or would keep a tensor far larger than what it is made from. In a graph captured
symbolically, sizes are nodes: those that the batch does not change are numbers after this pass. Bit exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from passes.decompositions.batch import fixed_sizes
from qgraph.ir.editor import Editor
from qgraph.ir.evaluate import call_node
from qgraph.ir.node_info import Refusal, graph_info, info, tensor_at
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import CONSTANT, GUARD
from qgraph.pipeline import Pass, PassContext, PassResult

_UNKNOWN = object()


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces constant subgraphs by tensors.

    Args:
        largest: a folded tensor with more elements than this is kept as computation if it is over four times as
            large as what it is computed from.
    """

    name: ClassVar[str] = "fold-constants"
    ensures: ClassVar[frozenset[str]] = frozenset({"constants-folded"})

    largest: int = 1 << 22

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        sizes = fixed_sizes(gm) if graph_info(gm).method == "symbolic" else {}
        refusals = fold(edit, largest=self.largest, sizes=sizes)
        return PassResult(gm, edit.changes > 0, refusals=tuple(refusals))


def fold(
    edit: Editor, *, largest: int, stubs: bool = False, sizes: Mapping[fx.Node, int] | None = None
) -> list[Refusal]:
    """Folds everything constant in the editor's graph; returns what was left because it would grow.

    Args:
        largest: as for `FoldConstants`.
        stubs: whether quantizing a constant is folded too, as it is once scales are fixed.
        sizes: sizes the graph reads that are known to be constant.
    """
    values, refusals = _evaluate(edit, largest, stubs, sizes or {})
    for node in list(edit.graph.nodes):
        if node in values and info(node).op is not CONSTANT:
            _materialize(node, values, edit)
    for node in reversed(list(edit.graph.nodes)):
        if node in values and not node.users:
            edit.erase(node)
    return refusals


def _evaluate(
    edit: Editor, largest: int, stubs: bool, sizes: Mapping[fx.Node, int]
) -> tuple[dict[fx.Node, Any], list[Refusal]]:
    """Values of all nodes that depend on no input, and what was not folded."""
    values: dict[fx.Node, Any] = {}
    refusals: list[Refusal] = []
    for node in edit.graph.nodes:
        if node in sizes:
            values[node] = sizes[node]
        elif node.op == "get_attr":
            if not info(node).unstable:
                values[node] = tensor_at(edit.gm, str(node.target))
        elif _is_foldable(node, stubs) and all(used in values for used in node.all_input_nodes):
            value = _value(edit.gm, node, values)
            if value is _UNKNOWN:
                continue
            if _too_large(value, node, values, largest):
                reason = f"the folded tensor would hold {value.numel()} elements"
                refusals.append(Refusal(edit.author, reason, info(node).site, info(node).source))
                continue
            values[node] = value
    return values, refusals


def _too_large(value: Any, node: fx.Node, values: dict[fx.Node, Any], largest: int) -> bool:
    if not isinstance(value, torch.Tensor) or value.numel() <= largest:
        return False
    sources = [values[used] for used in node.all_input_nodes]
    held = sum(source.numel() for source in sources if isinstance(source, torch.Tensor))
    return value.numel() > 4 * held


def _materialize(node: fx.Node, values: dict[fx.Node, Any], edit: Editor) -> None:
    """Gives the readers that depend on inputs a tensor or a number instead of the computation."""
    value = values[node]
    readers = [user for user in node.users if user not in values]
    if isinstance(value, (bool, int, float)):
        for reader in readers:
            args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda used: value if used is node else used)
            edit.set_arguments(reader, args, kwargs)
        return
    if not readers or not isinstance(value, torch.Tensor):
        return
    record = info(node)
    path = record.site.translate(str.maketrans("()[]", "____"))
    tensor = value.detach().clone()
    folded = edit.constant(nn.Parameter(tensor) if value.requires_grad else tensor, path=path, like=node)
    edit.annotate(folded, origins=record.stands_for, qparams=record.qparams)
    for reader in readers:
        edit.replace_input(reader, node, folded)


def _is_foldable(node: fx.Node, stubs: bool) -> bool:
    record = info(node)
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if record.op.kind is OpKind.STUB and not stubs:
        return False
    return not (record.in_place or record.random or record.unstable or record.op is GUARD)


def _value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The node's value; unknown if it is random or not tensors."""
    state = torch.get_rng_state()
    args = fx.node.map_arg(node.args, lambda used: values[used])
    kwargs = fx.node.map_arg(node.kwargs, lambda used: values[used])
    with torch.enable_grad():  # the result knows whether training would change it
        value = call_node(gm, node, args, kwargs)
    if not torch.equal(torch.get_rng_state(), state):
        torch.set_rng_state(state)
        return _UNKNOWN
    return value
