"""Chooses memory layouts: weights of 2-d convolutions are channels_last, copies into other layouts go.

A convolution computes in the layout of its weight and hands it on, so this alone puts the whole float graph into the
faster layout; inputs keep theirs. Sums are taken in another order: equal within 1e-5 relative. Tensors are replaced,
not written to, and weights that several convolutions share stay shared; a weight that anything else reads as well
keeps its layout, because it would be torn in two. A copy (`contiguous`, `clone`) stays where an unknown operator could
look at the memory, or where its operand is written later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from qgraph.ir.identities import is_unread_copy
from qgraph.ir.node_info import info, module_of, tensor_at
from qgraph.ir.op_table import CONV2D, CONV_TRANSPOSE2D
from qgraph.ir.stage import Stage
from qgraph.nn import clone_module
from qgraph.pipeline import Numerics, Pass, PassContext, PassResult, close


@dataclass(frozen=True)
class UseChannelsLast(Pass):
    """Replaces contiguous weights of 2-d convolutions by channels_last ones; removes copies into other layouts."""

    name: ClassVar[str] = "use-channels-last"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    keeps: ClassVar[Numerics] = close(1e-5)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        moved: dict[int, nn.Parameter] = {}
        held = _held_elsewhere(gm)
        for node in list(gm.graph.nodes):
            if info(node).relaid and is_unread_copy(node):
                edit.bypass(node, node.all_input_nodes[0])
            if not _is_convolution(node):
                continue
            module = module_of(node)
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            if weight.is_contiguous(memory_format=torch.channels_last) or id(weight) in held:
                continue
            if id(weight) not in moved:
                laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
                moved[id(weight)] = nn.Parameter(laid_out, weight.requires_grad)
            clone = clone_module(module)
            clone._parameters["weight"] = moved[id(weight)]
            edit.set_module(str(node.target), clone)
        return PassResult(gm, edit.changes > 0)


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_module" and info(node).op in (CONV2D, CONV_TRANSPOSE2D)


def _held_elsewhere(gm: fx.GraphModule) -> set[int]:
    """Identities of the tensors that something else than a 2-d convolution reads."""
    held: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            held.add(id(tensor_at(gm, str(node.target))))
        elif node.op == "call_module" and not _is_convolution(node):
            held.update(map(id, module_of(node).parameters()))
    return held
