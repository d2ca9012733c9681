"""`check_consistency`: how often integers and fake quantization differ over a data set, by how much, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tabulate import tabulate
from torch import fx

from qgraph.analysis.causes import FLOAT64_AGREES, Cause, causes
from qgraph.analysis.consistency import SiteRun, visit_sites
from qgraph.errors import UserError
from qgraph.ir.node_info import info
from qgraph.quantization.calibrate import batch_inputs, require_batches
from qgraph.quantization.sites import require_prepared


@dataclass
class SiteReport:
    """One site over all batches.

    Args:
        site: its name.
        op: its operator.
        format: format of its codes.
        source: the user's line, if known.
        elements: elements compared.
        differing: codes that differ.
        largest: largest difference, in steps.
        causes: number of differing elements by cause.
    """

    site: str
    op: str
    format: str
    source: str
    elements: int = 0
    differing: int = 0
    largest: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)

    @property
    def float64_agrees(self) -> bool:
        """Whether fake quantization in float64 would agree with the integers in every element."""
        return all(cause in FLOAT64_AGREES for cause in self.causes)

    def add(self, run: SiteRun) -> None:
        """Counts one batch."""
        gap = run.gap
        self.elements += gap.numel()
        self.differing += int((gap > 0).sum())
        self.largest = max(self.largest, int(gap.max().item()) if gap.numel() else 0)
        self.causes.update(causes(run))


@dataclass(frozen=True)
class ConsistencyReport:
    """What `check_consistency` found.

    Args:
        sites: every rounded site, in execution order.
        batches: how many batches were compared.
    """

    sites: tuple[SiteReport, ...]
    batches: int

    @property
    def differing(self) -> int:
        """Differing elements over all sites."""
        return sum(site.differing for site in self.sites)

    @property
    def elements(self) -> int:
        """Elements compared over all sites."""
        return sum(site.elements for site in self.sites)

    @property
    def needs_float64(self) -> tuple[str, ...]:
        """Sites that differ, and would agree if they were fake-quantized in float64."""
        return tuple(site.site for site in self.sites if site.differing and site.float64_agrees)

    def table(self, *, everything: bool = False) -> str:
        """One row per site that differs (`everything`: per site), worst share first, and a summary line."""
        rows = [
            (
                site.site,
                site.op,
                site.format,
                site.elements,
                site.differing,
                site.largest,
                ", ".join(f"{cause} {count}" for cause, count in site.causes.most_common()) or "-",
                "yes" if site.differing and site.float64_agrees else "no" if site.differing else "-",
            )
            for site in sorted(self.sites, key=lambda site: -site.differing / max(site.elements, 1))
            if site.differing or everything
        ]
        headers = ("site", "op", "format", "elements", "differing", "largest", "why", "float64 agrees")
        verdict = f"{self.differing} of {self.elements} codes differ over {self.batches} batch(es)"
        return f"{tabulate(rows, headers=headers)}\n{verdict}" if rows else verdict


def check_consistency(
    prepared: fx.GraphModule, integer: fx.GraphModule, data: Iterable[Any], num_steps: int | None = None
) -> ConsistencyReport:
    """Compares fake quantization with the integer graph over a data set, site by site.

    Every site is given the operands the integer graph computed, so that nothing upstream counts.

    Args:
        prepared: the prepared graph in state VALIDATION.
        integer: what `convert` made of it.
        data: batches, as for `calibrate`.
        num_steps: stop after this many batches; None for all.

    Raises:
        StateError: a site of `prepared` is not in state VALIDATION.
        UserError: there is no data, or the graphs do not belong together.
    """
    gm = require_prepared(prepared, "check_consistency")
    require_batches(data, "the data", "check_consistency(prepared, integer, [batch])")
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    found: dict[str, SiteReport] = {}

    def visit(run: SiteRun) -> None:
        record = info(run.node)
        new = SiteReport(record.site, record.op.name, str(run.qparams.qtype), str(record.source or ""))
        found.setdefault(record.site, new).add(run)

    count = 0
    for batch in islice(data, num_steps):
        args, kwargs = batch_inputs(batch, names)
        visit_sites(gm, integer, args, kwargs, visit)
        count += 1
    if not count:
        raise UserError("there is no data to compare on", fix="give at least one batch; a used-up iterator is empty")
    return ConsistencyReport(tuple(found.values()), count)
