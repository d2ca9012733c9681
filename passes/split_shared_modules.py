"""One module per call, the weights still shared.

    conv(x), conv(y)   ->   conv(x), conv(1)(y)       where conv(1).weight is conv.weight

Each call can then be fused with what follows it and gets an activation site of its own; the weight remains one site,
because it remains one tensor. Bit exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.detect_shared_modules import find_shared_modules
from qgraph.errors import UserError, did_you_mean
from qgraph.ir.node_info import info
from qgraph.nn import clone_module
from qgraph.pipeline import Pass, PassContext, PassResult


@dataclass(frozen=True)
class SplitSharedModules(Pass):
    """Gives the second and further calls of a module clones that hold the same tensors.

    Args:
        only: paths of the modules to split; all shared ones if empty. A path the graph does not call is an error.
    """

    name: ClassVar[str] = "split-shared-modules"
    ensures: ClassVar[frozenset[str]] = frozenset({"modules-split"})

    only: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        notes = []
        found = find_shared_modules(gm)
        self._check_only(gm, [shared.path for shared in found])
        for shared in found:
            if self.only and shared.path not in self.only:
                continue
            calls = gm.graph.find_nodes(op="call_module", target=shared.path)
            for node in list(calls)[1:]:
                path = edit.free_path(info(node).site)
                edit.set_module(path, clone_module(gm.get_submodule(shared.path)))
                edit.respell(node, "call_module", path, node.args, node.kwargs)
            notes.append(f"split {shared}")
        return PassResult(gm, edit.changes > 0, tuple(notes))

    def _check_only(self, gm: fx.GraphModule, shared: list[str]) -> None:
        called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
        for path in self.only:
            if path not in called:
                raise UserError(
                    f"split-shared-modules is told to split {path!r}, which the graph does not call",
                    fix=did_you_mean(path, shared or called),
                )
