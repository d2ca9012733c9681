"""Runs a built case with every kernel set and on the engine, and compares every site: shape, dtype, every element."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qgraph.ir.node_info import info
from qgraph.ir.stage import Stage
from qgraph.simulator import KERNEL_SETS, Simulator
from tests.conformance.build import Built

REFERENCE = "reference"
ENGINES = {
    "bpu": "engine_bpu",
    "onnxruntime": "engine_onnxruntime",
    "litert": "engine_litert",
    "x86": "engine_x86",
    "x86-fbgemm": "engine_x86",
    "x86-onednn": "engine_x86",
}


@dataclass(frozen=True)
class Mismatch:
    """Two tensors of one site that differ.

    Args:
        site: the first site that differs.
        who: the kernel set or engine that was compared with `against`.
        against: what it was compared with.
        what: shape, dtype, or how many elements.
        got, expected: the tensors.
    """

    site: str
    who: str
    against: str
    what: str
    got: torch.Tensor
    expected: torch.Tensor

    def __str__(self) -> str:
        return f"{self.site}: {self.who} and {self.against} differ in {self.what}"


@dataclass
class Comparison:
    """What was compared in one case."""

    sites: int = 0
    elements: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)


def engine_of(target: str) -> Any:
    """The adapter module of a target's engine.

    Raises:
        ModuleNotFoundError: there is none.
    """
    return importlib.import_module(f"tests.conformance.{ENGINES.get(target, f'engine_{target}')}")


def kernel_sets(names: Iterable[str] | None = None) -> list[str]:
    """The kernel sets to compare with the reference: those named, or all there are."""
    chosen = list(KERNEL_SETS) if names is None else list(names)
    return [name for name in chosen if name != REFERENCE]


def compare(built: Built, kernels: Iterable[str], engine: Any = None) -> Comparison:
    """The reference kernels against other kernel sets and, if given, an engine."""
    result = Comparison()
    reference = Simulator(built.integer, kernels=REFERENCE).run(*built.inputs, record=True).values
    for name in kernels:
        fast = _outcome(lambda name=name: Simulator(built.integer, kernels=name).run(*built.inputs, record=True).values)
        if isinstance(fast, Exception):
            result.mismatches.append(_raised(fast, name, REFERENCE))
        else:
            _compare(fast, reference, name, REFERENCE, result)
    if engine is not None:
        graph = built.integer if getattr(engine, "STAGE", Stage.PREPARED) is Stage.INTEGER else built.frozen
        computed = _outcome(lambda: engine.run(graph, built.inputs))
        if isinstance(computed, Exception):
            result.mismatches.append(_raised(computed, engine.__name__, REFERENCE))
            return result
        quantized = {site for site, value in reference.items() if not value.is_floating_point()}
        shared = {site: value for site, value in computed.items() if site in quantized}
        if not shared.keys() - _inputs(built):
            raise AssertionError(f"the engine shows none of {sorted(quantized)}, only {sorted(computed)}")
        _compare({site: reference[site] for site in shared}, shared, REFERENCE, engine.__name__, result)
    return result


def _outcome(run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | Exception:
    """What a run returns or raises; an error of a kernel or an engine is a finding, not the end of a session."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        return error


def _raised(error: Exception, who: str, against: str) -> Mismatch:
    lines = str(error).splitlines() or [""]
    nothing = torch.zeros(0)
    return Mismatch("the run", who, against, f"outcome: {type(error).__name__}: {lines[0]}", nothing, nothing)


def _inputs(built: Built) -> set[str]:
    """Sites that only quantize an input; there may be nothing else in a graph of moves alone."""
    nodes = [node for node in built.integer.graph.nodes if info(node).op.name == "quant_stub"]
    others = [n for n in built.integer.graph.nodes if n.op == "call_function" and _computes(n)]
    return {info(node).site for node in nodes} if others else set()


def _computes(node: fx.Node) -> bool:
    op = info(node).op
    return op.name not in ("quant_stub", "dequant_stub", "item") and op.lowering != "move"


def _compare(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    who: str,
    against: str,
    result: Comparison,
) -> None:
    """Compares site by site in the order of the graph; the first difference is the cause of the later ones."""
    found = False
    for site, mine in got.items():
        if site not in expected:
            raise AssertionError(f"{against} has no value of {site}, only {sorted(expected)}")
        theirs = expected[site]
        result.sites += 1
        result.elements += mine.numel()
        what = _difference(mine, theirs)
        if what is not None and not found:
            found = True
            result.mismatches.append(Mismatch(site, who, against, what, mine, theirs))


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> str | None:
    if mine.shape != theirs.shape:
        return f"shape: {list(mine.shape)} and {list(theirs.shape)}"
    if mine.dtype != theirs.dtype:
        return f"dtype: {mine.dtype} and {theirs.dtype}"
    wrong = mine != theirs
    if mine.is_floating_point():
        wrong = wrong & ~(mine.isnan() & theirs.isnan())
    count = int(wrong.sum())
    return f"{count} of {mine.numel()} elements" if count else None
