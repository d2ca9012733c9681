"""Lays out the weights of 2-d convolutions channels_last.

A convolution computes in the layout of its weight and hands it on, so this alone puts the whole float graph into the
faster layout; inputs keep theirs. Sums are taken in another order: equal within 1e-5 relative. Tensors are replaced,
not written to, and weights that several modules share stay shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from qgraph.ir.node_info import info, module_of
from qgraph.ir.op_table import CONV2D, CONV_TRANSPOSE2D
from qgraph.ir.stage import Stage
from qgraph.nn import clone_module
from qgraph.pipeline import Numerics, Pass, PassContext, PassResult, close


@dataclass(frozen=True)
class UseChannelsLast(Pass):
    """Replaces contiguous weights of 2-d convolutions by channels_last ones."""

    name: ClassVar[str] = "use-channels-last"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    keeps: ClassVar[Numerics] = close(1e-5)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        moved: dict[int, nn.Parameter] = {}
        for node in gm.graph.nodes:
            if node.op != "call_module" or info(node).op not in (CONV2D, CONV_TRANSPOSE2D):
                continue
            module = module_of(node)
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            if weight.is_contiguous(memory_format=torch.channels_last):
                continue
            if id(weight) not in moved:
                laid_out = weight.detach().contiguous(memory_format=torch.channels_last)
                moved[id(weight)] = nn.Parameter(laid_out, weight.requires_grad)
            clone = clone_module(module)
            clone._parameters["weight"] = moved[id(weight)]
            edit.set_module(str(node.target), clone)
        return PassResult(gm, edit.changes > 0)
