"""An integer graph as a flat list of steps: arguments are slots of a list, values are dropped after their last use.

Walking fx nodes costs tens of microseconds a node, as much as a small kernel; the walk is done once, here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from qgraph.ir.evaluate import bind_inputs, last_users, note_node
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, submodule_at, tensor_at
from qgraph.ir.op_table import CONSTANT
from qgraph.ir.shapes import tensor_spec
from qgraph.simulator.kernel import Kernel, KernelCall, NoFastForm, PreparedKernel
from qgraph.simulator.ranges import code_ranges, operand_of
from qgraph.simulator.trace import KernelTrace

Values = list[Any]
Load = Callable[[Values], Any]
# Operators whose bounds may take in those of a clamp behind them; they hold no weights, which would be packed twice.
_BOUNDED = ("add", "mul", "requantize")


@dataclass
class Step:
    """One node.

    Args:
        node: the node.
        site: its site if it is one, else None.
        slot: where its value goes.
        run: computes the value; `trace` is for kernels only. None for inputs, which are there already.
        frees: slots that nobody reads after it.
        counts: whether `run` fills a trace.
    """

    node: fx.Node
    site: str | None
    slot: int
    run: Callable[[Values, KernelTrace | None], Any] | None
    frees: tuple[int, ...]
    counts: bool


class Program:
    """The steps of one graph with one choice of kernels.

    Args:
        gm: the graph; its tensors are read here, once.
        kernels: per node that calls an integer operator, the kernel wanted and the plain kernel to fall back to.
        functions: what to call in place of other functions.

    Attributes:
        steps: one per node, for runs that watch sites.
        joined: the same for runs that do not: a clamp is part of the step before it.
        fallbacks: site to the reason why its prepared kernel was not used.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        kernels: Mapping[fx.Node, tuple[Kernel | PreparedKernel, Kernel | None]],
        functions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self.gm = gm
        self.functions = functions or {}
        self.fallbacks: dict[str, str] = {}
        self.ranges = code_ranges(gm)
        self.slots = {node: position for position, node in enumerate(gm.graph.nodes)}
        self.template: Values = [None] * len(self.slots)
        self.steps: list[Step] = []
        self.output: Load = lambda values: None
        dead = last_users(gm.graph)
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self.template[self.slots[node]] = tensor_at(gm, str(node.target))
            elif node.op == "output":
                self.output = _loader(node.args[0], self.slots)
            else:
                frees = tuple(self.slots[used] for used in dead.get(node, ()) if used.op != "get_attr")
                run = None if node.op == "placeholder" else self._compiled(node, kernels.get(node))
                site = info(node).site if is_site(node) else None
                self.steps.append(Step(node, site, self.slots[node], run, frees, node in kernels))
        self.joined = self._joined(kernels)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the graph returns, nothing else."""
        values = self.start(args, kwargs)
        for step in self.joined:
            if step.run is not None:
                try:
                    values[step.slot] = step.run(values, None)
                except Exception as error:
                    note_node(error, step.node)
                    raise
            for slot in step.frees:
                values[slot] = None
        return self.output(values)

    def start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Values:
        """Slots filled with constants and inputs."""
        values = self.template.copy()
        for node, value in bind_inputs(self.gm.graph, args, kwargs).items():
            values[self.slots[node]] = value
        return values

    def _compiled(
        self, node: fx.Node, kernel: tuple[Kernel | PreparedKernel, Kernel | None] | None
    ) -> Callable[[Values, KernelTrace | None], Any]:
        if kernel is None:
            return self._called(node)
        wanted, plain = kernel
        if isinstance(wanted, PreparedKernel):
            try:
                return self._prepared(node, wanted)
            except NoFastForm as reason:
                if plain is None:
                    raise
                self.fallbacks[info(node).site] = str(reason)
                wanted = plain
        return self._plain(node, wanted)

    def _joined(self, kernels: Mapping[fx.Node, tuple[Kernel | PreparedKernel, Kernel | None]]) -> list[Step]:
        """The steps, where a clamp of a value that nobody else reads bounds the operator that computes the value."""
        steps = {step.node: step for step in self.steps}
        for clamp in list(steps):
            source = clamp.args[0] if integer_name(clamp.target) == "clamp" else None
            if not isinstance(source, fx.Node) or integer_name(source.target) not in _BOUNDED or len(source.users) > 1:
                continue
            kernel, bounds = kernels[source][0], _both_bounds(source, clamp)
            if bounds is None or not isinstance(kernel, PreparedKernel):
                continue
            try:
                run = self._prepared(source, kernel, bounds)
            except NoFastForm:
                continue
            first, second = steps[source], steps.pop(clamp)
            frees = first.frees + tuple(slot for slot in second.frees if slot != first.slot)
            steps[source] = Step(source, second.site, second.slot, run, frees, first.counts)
        return list(steps.values())

    def _prepared(
        self, node: fx.Node, kernel: PreparedKernel, bounds: Mapping[str, int] | None = None
    ) -> Callable[[Values, KernelTrace | None], Any]:
        """The step of a prepared kernel, within other bounds than its own if such are given."""
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            raise NoFastForm("its first operand is a constant")
        args = tuple(self._known(argument) for argument in node.args)
        call = KernelCall(integer_name(node.target) or "", args, {**node.kwargs, **(bounds or {})})
        run = kernel.prepare(call)
        computed = [self.slots[a] for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(computed) == 1:
            (only,) = computed
            return lambda values, trace: run(values[only], trace=trace)
        if len(computed) == 2:
            first, second = computed
            return lambda values, trace: run(values[first], values[second], trace=trace)
        return lambda values, trace: run(*[values[slot] for slot in computed], trace=trace)

    def _known(self, argument: Any) -> Any:
        """A constant's tensor, or what is known of a computed value."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument.op == "get_attr":
            return self.template[self.slots[argument]]
        return operand_of(argument, self.ranges)

    def _plain(self, node: fx.Node, kernel: Kernel) -> Callable[[Values, KernelTrace | None], Any]:
        load, options = _loader(list(node.args), self.slots), _loader(dict(node.kwargs), self.slots)

        def run(values: Values, trace: KernelTrace | None) -> Any:
            if trace is None:
                return kernel(*load(values), **options(values))
            return kernel(*load(values), **options(values), trace=trace)

        return run

    def _called(self, node: fx.Node) -> Callable[[Values, KernelTrace | None], Any]:
        load, options = _loader(list(node.args), self.slots), _loader(dict(node.kwargs), self.slots)
        if node.op == "call_method":
            name = str(node.target)

            def call_method(values: Values, trace: KernelTrace | None) -> Any:
                receiver, *rest = load(values)
                return getattr(receiver, name)(*rest, **options(values))

            return call_method
        function: Any = submodule_at(self.gm, str(node.target)) if node.op == "call_module" else node.target
        function = self.functions.get(function, function) if node.op == "call_function" else function
        return lambda values, trace: function(*load(values), **options(values))


def _both_bounds(source: fx.Node, clamp: fx.Node) -> dict[str, int] | None:
    """Bounds that do what those of `source` and then those of `clamp` do; None if there are none."""
    own, other = source.kwargs, clamp.kwargs
    if own["format"] != other["format"]:
        return None
    low, high = max(own["low"], other["low"]), min(own["high"], other["high"])  # type: ignore[type-var]
    return {"low": low, "high": high} if low <= high else None  # type: ignore[dict-item, operator]


def _loader(value: Any, slots: Mapping[fx.Node, int]) -> Load:
    """How to find an argument at run time: nodes become reads of their slots, containers are rebuilt."""
    if isinstance(value, fx.Node):
        slot = slots[value]
        return lambda values: values[slot]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and _holds_nodes(value):
        kind, entries = (tuple if isinstance(value, tuple) else list), [_loader(entry, slots) for entry in value]
        return lambda values: kind([entry(values) for entry in entries])
    if isinstance(value, dict) and _holds_nodes(value):
        named = {name: _loader(entry, slots) for name, entry in value.items()}
        return lambda values: {name: entry(values) for name, entry in named.items()}
    if _holds_nodes(value):  # slices, named tuples and whatever else fx takes apart
        nodes: list[fx.Node] = []
        fx.node.map_arg(value, nodes.append)
        return lambda values: fx.node.map_arg(value, lambda node: values[slots[node]])
    return lambda values: value


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def is_site(node: fx.Node) -> bool:
    """Whether a node computes (or is given) one tensor."""
    return tensor_spec(node) is not None and info(node).op is not CONSTANT
