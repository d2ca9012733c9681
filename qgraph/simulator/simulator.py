"""Runs an integer graph exactly as the hardware would: one loop and a table of kernels.

    sim = Simulator(integer)
    y = sim(x)                                        # what the float model returns
    run = sim.run(x, record=True, inject={"layer1.conv": codes}, stop_at="layer2.conv")
    run.values["layer1.conv"], run.report()

`(operator, target) -> kernel` is looked up before the first run, so that a missing kernel is an error with the list of
those that exist, not a surprise in the middle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from qgraph.errors import MissingKernel, UserError, did_you_mean
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info, where
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import CONSTANT
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.stage import Stage
from qgraph.simulator.cost import OpCost, op_cost
from qgraph.simulator.operators import define_operator
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace
from qgraph.targets import Target, target_of

Kernel = Callable[..., torch.Tensor]
ANY_TARGET = "*"

KERNEL_SETS: dict[str, dict[tuple[str, str], Kernel]] = {
    "reference": {(name, ANY_TARGET): kernel for name, kernel in REFERENCE.items()},
}


def register_kernel(kernels: str, operator: str, target: str, kernel: Kernel) -> None:
    """Adds a kernel to a set (made if new) for an operator and a target; `"*"` is any target.

    Raises:
        UserError: the place is taken.
    """
    table = KERNEL_SETS.setdefault(kernels, {})
    if (operator, target) in table:
        raise UserError(f"kernel set {kernels!r} has a kernel for ({operator}, {target}) already")
    table[(operator, target)] = kernel


def register_operator(
    name: str, schema: str, kernel: Kernel, fake: Callable[..., torch.Tensor], *, kernels: str = "reference"
) -> None:
    """Adds an integer operator: `torch.ops.qgraph.<name>` and its kernel for any target.

    Args:
        name: its name.
        schema: torch's schema without the name, such as `(Tensor x, Tensor y, *, str format) -> Tensor`.
        kernel: computes it on integer tensors; takes `trace: KernelTrace | None = None` besides the schema's arguments.
        fake: the result's shape and dtype without values.
        kernels: the kernel set it joins.

    Raises:
        UserError: an operator of that name exists, or the kernel takes no `trace`.
    """
    if any(operator == name for table in KERNEL_SETS.values() for operator, _ in table):
        raise UserError(f"an integer operator named {name!r} exists already", fix="choose another name")
    if "trace" not in inspect.signature(kernel).parameters:
        raise UserError(
            f"the kernel of {name!r} takes no trace", fix="add the parameter trace: KernelTrace | None = None"
        )
    define_operator(name, schema, kernel, fake)
    register_kernel(kernels, name, ANY_TARGET, kernel)


@dataclass(frozen=True)
class OpReport:
    """What one operator did in a run.

    Args:
        site: its site.
        op: its operator.
        cost: estimated cost on the example's shapes.
        saturated: results that did not fit their format.
        overflowed: sums that did not fit the accumulator.
        elements: results in this run.
    """

    site: str
    op: str
    cost: OpCost
    saturated: int
    overflowed: int
    elements: int


@dataclass
class SimulatorRun:
    """One run of the simulator.

    Args:
        output: what the model returns; None if the run was stopped.
        values: recorded tensors by site: codes, or reals in float islands.
        ops: one report per operator, in execution order; empty unless `record=True`.
        stopped_at: the site the run was stopped at.
    """

    output: Any = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    ops: list[OpReport] = field(default_factory=list)
    stopped_at: str | None = None

    @property
    def saturated(self) -> int:
        """Results that did not fit their format, over the whole run; needs `record=True`."""
        return sum(op.saturated for op in self._counted())

    @property
    def cycles(self) -> float:
        """Estimated cycles of the operators that ran, on the example's shapes; needs `record=True`."""
        return sum(op.cost.cycles for op in self._counted())

    def _counted(self) -> list[OpReport]:
        if not self.ops:
            raise UserError("this run counted nothing", fix="run with record=True: simulator.run(x, record=True)")
        return self.ops

    def report(self) -> str:
        """A table with one row per operator; needs `record=True`."""
        rows = [
            (
                op.site,
                op.op,
                op.cost.unit,
                op.cost.macs,
                op.cost.bytes,
                round(op.cost.cycles),
                op.cost.bound,
                op.saturated,
            )
            for op in self._counted()
        ]
        headers = ("site", "op", "unit", "MACs", "bytes", "cycles", "bound", "saturated")
        return tabulate(rows, headers=headers)


class _Stop(Exception):
    """Ends a run early."""


class Simulator:
    """Executes an integer graph with a set of kernels.

    Args:
        integer: what `convert` returned.
        kernels: name of the kernel set.

    Raises:
        UserError: the graph is not in stage INTEGER, or the set does not exist.
        MissingKernel: the set has no kernel for an operator of the graph.
    """

    def __init__(self, integer: fx.GraphModule, kernels: str = "reference") -> None:
        if not isinstance(integer, fx.GraphModule) or graph_info(integer).stage is not Stage.INTEGER:
            raise UserError(
                "the simulator runs integer graphs", fix="call qgraph.convert(prepared) and simulate its result"
            )
        if kernels not in KERNEL_SETS:
            raise UserError(f"no kernel set is named {kernels!r}", fix=did_you_mean(kernels, KERNEL_SETS))
        self.gm = integer
        self.target: Target = target_of(integer)
        self.kernels = self._select(kernels)
        self.sites = {info(node).site: node for node in integer.graph.nodes if _is_site(node)}

    def _select(self, kernels: str) -> dict[fx.Node, Kernel]:
        table, chosen = KERNEL_SETS[kernels], {}
        for node in self.gm.graph.nodes:
            name = integer_name(node.target)
            if name is None:
                continue
            kernel = table.get((name, self.target.name)) or table.get((name, ANY_TARGET))
            if kernel is None:
                raise MissingKernel(
                    f"kernel set {kernels!r} has no kernel for {name} on {self.target.name}",
                    where=where(node),
                    fix=did_you_mean(name, {op for op, _ in table}),
                )
            chosen[node] = kernel
        return chosen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed in integers."""
        return self.run(*args, **kwargs).output

    def run(
        self,
        *args: Any,
        record: bool | Iterable[str] = False,
        stop_at: str | None = None,
        inject: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> SimulatorRun:
        """Runs the graph once.

        Args:
            args, kwargs: the model's inputs.
            record: True to keep every site's tensor and count saturations, or the sites to keep.
            stop_at: a site after which the run ends; it is recorded.
            inject: codes (or reals, in float islands) to put in place of what a site computed, by site.

        Returns:
            Outputs, recorded values and reports.

        Raises:
            UserError: a site does not exist, or an injected tensor does not fit it.
        """
        if isinstance(record, str) or not isinstance(record, Iterable | bool):
            raise UserError(f"record is {record!r}", fix=f"give True or a list of sites: record=[{record!r}]")
        wanted = set() if isinstance(record, bool) else set(record)
        injected = dict(inject or {})
        self._check_sites(wanted, injected, stop_at)
        result = SimulatorRun()
        session = _Session(self, result, record is True, wanted, stop_at, injected)
        with torch.no_grad():
            try:
                result.output = evaluate(self.gm, args, kwargs, call=session.call, observe=session.observe)
            except _Stop:
                result.stopped_at = stop_at
        return result

    def _check_sites(self, wanted: set[str], injected: Mapping[str, Any], stop_at: str | None) -> None:
        for site in (*wanted, *injected, *(() if stop_at is None else (stop_at,))):
            if site not in self.sites:
                raise UserError(f"the integer graph has no site {site!r}", fix=did_you_mean(str(site), self.sites))
        order = {site: position for position, site in enumerate(self.sites)}
        for site, given in injected.items():
            if self.sites[site].op == "placeholder":
                raise UserError(f"{site!r} is an input of the graph", fix="give its values as an argument of the run")
            if not isinstance(given, torch.Tensor):
                raise UserError(f"a {type(given).__name__} is injected at {site!r}", fix="inject a tensor")
            if stop_at is not None and order[site] > order[stop_at]:
                raise UserError(
                    f"the tensor injected at {site!r} would never be used",
                    why=f"the run stops at {stop_at!r}, which comes before",
                    fix="stop later, or leave the injection out",
                )


@dataclass
class _Session:
    """What happens at each node of one run."""

    simulator: Simulator
    result: SimulatorRun
    record_all: bool
    wanted: set[str]
    stop_at: str | None
    inject: dict[str, torch.Tensor]

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kernel = self.simulator.kernels.get(node)
        trace = KernelTrace() if self.record_all else None
        if kernel is None:
            value = call_node(self.simulator.gm, node, args, kwargs)
        elif trace is None:
            value = kernel(*args, **kwargs)
        else:
            value = kernel(*args, **kwargs, trace=trace)
        if trace is not None:
            self._report(node, value, trace)
        site = info(node).site
        return self._injected(site, value) if site in self.inject and _is_site(node) else value

    def observe(self, node: fx.Node, value: Any) -> None:
        site = info(node).site
        if not _is_site(node):
            return
        if self.record_all or site in self.wanted or site == self.stop_at:
            self.result.values[site] = value
        if site == self.stop_at:
            raise _Stop

    def _report(self, node: fx.Node, value: Any, trace: KernelTrace) -> None:
        record = info(node)
        if record.op.kind in (OpKind.STRUCTURE, OpKind.INPUT):
            return
        cost = op_cost(node, self.simulator.gm, self.simulator.target)
        elements = value.numel() if isinstance(value, torch.Tensor) else 0
        self.result.ops.append(OpReport(record.site, record.op.name, cost, trace.saturated, trace.overflowed, elements))

    def _injected(self, site: str, value: torch.Tensor) -> torch.Tensor:
        given = self.inject[site]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise UserError(
                f"the tensor injected at {site!r} is {list(given.shape)} {given.dtype}, "
                f"the site holds {list(value.shape)} {value.dtype}",
                fix="inject codes of the site's own shape and dtype, for as many samples as the run has",
            )
        return given


def _is_site(node: fx.Node) -> bool:
    """Whether a node computes (or is given) one tensor."""
    return tensor_spec(node) is not None and info(node).op is not CONSTANT
