"""Removes what nobody reads.

Writes in place count as work done even if their result is unused, and so do random draws (later ones would differ), the
input guard and placeholders: callers depend on them. Bit exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.ir.node_info import info
from qgraph.ir.op_table import GUARD
from qgraph.ir.stage import Stage
from qgraph.pipeline import Pass, PassContext, PassResult


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Erases pure nodes without users, last first, so that chains go in one sweep."""

    name: ClassVar[str] = "eliminate-dead-code"
    stages: ClassVar[tuple[Stage, ...]] = tuple(Stage)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        for node in reversed(list(gm.graph.nodes)):
            if not node.users and not has_effect(node):
                edit.erase(node)
        return PassResult(gm, edit.changes > 0)


def has_effect(node: fx.Node) -> bool:
    """Whether a node matters even if nobody reads its value."""
    record = info(node)
    return node.op in ("placeholder", "output") or record.op is GUARD or record.in_place or record.random
