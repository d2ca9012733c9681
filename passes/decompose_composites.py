"""Takes composites apart into operators that hardware has: norms, softmax, division.

Inner steps are sites of their own, named after the composite (`norm.rsqrt`, `softmax.exp`); the last step keeps the
composite's site. `docs/arithmetic.md` has the formulas. Equal within 1e-5 relative. A composite stays whole if the
target runs it as it is, and, in float, if the target lacks a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.decompositions import arithmetic, norms, softmax, spread
from passes.decompositions.steps import Decomposition, apply_rules
from qgraph.pipeline import Numerics, Pass, PassContext, PassResult, close

_RULES: dict[str, Decomposition] = {
    "softmax": softmax.SOFTMAX,
    "layer_norm": norms.LAYER_NORM,
    "group_norm": norms.GROUP_NORM,
    "instance_norm": norms.INSTANCE_NORM,
    "rms_norm": norms.RMS_NORM,
    "normalize": norms.NORMALIZE,
    "batch_norm": norms.BATCH_NORM,
    "div": arithmetic.DIV,
    "addcmul": arithmetic.ADDCMUL,
    "addcdiv": arithmetic.ADDCDIV,
    "lerp": arithmetic.LERP,
    "var": spread.VAR,
    "std": spread.STD,
}


@dataclass(frozen=True)
class DecomposeComposites(Pass):
    """Decomposes norms, softmax, division and leftover batch norms.

    Args:
        skip: names of operators to leave whole.
    """

    name: ClassVar[str] = "decompose-composites"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"decomposed"})
    keeps: ClassVar[Numerics] = close(1e-5)

    skip: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        return apply_rules(self, gm, ctx, _RULES, self.skip)
