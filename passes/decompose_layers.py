"""Takes whole layers apart: attention, recurrent layers, sums of products.

It runs before fusion, so that the linears it makes are fused with what follows, and one called at every time step is
split like any module that is called several times. `docs/arithmetic.md` has the formulas. Equal within 1e-5 relative. A
layer stays whole, and in float, where it does something the rule has no form for, or the target lacks a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.decompositions import attention, products, recurrent, softmax
from passes.decompositions.steps import Decomposition, apply_rules
from qgraph.pipeline import Numerics, Pass, PassContext, PassResult, close

_RULES: dict[str, Decomposition] = {
    "attention": attention.ATTENTION,
    "multihead_attention": attention.MULTIHEAD_ATTENTION,
    "softmax": softmax.MASKED_SOFTMAX,
    "lstm": recurrent.LSTM,
    "gru": recurrent.GRU,
    "lstm_cell": recurrent.LSTM_CELL,
    "gru_cell": recurrent.GRU_CELL,
    "einsum": products.EINSUM,
    "addmm": products.ADDMM,
}


@dataclass(frozen=True)
class DecomposeLayers(Pass):
    """Decomposes attention, masked softmax, LSTM, GRU, einsum and addmm.

    Args:
        skip: names of operators to leave whole.
    """

    name: ClassVar[str] = "decompose-layers"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    keeps: ClassVar[Numerics] = close(1e-5)

    skip: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        return apply_rules(self, gm, ctx, _RULES, self.skip)
