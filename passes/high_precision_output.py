"""Leaves the last matrix product before a dequant stub in its 32-bit accumulator.

    linear -> int8 -> dequantize        becomes        linear -> int32 -> dequantize by sx * sw per channel

The result is not rounded to 8 or 16 bits at all. Only where the product goes straight to the stub and nowhere else,
carries no residual, and the target can hand out its accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.ir.arguments import bind
from qgraph.ir.node_info import Refusal, SitePlan, info, module_of
from qgraph.ir.op_table import DEQUANT_STUB, FUSABLE, MATMUL
from qgraph.ir.stage import Stage
from qgraph.nn import Activation, Fused
from qgraph.numerics import Format, qint32
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.plan import Plan
from qgraph.rewrite import Verdict, no, yes
from qgraph.targets import Target, get_target

RULE = "high-precision output"


@dataclass(frozen=True)
class HighPrecisionOutput(Pass):
    """Changes the plan of matrix products that feed a dequant stub."""

    name: ClassVar[str] = "high-precision-output"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    requires: ClassVar[frozenset[str]] = frozenset({"dtypes"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        target = ctx.target or get_target("bpu")
        notes, refusals = [], []
        for stub in gm.graph.nodes:
            if info(stub).op is not DEQUANT_STUB:
                continue
            node = stub.all_input_nodes[0]
            plan = info(node).plan
            if plan is None or plan.format == qint32 or info(node).op not in (*FUSABLE, MATMUL):
                continue
            verdict = _check(node, target)
            if verdict and _planned_otherwise(node, ctx):
                continue
            if verdict:
                raised = SitePlan(qint32, "none", False, RULE, (*plan.overrode, f"{plan.rule}: {plan.format}"))
                edit.annotate(node, plan=raised)
                notes.append(f"{info(node).site} keeps its accumulator")
            else:
                refusals.append(Refusal(self.name, verdict.reason or "", info(node).site, info(node).source))
        return PassResult(gm, False, tuple(notes), tuple(refusals))


def _planned_otherwise(node: fx.Node, ctx: PassContext) -> bool:
    """Whether a plan wants codes here."""
    entries = [setter.sites.get(info(node).site) for setter in ctx.setters if isinstance(setter, Plan)]
    return any(entry is not None and entry.format != qint32 for entry in entries)


def accumulator_obstacle(node: fx.Node) -> Verdict:
    """Whether a call could leave its result in the accumulator, whatever the target and the formats."""
    if info(node).op not in (*FUSABLE, MATMUL):
        return no("it is no matrix product", node)
    if len(node.users) > 1:
        return no("its result has other users", node)
    if not any(info(user).op is DEQUANT_STUB for user in node.users):
        return no("its result does not go straight to a dequant stub", node)
    module = module_of(node) if node.op == "call_module" else None
    if isinstance(module, Fused) and (module.adds or module.activation is Activation.RELU6):
        return no("a residual or relu6 is rounded at the scale of the result", node)
    return yes()


def _check(node: fx.Node, target: Target) -> Verdict:
    record = info(node)
    obstacle = accumulator_obstacle(node)
    if not obstacle:
        return obstacle
    if record.plan is not None and record.plan.fixed_scale is not None:
        return no("its scale is fixed", node)
    formats: list[Format] = []
    for _, operand in bind(node).nodes():
        operand_format = _format(operand)
        if operand_format is None:
            return no("the format of an operand is not known", node)
        formats.append(operand_format)
    if record.weight_plan is not None:
        formats = [formats[0], record.weight_plan.format]
    rule = target.rule(record.op.name)
    if rule is None or not rule.accepts(formats, qint32):
        return no(f"{target.name} does not hand out its accumulator", node)
    return yes()


def _format(node: fx.Node) -> Format | None:
    """The format of a value, looking through operators that only move it."""
    while info(node).plan is None:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    plan = info(node).plan
    return None if plan is None else plan.format
