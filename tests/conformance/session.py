"""Many cases of one target, drawn from a seed: several drawings of values for each network."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qgraph.errors import QuantizationError, UserError
from qgraph.ir.node_info import info
from qgraph.targets import Target, get_target
from tests.conformance.build import Built, Case, build, draw_formats
from tests.conformance.compare import Comparison, Mismatch, compare, kernel_sets
from tests.conformance.generate import draw_program, usable
from tests.conformance.operators import Chance
from tests.conformance.values import Values

ROUNDS = 4
"""Drawings of values for each network."""


@dataclass
class Summary:
    """What a session did."""

    target: str
    cases: int = 0
    networks: int = 0
    sites: int = 0
    elements: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, Mismatch]] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.target}: {self.cases} cases of {self.networks} networks, {self.sites} sites, "
            f"{self.elements} elements compared in {self.seconds:.0f} s; mismatches: {len(self.failures)}",
            f"  operators: {_listed(self.operators)}",
            f"  formats: {_listed(self.formats)}",
        ]
        if self.refused:
            lines.append(f"  refused ({sum(self.refused.values())}): {_listed(self.refused)}")
        return "\n".join(lines)


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


@dataclass
class Session:
    """Draws and compares cases.

    Args:
        target: target or its name.
        engine: adapter module, or None to compare kernel sets only.
        kernels: kernel sets compared with the reference; all if None.
        seed: of everything.
        large: sizes that only fast kernels and engines can follow.
        operators: the operators to draw from; all usable ones if None.
    """

    target: Target | str
    engine: Any = None
    kernels: Iterable[str] | None = None
    seed: int = 0
    large: bool = False
    operators: Iterable[str] | None = None

    def __post_init__(self) -> None:
        self.device = get_target(self.target)
        supported = getattr(self.engine, "SUPPORTED", None)
        known = usable(self.device, supported)
        wanted = set(known) if self.operators is None else set(self.operators)
        self.known = {name: operator for name, operator in known.items() if name in wanted}
        self.sets = kernel_sets(self.kernels)
        # Engines leave undefined what becomes of sums beyond their accumulator, unless their adapter says otherwise.
        self.overflow = self.engine is None or getattr(self.engine, "OVERFLOW", False)
        self.summary = Summary(self.device.name)

    def run(
        self,
        cases: int,
        *,
        stop: bool = True,
        progress: Callable[[Summary], None] = lambda summary: None,
    ) -> Summary:
        """Compares that many cases; ends at the first failure if `stop`."""
        started, summary = time.perf_counter(), self.summary
        index = 0
        while summary.cases < cases and not (stop and summary.failures):
            self.network(index, cases - summary.cases)
            index += 1
            summary.seconds = time.perf_counter() - started
            progress(summary)
        return summary

    def network(self, index: int, room: int) -> None:
        """All drawings of values of one network."""
        chance = Chance(f"{self.device.name}-{self.seed}-{index}")
        chance.large = self.large
        program = draw_program(chance, self.known)
        try:
            formats, prepared = draw_formats(program, self.device, chance)
        except (QuantizationError, UserError) as error:
            self.summary.refused[error.what] += 1
            return
        reasons = [info(node).float_reason for node in prepared.graph.nodes if info(node).float_reason]
        if reasons:  # a float island: nothing to compare
            self.summary.refused[str(reasons[0])] += 1
            return
        self.summary.networks += 1
        default = (formats.results[0], formats.weights[0])
        for turn in range(min(ROUNDS, room)):
            seed = f"{self.device.name}-{self.seed}-{index}-{turn}"
            case = Case(self.device, program, dict(formats.known), default, Values(), seed, self.overflow)
            self.case(case, prepared)

    def case(self, case: Case, prepared: fx.GraphModule) -> None:
        """Builds and compares one case, and counts it."""
        summary = self.summary
        try:
            built = build(case, prepared)
        except QuantizationError as error:
            summary.refused[error.what[:80]] += 1
            return
        found = self.compare(built)
        summary.cases += 1
        summary.sites += found.sites
        summary.elements += found.elements
        summary.operators.update(set(case.program.operators()))
        summary.formats.update({result for result, _ in case.formats.values()})
        for mismatch in found.mismatches:
            summary.failures.append((built.case, mismatch))

    def compare(self, built: Built) -> Comparison:
        """One case, on everything this session compares."""
        return compare(built, self.sets, self.engine)
