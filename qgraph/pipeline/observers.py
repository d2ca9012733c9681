"""Objects that watch a pipeline run: time, provenance, dumps. They never change the graph."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field

from torch import fx

from qgraph.ir.node_info import info
from qgraph.pipeline.base import Pass, PassReport

DUMP_VARIABLE = "QG_DUMP"
_DUMP_OBSERVER = "qgraph.viz.dump:DumpObserver"


class PassObserver:
    """Callbacks of a pipeline run; each does nothing unless overridden."""

    def before(self, owner: Pass, gm: fx.GraphModule) -> None:
        """A pass is about to run."""

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        """It has run and its result has been checked."""


@dataclass
class TimingObserver(PassObserver):
    """Seconds per pass, checks included."""

    seconds: dict[str, float] = field(default_factory=dict)

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        self.seconds[owner.name] = self.seconds.get(owner.name, 0.0) + report.seconds


@dataclass(frozen=True)
class ProvenanceStep:
    """How one pass changed the set of nodes.

    Args:
        pass_name: the pass.
        created: site of each new node, with the captured sites it stands for.
        removed: sites of nodes that are gone.
    """

    pass_name: str
    created: dict[str, tuple[str, ...]]
    removed: tuple[str, ...]


@dataclass
class ProvenanceObserver(PassObserver):
    """Which nodes each pass created from which, and which it removed."""

    steps: list[ProvenanceStep] = field(default_factory=list)
    _before: dict[str, str] = field(default_factory=dict)

    def before(self, owner: Pass, gm: fx.GraphModule) -> None:
        self._before = {node.name: info(node).site for node in gm.graph.nodes}

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        now = {node.name: node for node in gm.graph.nodes}
        created = {
            info(node).site: info(node).stands_for
            for name, node in now.items()
            if name not in self._before or self._before[name] != info(node).site
        }
        removed = tuple(site for name, site in self._before.items() if name not in now)
        if created or removed:
            self.steps.append(ProvenanceStep(owner.name, created, removed))


def environment_observers() -> list[PassObserver]:
    """Observers asked for by environment variables: `QG_DUMP=folder` writes every step."""
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder:
        return []
    module, _, name = _DUMP_OBSERVER.partition(":")
    observer: PassObserver = getattr(importlib.import_module(module), name)(folder)
    return [observer]
