"""Decides the number format of every site.

In order, for each site: a fixed choice (a stub's scale, an inner step of a composite), else the first qconfig setter
that answers; then the target's legal combinations. A default that is illegal is changed to the nearest legal choice,
an explicit one is refused. Where the device keeps its operand's scale, or fixes the result's, the target decides.
Every decision keeps the rule that made it and what that rule overrode. Nothing is computed differently yet, except
that an operand in the wrong format gets a stub that converts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from qgraph.errors import QuantizationError
from qgraph.ir.arguments import bind, coded_operands, quant_rule
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.node_info import SitePlan, info, module_of, where
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, DEQUANT_STUB, EMBEDDING, FUSABLE, ITEM, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.values import holds_floats
from qgraph.nn import QuantStub
from qgraph.numerics import Format, QType, Scheme, qint8, qint16
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.qconfig import (
    DefaultQconfigSetter,
    QConfig,
    SiteQuery,
    as_setters,
    check_all_used,
    require_integer,
    resolve,
)
from qgraph.targets import Target, get_target

_INNER_RULE = "inner step of a composite"
_POSITION_RULE = "it computes sampling positions"
_DEFAULT_RULES = (_INNER_RULE, _POSITION_RULE)
_STUB_RULE = "fixed scale of the QuantStub"


@dataclass(frozen=True)
class AssignDtypes(Pass):
    """Writes a `SitePlan` to every site that is rounded."""

    name: ClassVar[str] = "assign-dtypes"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    requires: ClassVar[frozenset[str]] = frozenset({"stubs"})
    ensures: ClassVar[frozenset[str]] = frozenset({"dtypes"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        planner = _Planner(edit, ctx, _computes_positions(gm.graph))
        for node in list(gm.graph.nodes):
            planner.visit(node)
        check_all_used(planner.setters, planner.queries)
        return PassResult(gm, edit.changes > 0, tuple(planner.notes))


class _Planner:
    """Walks the graph in execution order, so that the formats of operands are known."""

    def __init__(self, edit: Editor, ctx: PassContext, positions: set[fx.Node]) -> None:
        self.edit = edit
        self.positions = positions
        self.target: Target = ctx.target or get_target("bpu")
        self.eight_bits = self.target.eight_bits
        self.setters = ctx.setters or as_setters(None)
        self.defaults = {setter.name for setter in self.setters if isinstance(setter, DefaultQconfigSetter)}
        self.formats: dict[fx.Node, QType] = {}
        self.queries: list[SiteQuery] = []
        self.notes: list[str] = []

    def visit(self, node: fx.Node) -> None:
        """Decides one node."""
        record = info(node)
        if record.op is DEQUANT_STUB or record.op.kind is OpKind.OUTPUT:
            return
        if record.op is QUANT_STUB:
            self._plan(node, operands=())
            return
        operands = [(name, operand) for name, operand in _operands(node) if operand in self.formats]
        if not operands:
            return
        if record.op is ITEM or quant_rule(node) is QuantRule.SAME:
            if holds_floats(record.value):
                self.formats[node] = self.formats[operands[0][1]]
        elif quant_rule(node) is QuantRule.OWN:
            self._plan(node, tuple(operands))

    def _plan(self, node: fx.Node, operands: tuple[tuple[str, fx.Node], ...]) -> None:
        record = info(node)
        qconfig, rule = self._decide(node)
        observer = qconfig.activation_observer
        result = require_integer(qconfig.output, where(node))
        if _is_table(node):
            result, observer = require_integer(qconfig.weight, where(node)), qconfig.weight_observer
        fixed = qconfig.fixed_scale
        stub = module_of(node) if record.op is QUANT_STUB else None
        if isinstance(stub, QuantStub) and stub.scale is not None:
            fixed, rule = stub.scale, _STUB_RULE
        weight = require_integer(qconfig.weight, where(node)) if record.op in FUSABLE else None
        if qconfig.input is not None and operands:
            wanted = require_integer(qconfig.input, where(node))
            if not self._can_enter(wanted):
                given = [wanted if name != "residual" else self.formats[operand] for name, operand in operands]
                raise self._illegal(node, given if weight is None else [wanted, weight], result, rule)
            operands = self._converted_inputs(node, operands, wanted, rule)
        overrode: tuple[str, ...] = ()
        if record.op is not QUANT_STUB:
            keeps = self._keeps_scale(node)
            wanted = self.formats[operands[0][1]] if keeps else result
            weight, legal, operands, overrode = self._legalized(node, operands, weight, wanted, rule)
            if keeps and (legal != wanted or result != wanted):
                overrode = (*overrode, self._kept(node, rule, result, legal, self.formats[operands[0][1]]))
            result = legal
        scheme = self._scheme(node, result, rule)
        plan = SitePlan(result, observer, False, rule, overrode, fixed, scheme)
        plan = self._as_the_device_scales(node, plan)
        weight_plan = None
        if weight is not None:
            per_channel, scheme = self.target.weight_per_channel, self.target.weight_scheme(weight)
            weight_plan = SitePlan(weight, qconfig.weight_observer, per_channel, rule, overrode, scheme=scheme)
        self.edit.annotate(node, plan=plan, weight_plan=weight_plan)
        self.formats[node] = result

    def _keeps_scale(self, node: fx.Node) -> bool:
        device = self.target.rule(info(node).op.name)
        return device is not None and device.same_scale

    def _kept(self, node: fx.Node, rule: str, asked: QType, result: QType, operand: QType) -> str:
        """What was overridden where a result must have its operand's format."""
        if rule not in (*self.defaults, _INNER_RULE) or result != operand:
            error = self._illegal(node, [operand], asked, rule)
            error.why = f"the device keeps format and scale of the operand; {error.why}"
            error.fix = f"nearest legal: {operand} -> {operand}; or give the operand the other format"
            raise error
        return f"{rule}: {asked}, but {self.target.name} keeps the operand's format and scale"

    def _as_the_device_scales(self, node: fx.Node, plan: SitePlan) -> SitePlan:
        """The plan, with the operand's scale or the one the device fixes, where it does either."""
        device = self.target.rule(info(node).op.name)
        if device is None or not (device.same_scale or str(plan.format) in device.fixed_result):
            return plan
        if plan.fixed_scale is not None:
            keeps = "keeps the operand's scale" if device.same_scale else "has a fixed scale"
            raise QuantizationError(
                f"a scale of {plan.fixed_scale} is illegal for {info(node).op}",
                where=where(node),
                why=f"its result {keeps} on {self.target.name}; decided by: {plan.rule}",
                fix="leave the scale out",
            )
        if device.same_scale:
            return replace(plan, same_scale=True)
        scale, zero = device.fixed_result[str(plan.format)]
        return replace(plan, fixed_scale=scale, fixed_zero=zero)

    def _scheme(self, node: fx.Node, result: QType, rule: str) -> Scheme:
        entering = info(node).op is QUANT_STUB and not _is_table(node)
        if str(result) not in self.target.activations or (entering and not self._can_enter(result)):
            raise self._illegal(node, [result] if entering else [], result, rule)
        return self.target.activation_scheme(result)

    def _can_enter(self, result: QType) -> bool:
        stub = self.target.rule(QUANT_STUB.name)
        return str(result) in self.target.activations and (
            stub is None or any(result in line.results for line in stub.legal)
        )

    def _illegal(self, node: fx.Node, given: Sequence[Format], result: QType, rule: str) -> QuantizationError:
        """Says which combination is illegal for which operator, and the nearest that is not."""
        op, name = info(node).op.name, self.target.name
        return QuantizationError(
            f"{_combination(given, result)} is illegal for {op} on {name}",
            where=where(node),
            why=f"decided by: {rule}",
            fix=f"nearest legal: {self.target.nearest_legal(op, given, result)}",
        )

    def _decide(self, node: fx.Node) -> tuple[QConfig, str]:
        record = info(node)
        query = SiteQuery(record.site, record.module, record.stands_for, record.op.name)
        self.queries.append(query)
        qconfig, rule = resolve(self.setters, query)
        if record.inner and rule in self.defaults:
            return QConfig(qint16, qconfig.weight, None, qconfig.activation_observer), _INNER_RULE
        if node in self.positions and rule in self.defaults:
            return replace(qconfig, output=qint16, input=None), _POSITION_RULE
        if rule in self.defaults and qconfig.output == qint8:
            return replace(qconfig, output=self.eight_bits), rule
        return qconfig, rule

    # --- legality --------------------------------------------------------------------------------------------

    def _legalized(
        self,
        node: fx.Node,
        operands: tuple[tuple[str, fx.Node], ...],
        weight: QType | None,
        result: QType,
        rule: str,
    ) -> tuple[QType | None, QType, tuple[tuple[str, fx.Node], ...], tuple[str, ...]]:
        """The nearest legal formats: another weight format, then a converted operand, then another result."""
        legal = self.target.rule(info(node).op.name)
        given = self._operand_formats(node, operands, weight)
        if legal is None or legal.accepts(given, result):
            return weight, result, operands, ()
        request = _combination(given, result)
        explicit = rule not in self.defaults and rule not in _DEFAULT_RULES
        # A format that no line has at all was never meant as a default among others.
        known = weight is None or any(weight in line.operands[-1] for line in legal.legal)
        if not explicit and known:
            if weight is not None and legal.accepts([given[0], qint8], result):
                self.notes.append(f"{info(node).site}: weight {qint8} instead of {weight}")
                return qint8, result, operands, (f"{rule}: {request} is illegal on {self.target.name}",)
            for position in reversed(range(len(operands))):
                if weight is None and legal.accepts(
                    [*given[:position], self.eight_bits, *given[position + 1 :]], result
                ):
                    converted = self._convert(node, operands[position][1], self.eight_bits, rule)
                    changed = (*operands[:position], (operands[position][0], converted), *operands[position + 1 :])
                    name = operands[position][0]
                    self.notes.append(f"{info(node).site}: operand {name} converted to {self.eight_bits}")
                    return weight, result, changed, (f"{rule}: {request} is illegal on {self.target.name}",)
            for other in (qint16, self.eight_bits):
                if legal.accepts(given, other):
                    self.notes.append(f"{info(node).site}: result {other} instead of {result}")
                    return weight, other, operands, (f"{rule}: {request} is illegal on {self.target.name}",)
        raise self._illegal(node, given, result, rule)

    def _operand_formats(
        self, node: fx.Node, operands: tuple[tuple[str, fx.Node], ...], weight: QType | None
    ) -> list[Format]:
        formats: list[Format] = [self.formats[operand] for name, operand in operands if name != "residual"]
        return formats if weight is None else [formats[0], weight]

    # --- conversions -----------------------------------------------------------------------------------------

    def _converted_inputs(
        self, node: fx.Node, operands: tuple[tuple[str, fx.Node], ...], wanted: QType, rule: str
    ) -> tuple[tuple[str, fx.Node], ...]:
        return tuple(
            (name, operand)
            if name == "residual" or self.formats[operand] == wanted
            else (name, self._convert(node, operand, wanted, rule))
            for name, operand in operands
        )

    def _convert(self, node: fx.Node, operand: fx.Node, wanted: QType, rule: str) -> fx.Node:
        """`node` reads `operand` through a stub of another format."""
        site = f"{info(node).site}.{node_name(info(operand).site)}_as_{wanted}"
        path = self.edit.free_path(f"stubs.{node_name(site)}")
        self.edit.set_module(path, QuantStub().eval())
        stub = self.edit.call_module(path, operand, op=QUANT_STUB, like=node, site=site)
        plan = info(operand).plan
        observer = plan.observer if plan is not None else "min_max"
        scheme = self.target.activation_scheme(wanted)
        planned = SitePlan(wanted, observer, False, f"{rule}: input", scheme=scheme)
        self.edit.annotate(stub, value=info(operand).value, plan=planned)
        self.edit.replace_input(node, operand, stub)
        self.formats[stub] = wanted
        return stub


def _operands(node: fx.Node) -> list[tuple[str, fx.Node]]:
    if info(node).op is ITEM:
        return [("value", node.all_input_nodes[0])]
    if info(node).op.kind is OpKind.OPAQUE:
        return []
    return coded_operands(node)


def _computes_positions(graph: fx.Graph) -> set[fx.Node]:
    """What positions are computed from, back to where values come in or a matrix product made them."""
    found: set[fx.Node] = set()
    pending = [
        operand
        for node in graph.nodes
        if info(node).op.positions
        for name, operand in bind(node).nodes()
        if name in info(node).op.positions
    ]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if info(node).op.kind is not OpKind.MATMUL and info(node).op not in (QUANT_STUB, DEQUANT_STUB):
            pending += [operand for _, operand in _operands(node)] if node.op.startswith("call") else []
    return found


def _combination(given: Sequence[Format], result: QType) -> str:
    return f"{', '.join(map(str, given))} -> {result}" if given else f"a result in {result}"


def _is_table(node: fx.Node) -> bool:
    """Whether a stub quantizes the table of an embedding, which is a weight."""
    reads_constant = any(info(operand).op is CONSTANT for operand in node.all_input_nodes)
    return reads_constant and any(info(user).op is EMBEDDING for user in node.users)
