"""Numbered files of every step of a pipeline: text, DOT, and the list of nodes that changed."""

from __future__ import annotations

import json
from pathlib import Path

from torch import fx

from qgraph.errors import DrawError
from qgraph.ir.node_info import info
from qgraph.ir.text import print_graph
from qgraph.pipeline import Pass, PassObserver, PassReport
from qgraph.viz.draw import draw

_INDEX = "index.json"


class DumpObserver(PassObserver):
    """Writes `000_start.txt`, `001_canonicalize.txt`, ... with a .dot beside each, and `index.json`.

    Args:
        folder: where to; created if missing. Numbers and index go on where an earlier pipeline in the same folder
            stopped.

    Raises:
        DrawError: the folder cannot be made or holds an index that is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.known: set[str] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.index: list[dict[str, object]] = self._earlier()
        except (OSError, ValueError) as error:
            raise DrawError(
                f"dumps cannot be written to {folder}",
                why=f"{type(error).__name__}: {error}",
                fix="choose a new folder, or one that an earlier dump made",
            ) from error

    def _earlier(self) -> list[dict[str, object]]:
        path = self.folder / _INDEX
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []

    def before(self, owner: Pass, gm: fx.GraphModule) -> None:
        if self.known is None:
            self._write("start", gm, None)
        self.known = {info(node).site for node in gm.graph.nodes}

    def after(self, owner: Pass, gm: fx.GraphModule, report: PassReport) -> None:
        self._write(owner.name, gm, report)

    def _write(self, name: str, gm: fx.GraphModule, report: PassReport | None) -> None:
        stem = f"{len(self.index):03d}_{name}"
        (self.folder / f"{stem}.txt").write_text(print_graph(gm), encoding="utf-8")
        draw(gm, self.folder / f"{stem}.dot")
        sites = {info(node).site for node in gm.graph.nodes}
        before = self.known if self.known is not None and report is not None else sites
        self.index.append(
            {
                "step": stem,
                "changed": report.changed if report else False,
                "seconds": round(report.seconds, 6) if report else 0.0,
                "notes": list(report.notes) if report else [],
                "refusals": [str(refusal) for refusal in report.refusals] if report else [],
                "new": sorted(sites - before),
                "gone": sorted(before - sites),
            }
        )
        (self.folder / _INDEX).write_text(json.dumps(self.index, indent=1), encoding="utf-8")
