"""Runs an integer graph exactly as the hardware would: one loop and a table of kernels.

    sim = Simulator(integer)
    y = sim(x)                                        # what the float model returns
    run = sim.run(x, record=True, inject={"layer1.conv": codes}, stop_at="layer2.conv")
    run.values["layer1.conv"], run.report()

`(operator, target) -> kernel` is looked up before the first run, so that a missing kernel is an error with the list of
those that exist, not a surprise in the middle. The set `fast` computes the same bits as `reference`; where it has no
form for a call it runs the reference kernel, and `Simulator.fallbacks` says so.
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
from qgraph.ir.evaluate import note_node
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info, where
from qgraph.ir.op import OpKind
from qgraph.ir.paths import PathModel
from qgraph.ir.stage import Stage
from qgraph.simulator.cost import OpCost, op_cost
from qgraph.simulator.fast import FUNCTIONS
from qgraph.simulator.fast import KERNELS as FAST
from qgraph.simulator.kernel import Kernel, PreparedKernel
from qgraph.simulator.operators import define_operator
from qgraph.simulator.program import Program, Step, is_site
from qgraph.simulator.reference import KERNELS as REFERENCE
from qgraph.simulator.trace import KernelTrace
from qgraph.targets import Target, target_of

ANY_TARGET = "*"

KERNEL_SETS: dict[str, dict[tuple[str, str], Kernel | PreparedKernel]] = {
    "reference": {(name, ANY_TARGET): kernel for name, kernel in REFERENCE.items()},
    "fast": {(name, ANY_TARGET): kernel for name, kernel in FAST.items()},
}
# What a set lacks is taken from another one.
BASES = {"fast": "reference"}


def register_kernel(kernels: str, operator: str, target: str, kernel: Kernel | PreparedKernel) -> None:
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
        UserError: an operator of that name exists, the schema is malformed, the kernel takes no `trace`, or a function
            does not take the schema's arguments.
    """
    if any(operator == name for table in KERNEL_SETS.values() for operator, _ in table):
        raise UserError(f"an integer operator named {name!r} exists already", fix="choose another name")
    if "trace" not in inspect.signature(kernel).parameters:
        raise UserError(
            f"the kernel of {name!r} takes no trace", fix="add the parameter trace: KernelTrace | None = None"
        )
    _check_takes(schema, name, "kernel", kernel)
    _check_takes(schema, name, "fake kernel", fake)
    define_operator(name, schema, kernel, fake)
    register_kernel(kernels, name, ANY_TARGET, kernel)


def _check_takes(schema: str, name: str, kind: str, function: Callable[..., object]) -> None:
    """Refuses a function that cannot be called with all arguments of a schema."""
    try:
        arguments = torch._C.parse_schema(name + schema).arguments
    except RuntimeError as error:
        raise UserError(
            f"the schema of {name!r} is malformed",
            why=str(error).strip().splitlines()[0],
            fix='write it like "(Tensor x, Tensor y, *, str format) -> Tensor"',
        ) from error
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions of C have none
        return
    try:
        signature.bind(
            *[None for argument in arguments if not argument.kwarg_only],
            **{argument.name: None for argument in arguments if argument.kwarg_only},
        )
    except TypeError as error:
        raise UserError(
            f"the {kind} of {name!r} does not take the arguments of its schema",
            why=str(error),
            fix=f"give it the parameters of {schema.split('->')[0].strip()}",
        ) from error


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


class PathSimulator:
    """Simulators for the paths of a model; a call runs the path for its inputs.

    Args:
        integer: what `convert` made of a model with several paths.
        kernels: as for `Simulator`.
    """

    def __init__(self, integer: PathModel, kernels: str = "fast") -> None:
        self.model = integer
        self.paths = [Simulator(gm, kernels) for gm in integer.graphs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed in integers."""
        return self.paths[self.model.path_of(args, kwargs)](*args, **kwargs)

    def run(self, *args: Any, record: bool | Iterable[str] = False, **kwargs: Any) -> SimulatorRun:
        """As `Simulator.run` with `record`, on the path for these inputs; other options need a path's own simulator."""
        return self.paths[self.model.path_of(args, kwargs)].run(*args, record=record, **kwargs)


class Simulator:
    """Executes an integer graph with a set of kernels.

    The graph's tensors are read once, when the simulator is made; after a change of the graph, make another.

    Args:
        integer: what `convert` returned.
        kernels: name of the kernel set; all sets give equal bits.

    Attributes:
        fallbacks: site to the reason why it runs a reference kernel although the set has another.

    Raises:
        UserError: the graph is not in stage INTEGER, or the set does not exist.
        MissingKernel: the set has no kernel for an operator of the graph.
    """

    def __new__(cls, integer: fx.GraphModule | PathModel, kernels: str = "fast") -> Any:
        """A simulator per path, where there are several."""
        return PathSimulator(integer, kernels) if isinstance(integer, PathModel) else super().__new__(cls)

    def __init__(self, integer: fx.GraphModule, kernels: str = "fast") -> None:
        if not isinstance(integer, fx.GraphModule) or graph_info(integer).stage is not Stage.INTEGER:
            raise UserError(
                "the simulator runs integer graphs", fix="call qgraph.convert(prepared) and simulate its result"
            )
        if kernels not in KERNEL_SETS:
            raise UserError(f"no kernel set is named {kernels!r}", fix=did_you_mean(kernels, KERNEL_SETS))
        self.gm = integer
        self.target: Target = target_of(integer)
        self.sites = {info(node).site: node for node in integer.graph.nodes if is_site(node)}
        self._costs: dict[fx.Node, OpCost] = {}
        self._base = BASES.get(kernels)
        self._program = Program(integer, self._select(kernels), FUNCTIONS if kernels == "fast" else None)
        self._plain = None if self._base is not None else self._program
        self.fallbacks = dict(self._program.fallbacks)

    def _select(self, kernels: str) -> dict[fx.Node, tuple[Kernel | PreparedKernel, Kernel | None]]:
        """Per integer operator of the graph, the kernel of the set and the one of its base to fall back to."""
        chosen: dict[fx.Node, tuple[Kernel | PreparedKernel, Kernel | None]] = {}
        for node in self.gm.graph.nodes:
            name = integer_name(node.target)
            if name is None:
                continue
            base = BASES.get(kernels)
            kernel = self._find(kernels, name)
            plain = None if base is None else self._find(base, name)
            if isinstance(plain, PreparedKernel):
                plain = None
            if (kernel or plain) is None:
                tables = [KERNEL_SETS[table] for table in (kernels, base) if table is not None]
                known = {op for table in tables for op, own in table if own in (ANY_TARGET, self.target.name)}
                raise MissingKernel(
                    f"kernel set {kernels!r} has no kernel for {name} on {self.target.name}",
                    where=where(node),
                    why=f"there are kernels for {', '.join(sorted(known))}",
                    fix="register one with qgraph.simulator.register_kernel, or use another kernel set",
                )
            chosen[node] = (kernel or plain, plain)  # type: ignore[assignment]
        return chosen

    def _find(self, kernels: str, operator: str) -> Kernel | PreparedKernel | None:
        table = KERNEL_SETS[kernels]
        return table.get((operator, self.target.name)) or table.get((operator, ANY_TARGET))

    def cost(self, node: fx.Node) -> OpCost:
        """Estimated cost of a node on the example's shapes."""
        found = self._costs.get(node)
        if found is None:
            found = self._costs[node] = op_cost(node, self.gm, self.target)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, computed in integers."""
        with torch.no_grad():
            return self._program.run(args, kwargs)

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
            session.go(self._program_for(injected), args, kwargs)
        return result

    def _program_for(self, injected: Mapping[str, torch.Tensor]) -> Program:
        """The program whose proofs hold: fast kernels know the bounds of codes, which an injection may leave."""
        for site, given in injected.items():
            bounds = self._program.ranges.get(self.sites[site])
            if bounds is None or given.numel() == 0 or given.is_floating_point():
                continue
            if int(given.min()) < bounds[0] or int(given.max()) > bounds[1]:
                if self._plain is None:
                    assert self._base is not None
                    self._plain = Program(self.gm, self._select(self._base))
                return self._plain
        return self._program

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

    def go(self, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Runs the program, watching every step."""
        values = program.start(args, kwargs)
        for step in program.steps:
            if step.run is not None:
                try:
                    values[step.slot] = self._computed(step, values)
                except Exception as error:
                    note_node(error, step.node)
                    raise
            if step.site is not None and self._kept(step.site, values[step.slot]):
                self.result.stopped_at = self.stop_at
                return
            for slot in step.frees:
                values[slot] = None
        self.result.output = program.output(values)

    def _computed(self, step: Step, values: list[Any]) -> Any:
        assert step.run is not None
        trace = KernelTrace() if self.record_all else None
        value = step.run(values, trace if step.counts else None)
        if trace is not None:
            self._report(step.node, value, trace)
        return self._injected(step.site, value) if step.site in self.inject else value

    def _kept(self, site: str, value: Any) -> bool:
        """Records a site if asked to; returns whether the run ends here."""
        if self.record_all or site in self.wanted or site == self.stop_at:
            self.result.values[site] = value
        return site == self.stop_at

    def _report(self, node: fx.Node, value: Any, trace: KernelTrace) -> None:
        record = info(node)
        if record.op.kind in (OpKind.STRUCTURE, OpKind.INPUT):
            return
        cost = self.simulator.cost(node)
        elements = value.numel() if isinstance(value, torch.Tensor) else 0
        self.result.ops.append(OpReport(record.site, record.op.name, cost, trace.saturated, trace.overflowed, elements))

    def _injected(self, site: str | None, value: torch.Tensor) -> torch.Tensor:
        assert site is not None
        given = self.inject[site]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise UserError(
                f"the tensor injected at {site!r} is {list(given.shape)} {given.dtype}, "
                f"the site holds {list(value.shape)} {value.dtype}",
                fix="inject codes of the site's own shape and dtype, for as many samples as the run has",
            )
        return given
