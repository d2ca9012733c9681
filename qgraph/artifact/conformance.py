"""Conformance packs: an integer graph, inputs, every tensor on the way and the outputs, in one file.

    pack(integer, "model.pack.qgraph")
    run("model.pack.qgraph", kernels="fast").first      # None: every tensor is equal

A device team reads the file, runs its own implementation and compares site by site.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from qgraph.artifact.container import MAX_BYTES, format_json, parse_json, read_container, write_container
from qgraph.artifact.inputs import generated_inputs
from qgraph.artifact.known import KnownClasses
from qgraph.artifact.read import graph_of
from qgraph.artifact.tensors import TensorReader, TensorWriter
from qgraph.artifact.values import ValueReader, ValueWriter, listed, mapping, placed, text
from qgraph.artifact.write import graph_members, made_by
from qgraph.capture.values.structure import as_example, format_path, leaves
from qgraph.errors import ArtifactError, UserError
from qgraph.ir.node_info import ExampleInputs, graph_info, info
from qgraph.simulator import Simulator

PACK_KIND = "conformance"
CASES_MEMBER = "cases.json"
VALUES_MEMBER = "cases.safetensors"
_CASE_KEYS = frozenset({"name", "inputs", "values", "output"})


@dataclass(frozen=True, eq=False)
class ConformanceCase:
    """One run of the graph.

    Args:
        name: how its inputs were chosen.
        inputs: by the names of the graph's inputs.
        values: what each site computed, in the order of execution.
        output: what the graph returned.
    """

    name: str
    inputs: dict[str, Any]
    values: dict[str, torch.Tensor]
    output: Any


@dataclass(frozen=True)
class SiteComparison:
    """How one tensor agrees with the pack.

    Args:
        case: the case.
        site: the site, or `output` and the place in it.
        op: its operator.
        elements: elements of the tensor.
        differing: how many differ; all of them where shape or dtype do.
        largest: the largest difference.
        note: what else is wrong, such as another shape.
    """

    case: str
    site: str
    op: str
    elements: int
    differing: int
    largest: float
    note: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """All comparisons of a run, in the order of execution."""

    sites: tuple[SiteComparison, ...]

    @property
    def first(self) -> SiteComparison | None:
        """The first tensor that differs; None if all are equal."""
        return next((site for site in self.sites if site.differing or site.note), None)

    def table(self) -> str:
        """One row per case, with its first site that differs."""
        rows = []
        for case in dict.fromkeys(site.case for site in self.sites):
            found = [site for site in self.sites if site.case == case]
            wrong = [site for site in found if site.differing or site.note]
            row: tuple[Any, ...] = (case, len(found), len(wrong))
            if wrong:
                first = wrong[0]
                row = (*row, first.site, first.op, f"{first.differing} of {first.elements}", first.largest, first.note)
            rows.append(row)
        headers = ("case", "tensors", "differing", "first", "op", "elements", "largest difference", "")
        return tabulate(rows, headers=headers if self.first else headers[:3])


def pack(
    integer: fx.GraphModule, path: str | os.PathLike[str], *, example_inputs: Any = None, seed: int = 0
) -> list[str]:
    """Writes a conformance pack.

    Args:
        integer: what `convert` returned.
        path: the file.
        example_inputs: inputs whose shapes the cases have; the graph's own example if None.
        seed: of the random numbers; the same seed gives the same bytes.

    Returns:
        The names of its cases.

    Raises:
        ArtifactError: the graph holds something a file cannot.
        UserError: the graph has no example inputs and none are given, or the file cannot be written.
    """
    members = graph_members(integer)
    inputs = _inputs(integer, example_inputs)
    simulator = Simulator(integer)
    tensors = TensorWriter()
    cases = [_simulated(simulator, name, given) for name, given in generated_inputs(integer, inputs, seed)]
    document = {"cases": [_write_case(ValueWriter(tensors), case) for case in cases], "strides": tensors.strides}
    members = {**members, CASES_MEMBER: format_json(document), VALUES_MEMBER: tensors.member()}
    write_container(path, PACK_KIND, made_by(), members)
    return [case.name for case in cases]


def read_pack(
    path: str | os.PathLike[str], *, classes: Iterable[type[Any]] = (), max_bytes: int = MAX_BYTES
) -> tuple[fx.GraphModule, list[ConformanceCase]]:
    """Graph and cases of a pack.

    Raises:
        ArtifactError: the file is damaged, or no conformance pack.
        UserError: it cannot be read.
    """
    kind, members = read_container(path, max_bytes)
    with placed(str(path)):
        if kind != PACK_KIND or not {CASES_MEMBER, VALUES_MEMBER} <= members.keys():
            raise ArtifactError("the file is no conformance pack", fix="make one with qgraph conformance pack")
        known = KnownClasses(classes)
        gm = graph_of(members, known)
        document = parse_json(members[CASES_MEMBER], CASES_MEMBER)
        mapping(document, frozenset(("cases", "strides")), frozenset())
        tensors = TensorReader(members[VALUES_MEMBER], mapping(document["strides"]))
        cases = [_read_case(ValueReader(tensors, known), entry) for entry in listed(document["cases"])]
        tensors.require_all_used()
    return gm, cases


def run(
    path: str | os.PathLike[str], *, kernels: str = "reference", classes: Iterable[type[Any]] = ()
) -> ConformanceReport:
    """Simulates the cases of a pack and compares every tensor; equal means equal bits.

    Args:
        path: the pack.
        kernels: the kernel set.
        classes: as for `load`.

    Raises:
        ArtifactError: the file is damaged, or no conformance pack.
        UserError: it cannot be read, or the kernel set does not exist.
    """
    gm, cases = read_pack(path, classes=classes)
    simulator = Simulator(gm, kernels)
    found = [comparison for case in cases for comparison in _compared(simulator, case)]
    return ConformanceReport(tuple(found))


def compare_values(expected: torch.Tensor, actual: Any) -> tuple[int, float, str]:
    """Differing elements, largest difference, and what else is wrong. NaN equals NaN; zeros differ by their sign."""
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = f"{list(actual.shape)} {actual.dtype}" if isinstance(actual, torch.Tensor) else type(actual).__name__
        return expected.numel(), 0.0, f"{found} in place of {list(expected.shape)} {expected.dtype}"
    one, two = expected.cpu(), actual.detach().cpu()
    equal = one == two
    if one.is_floating_point():
        equal = (equal & (one.signbit() == two.signbit())) | (one.isnan() & two.isnan())
    differing = int((~equal).sum())
    if not differing:
        return 0, 0.0, ""
    if one.dtype is torch.bool or one.is_complex():
        return differing, 1.0, ""
    gap = (one.double() - two.double()).abs()[~equal]
    return differing, float(gap.max()), ""


def _inputs(integer: fx.GraphModule, example_inputs: Any) -> dict[str, Any]:
    names = [str(node.target) for node in integer.graph.nodes if node.op == "placeholder"]
    given = graph_info(integer).example if example_inputs is None else as_example(example_inputs)
    if not isinstance(given, ExampleInputs):
        raise UserError(
            "the graph holds no example inputs, so the shapes of its inputs are not known",
            fix="give them: pack(integer, path, example_inputs=...)",
        )
    inputs = {**dict(zip(names, given.args, strict=False)), **given.kwargs}
    if inputs.keys() != set(names):
        raise UserError(f"the example inputs do not fit the graph, whose inputs are {', '.join(names)}")
    return {name: inputs[name] for name in names}


def _simulated(simulator: Simulator, name: str, inputs: dict[str, Any]) -> ConformanceCase:
    names = [str(node.target) for node in simulator.gm.graph.nodes if node.op == "placeholder"]
    if inputs.keys() != set(names):
        raise ArtifactError(f"the inputs of the case {name!r} are not those of the graph")
    result = simulator.run(*(inputs[name] for name in names), record=simulator.sites)
    return ConformanceCase(name, inputs, result.values, result.output)


def _write_case(writer: ValueWriter, case: ConformanceCase) -> dict[str, Any]:
    written: dict[str, Any] = {"name": case.name}
    writer.place = f"{case.name}.input"
    written["inputs"] = {name: writer.value(value) for name, value in case.inputs.items()}
    written["values"] = {}
    for site, value in case.values.items():
        written["values"][site] = writer.tensors.add(value, f"{case.name}.{site}")
    writer.place = f"{case.name}.output"
    return {**written, "output": writer.value(case.output)}


def _read_case(reader: ValueReader, entry: Any) -> ConformanceCase:
    found = mapping(entry, _CASE_KEYS, frozenset())
    inputs = {name: reader.value(value) for name, value in mapping(found["inputs"]).items()}
    values = {site: reader.tensors.get(name) for site, name in mapping(found["values"]).items()}
    return ConformanceCase(text(found["name"]), inputs, values, reader.value(found["output"]))


def _compared(simulator: Simulator, case: ConformanceCase) -> Iterator[SiteComparison]:
    actual = _simulated(simulator, case.name, case.inputs)
    missing = case.values.keys() ^ actual.values.keys()
    if missing:
        raise ArtifactError(f"the pack does not hold the tensors of its own graph: {min(missing)!r}")
    for site, expected in case.values.items():
        op = info(simulator.sites[site]).op.name
        result = compare_values(expected, actual.values[site])
        yield SiteComparison(case.name, site, op, expected.numel(), *result)
    yield from _compared_outputs(case, actual.output)


def _compared_outputs(case: ConformanceCase, output: Any) -> Iterator[SiteComparison]:
    expected, actual = dict(_by_place(case.output)), dict(_by_place(output))
    for place in {**expected, **actual}:
        one, two = expected.get(place), actual.get(place)
        if isinstance(one, torch.Tensor):
            yield SiteComparison(case.name, place, "output", one.numel(), *compare_values(one, two))
        elif type(one) is not type(two) or one != two:
            yield SiteComparison(case.name, place, "output", 1, 1, 0.0, f"{two!r} in place of {one!r}"[:80])


def _by_place(output: Any) -> Mapping[str, Any]:
    return {format_path("output", path): leaf for path, leaf in leaves(output)}
