"""Reports modules that are called more than once.

A shared module has one weight and several activations. qgraph gives every call its own activation scale, so sharing
costs no accuracy there; it still decides what can be fused and is the first thing to know when ranges differ.
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
class SharedModule:
    """A module and its calls.

    Args:
        path: where the module is registered.
        kind: its class name.
        has_weights: whether it holds parameters.
        sites: the site of every call, in execution order.
    """

    path: str
    kind: str
    has_weights: bool
    sites: tuple[str, ...]

    def __str__(self) -> str:
        weights = "with weights" if self.has_weights else "without weights"
        return f"{self.path} ({self.kind}, {weights}) is called {len(self.sites)} times: {', '.join(self.sites)}"


def find_shared_modules(gm: fx.GraphModule) -> list[SharedModule]:
    """Every module with more than one call, in order of first call."""
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and info(node).op is not GUARD:
            calls.setdefault(str(node.target), []).append(node)
    found = []
    for path, nodes in calls.items():
        if len(nodes) > 1:
            module = gm.get_submodule(path)
            weights = next(module.parameters(), None) is not None
            found.append(SharedModule(path, type(module).__name__, weights, tuple(info(node).site for node in nodes)))
    return found


@dataclass(frozen=True)
class DetectSharedModules(Pass):
    """Changes nothing; its notes list the shared modules."""

    name: ClassVar[str] = "detect-shared-modules"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.FUSED, Stage.PREPARED)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        return PassResult(gm, False, tuple(map(str, find_shared_modules(gm))))
