"""Decides the number format of every site.

In order, for each site: a fixed choice (a stub's scale, an inner step of a composite), else what the qconfig setters
answer together; then the target's legal combinations. A default that is illegal is changed to the nearest legal choice,
an explicit one is refused. Where the device keeps its operand's scale, or fixes the result's, the target decides.
Every decision keeps the rule that made it and what that rule overrode. Nothing is computed differently yet, except
that an operand in the wrong format gets a stub that converts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from passes.high_precision_output import accumulator_obstacle
from qgraph.errors import InternalError, QuantizationError
from qgraph.ir.arguments import bind, coded_operands, quant_rule
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.node_info import SitePlan, graph_info, info, module_of, update_graph_info, where
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, DEQUANT_STUB, EMBEDDING, FUSABLE, ITEM, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.values import holds_floats
from qgraph.nn import QuantStub
from qgraph.numerics import Format, QType, Scheme, qint8, qint16, qint32
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.config.qconfig import QConfig, require_integer
from qgraph.quantization.config.query import SiteQuery, query_of
from qgraph.quantization.config.resolve import Decision, as_setters, check_all_used, resolve
from qgraph.quantization.config.setters import DefaultQconfigSetter
from qgraph.quantization.plan import STUB_RULE, Plan
from qgraph.targets import Target, get_target

_INNER_RULE = "inner step of a composite"
_POSITION_RULE = "it computes sampling positions"


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
        check_all_used(planner.setters, [*planner.queries, *ctx.left_float])
        planner.check_plans()
        known = graph_info(gm).notes
        update_graph_info(gm, notes=(*known, *(note for note in planner.told if note not in known)))
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
        self.classes = ctx.classes
        self.planned: list[tuple[Plan, str, SitePlan]] = []
        self.formats: dict[fx.Node, QType] = {}
        self.queries: list[SiteQuery] = []
        self.notes: list[str] = []
        self.told: list[str] = []

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
        decision, qconfig = self._decide(node)
        asked = self._asked(node, decision, qconfig)
        weight = require_integer(qconfig.weight, where(node)) if record.op in FUSABLE else None
        operands = self._converted_inputs(node, operands, qconfig, asked, weight)
        result, overrode = asked.result, asked.overrode
        if record.op is not QUANT_STUB:
            keeps = self._keeps_scale(node)
            wanted = self.formats[operands[0][1]] if keeps else result
            weight, legal, operands, changed = self._legalized(node, operands, weight, wanted, asked)
            overrode = (*overrode, *changed)
            if keeps and (legal != wanted or result != wanted):
                overrode = (*overrode, self._kept(node, asked, result, legal, self.formats[operands[0][1]]))
            if result == qint32 and legal != qint32:
                raise self._illegal(node, self._operand_formats(node, operands, weight), result, asked.rule)
            result = legal
        plan = self._result_plan(node, qconfig, asked, result, overrode)
        weight_plan = (
            None if weight is None else self._weight_plan(node, qconfig, decision, weight, asked.changed(overrode))
        )
        self.edit.annotate(node, plan=plan, weight_plan=weight_plan)
        self.formats[node] = result

    def _asked(self, node: fx.Node, decision: Decision, qconfig: QConfig) -> _Asked:
        """What the setters want for the result, before the target is asked."""
        record = info(node)
        result, observer = require_integer(qconfig.output, where(node)), qconfig.activation_observer
        rule, overrode, plan = decision.rule, decision.overrode, decision.plan
        port = "output"
        if _is_table(node):
            result, observer, port = require_integer(qconfig.weight, where(node)), qconfig.weight_observer, "weight"
            rule, overrode, plan = decision.rules.get("weight", rule), decision.weight_overrode, decision.weight_plan
        fixed = qconfig.fixed_scale
        if qconfig.threshold is not None and fixed is None:
            fixed = qconfig.threshold.scale(port, result)
        stub = module_of(node) if record.op is QUANT_STUB else None
        if isinstance(stub, QuantStub) and stub.scale is not None:
            fixed, rule = stub.scale, STUB_RULE
        if result == qint32:
            self._require_accumulator(node, fixed, rule)
        weight_rule = decision.rules.get("weight")
        return _Asked(result, observer, fixed, rule, overrode, decision.preference, plan, weight_rule)

    def _require_accumulator(self, node: fx.Node, fixed: float | None, rule: str) -> None:
        """Refuses int32 where there is no accumulator, or where something needs codes at a scale."""
        obstacle = accumulator_obstacle(node)
        reason = "its scale is fixed" if fixed is not None else obstacle.reason
        if fixed is not None or not obstacle:
            raise QuantizationError(
                f"{info(node).op} {info(node).site} cannot keep its accumulator, which {qint32} asks for",
                where=where(node),
                why=f"{reason}; decided by: {rule}",
                fix="ask for int8 or int16; int32 is for a product whose result only leaves the quantized part",
            )

    def _result_plan(
        self, node: fx.Node, qconfig: QConfig, asked: _Asked, result: QType, overrode: tuple[str, ...]
    ) -> SitePlan:
        if result == qint32:
            plan = SitePlan(result, "none", False, asked.rule, overrode)
            return self._as_planned(info(node).site, plan, asked.plan)
        scheme = self._scheme(node, result, asked.rule)
        plan = SitePlan(
            result,
            asked.observer,
            False,
            asked.rule,
            overrode,
            asked.fixed_scale,
            scheme,
            frozen=qconfig.frozen,
            fake_quant=qconfig.fake_quant,
        )
        if asked.plan is not None:
            plan = asked.plan.planned(info(node).site, plan)
        plan = self._as_the_device_scales(node, plan)
        return self._as_planned(info(node).site, plan, asked.plan)

    def _weight_plan(
        self, node: fx.Node, qconfig: QConfig, decision: Decision, weight: QType, changed: tuple[str, ...]
    ) -> SitePlan:
        fixed = None if qconfig.threshold is None else qconfig.threshold.scale("weight", weight)
        plan = SitePlan(
            weight,
            qconfig.weight_observer,
            self.target.weight_per_channel and fixed is None,
            decision.rules.get("weight", decision.rule),
            (*decision.weight_overrode, *changed),
            fixed,
            self.target.weight_scheme(weight),
            fake_quant=qconfig.fake_quant,
        )
        return self._as_planned(f"{info(node).site}.weight", plan, decision.weight_plan)

    def _as_planned(self, site: str, plan: SitePlan, decided_by: Plan | None) -> SitePlan:
        """The decision with what a plan says of it, remembered to be compared with the plan in the end."""
        if decided_by is None:
            return plan
        plan = decided_by.planned(site, plan)
        self.planned.append((decided_by, site, plan))
        return plan

    def check_plans(self) -> None:
        """Refuses plans that were not followed.

        Raises:
            QuantizationError: a site came out otherwise than its plan says.
        """
        for plan, site, decided in self.planned:
            plan.require(site, decided)

    def _keeps_scale(self, node: fx.Node) -> bool:
        device = self.target.rule(info(node).op.name)
        return device is not None and device.same_scale

    def _kept(self, node: fx.Node, asked: _Asked, wanted: QType, result: QType, operand: QType) -> str:
        """What was overridden where a result must have its operand's format."""
        if not asked.preference or asked.rule == _POSITION_RULE or result != operand:
            error = self._illegal(node, [operand], wanted, asked.rule)
            error.why = f"the device keeps format and scale of the operand; {error.why}"
            error.fix = f"nearest legal: {operand} -> {operand}; or give the operand the other format"
            raise error
        return f"{asked.rule}: {wanted}, but {self.target.name} keeps the operand's format and scale"

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

    def _decide(self, node: fx.Node) -> tuple[Decision, QConfig]:
        record = info(node)
        query = query_of(node, self.classes)
        self.queries.append(query)
        # Quant stubs the user keeps in float are gone by now; what is left stands behind operators in float.
        decision = resolve(self.setters, query, quantized=record.op is QUANT_STUB)
        qconfig = decision.qconfig
        if qconfig is None:
            raise InternalError(
                "a site that stays in float is to be quantized",
                where=where(node),
                why=f"insert-quant-stubs did not ask the setters; decided by: {decision.rule}",
            )
        if decision.preference and record.inner:
            plain = replace(qconfig, output=qint16, input=None, inputs=None, fixed_scale=None, threshold=None)
            return _ruled(decision, _INNER_RULE), plain
        if decision.preference and node in self.positions:
            plain = replace(qconfig, output=qint16, input=None, inputs=None)
            return _ruled(decision, _POSITION_RULE), plain
        if decision.preference and qconfig.output == qint8:
            return decision, replace(qconfig, output=self.eight_bits)
        return decision, qconfig

    # --- legality --------------------------------------------------------------------------------------------

    def _legalized(
        self,
        node: fx.Node,
        operands: tuple[tuple[str, fx.Node], ...],
        weight: QType | None,
        result: QType,
        asked: _Asked,
    ) -> tuple[QType | None, QType, tuple[tuple[str, fx.Node], ...], tuple[str, ...]]:
        """The nearest legal formats: another weight format, then a converted operand, then another result."""
        legal = self.target.rule(info(node).op.name)
        given = self._operand_formats(node, operands, weight)
        if legal is None or legal.accepts(given, result):
            return weight, result, operands, ()
        # A format that no line has at all was never meant as a default among others.
        known = weight is None or any(weight in line.operands[-1] for line in legal.legal)
        if asked.preference and known:
            if weight is not None and legal.accepts([given[0], qint8], result):
                change = self._changed(node, given, result, asked.weight_rule, f"weight {qint8} instead of {weight}")
                return qint8, result, operands, (change,)
            for position in reversed(range(len(operands))):
                if weight is None and legal.accepts(
                    [*given[:position], self.eight_bits, *given[position + 1 :]], result
                ):
                    name = operands[position][0]
                    converted = self._convert(node, operands[position][1], self.eight_bits, asked)
                    told = f"operand {name} converted to {self.eight_bits}"
                    change = self._changed(node, given, result, asked.rule, told)
                    changed = (*operands[:position], (name, converted), *operands[position + 1 :])
                    return weight, result, changed, (change,)
            for other in (qint16, self.eight_bits):
                if legal.accepts(given, other):
                    change = self._changed(node, given, result, asked.rule, f"result {other} instead of {result}")
                    return weight, other, operands, (change,)
        rules = asked.rule if asked.weight_rule in (None, asked.rule) else f"{asked.rule}, weight: {asked.weight_rule}"
        raise self._illegal(node, given, result, rules)

    def _changed(self, node: fx.Node, given: Sequence[Format], result: QType, rule: str | None, told: str) -> str:
        """What a changed preference is recorded as; the user is told of one that is no default of the whole model."""
        change = f"{rule}: {_combination(given, result)} is illegal on {self.target.name}"
        self.notes.append(f"{info(node).site}: {told}")
        if rule not in (*self.defaults, _INNER_RULE, _POSITION_RULE):
            self.told.append(f"{info(node).site}: {told}: {change}")
        return change

    def _operand_formats(
        self, node: fx.Node, operands: tuple[tuple[str, fx.Node], ...], weight: QType | None
    ) -> list[Format]:
        formats: list[Format] = [self.formats[operand] for name, operand in operands if name != "residual"]
        return formats if weight is None else [formats[0], weight]

    # --- conversions -----------------------------------------------------------------------------------------

    def _converted_inputs(
        self,
        node: fx.Node,
        operands: tuple[tuple[str, fx.Node], ...],
        qconfig: QConfig,
        asked: _Asked,
        weight: QType | None,
    ) -> tuple[tuple[str, fx.Node], ...]:
        """The operands in the formats and at the scales the setters want them."""
        coded = [operand for name, operand in operands if name != "residual"]
        wanted = self._wanted_inputs(node, qconfig, coded)
        done: dict[fx.Node, fx.Node] = {}
        for position, (operand, given) in enumerate(zip(coded, wanted, strict=True)):
            entry = None if asked.plan is None else asked.plan.conversion(info(node).site, position)
            fixed = None if qconfig.threshold is None else qconfig.threshold.scale("input", given)
            if operand in done or (given == self.formats[operand] and fixed is None and entry is None):
                continue
            if not self._can_enter(given):
                formats: list[Format] = [given, weight] if weight is not None else list(wanted)
                raise self._illegal(node, formats, asked.result, asked.rule)
            done[operand] = self._convert(node, operand, given, asked, fixed, None if entry is None else entry.site)
        return tuple(
            (name, operand if name == "residual" else done.get(operand, operand)) for name, operand in operands
        )

    def _wanted_inputs(self, node: fx.Node, qconfig: QConfig, coded: Sequence[fx.Node]) -> list[QType]:
        """The format of each operand: what `inputs` says, else `input`, else its own."""
        given = qconfig.inputs or ()
        if len(given) > len(coded):
            raise QuantizationError(
                f"{len(given)} input formats are given for {info(node).op}, which has {len(coded)} quantized operands",
                where=where(node),
                fix="give one format per operand; None takes an operand as it comes",
            )
        wanted = []
        for position, operand in enumerate(coded):
            one = given[position] if position < len(given) and given[position] is not None else qconfig.input
            wanted.append(self.formats[operand] if one is None else require_integer(one, where(node)))
        return wanted

    def _convert(
        self,
        node: fx.Node,
        operand: fx.Node,
        wanted: QType,
        asked: _Asked,
        fixed: float | None = None,
        site: str | None = None,
    ) -> fx.Node:
        """`node` reads `operand` through a stub of another format or scale."""
        site = site or f"{info(node).site}.{node_name(info(operand).site)}_as_{wanted}"
        path = self.edit.free_path(f"stubs.{node_name(site)}")
        self.edit.set_module(path, QuantStub().eval())
        stub = self.edit.call_module(path, operand, op=QUANT_STUB, like=node, site=site)
        plan = info(operand).plan
        observer = plan.observer if plan is not None else "min_max"
        scheme = self.target.activation_scheme(wanted)
        planned = SitePlan(wanted, observer, False, f"{asked.rule}: input", (), fixed, scheme)
        planned = self._as_planned(site, planned, asked.plan)
        self.edit.annotate(stub, value=info(operand).value, plan=planned)
        self.edit.replace_input(node, operand, stub)
        self.formats[stub] = wanted
        return stub


@dataclass(frozen=True)
class _Asked:
    """What the setters want for a result.

    Args:
        result: its format.
        observer: its observer.
        fixed_scale: its scale, if it was given.
        rule: who decided.
        overrode: who would have decided otherwise.
        preference: whether an illegal format becomes the nearest legal one, instead of an error.
        plan: the plan that decided, if one did.
        weight_rule: who decided the weight's format.
    """

    result: QType
    observer: str
    fixed_scale: float | None
    rule: str
    overrode: tuple[str, ...]
    preference: bool
    plan: Plan | None
    weight_rule: str | None

    def changed(self, overrode: tuple[str, ...]) -> tuple[str, ...]:
        """What was added to `overrode` since."""
        return overrode[len(self.overrode) :]


def _ruled(decision: Decision, rule: str) -> Decision:
    """The decision under a rule of this pass."""
    return replace(decision, rule=rule, rules={**decision.rules, "weight": rule}, overrode=(), weight_overrode=())


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
