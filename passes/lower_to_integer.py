"""Replaces every quantized operator by integer operators of the target.

The lowering of each operator is looked up in the op table (`qgraph.lowering`); this pass walks the graph in execution
order, so that operands are codes already. Fake quantizations disappear, stubs become quantize and dequantize, and what
has no integer form stays float between them. Redefines the outputs: what was simulated in float is now computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.errors import QuantizationError
from qgraph.ir.arguments import coded_operands
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import graph_info, info, update_graph_info, where
from qgraph.ir.op import QuantRule
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, ITEM
from qgraph.ir.stage import Stage
from qgraph.ir.values import holds_floats
from qgraph.lowering import LoweringContext, lowering_of
from qgraph.lowering.accumulators import Overflowing, overflowing
from qgraph.lowering.base import coded
from qgraph.pipeline import REDEFINES, Numerics, Pass, PassContext, PassResult
from qgraph.targets import target_of


@dataclass(frozen=True)
class LowerToInteger(Pass):
    """Lowers a frozen graph.

    Args:
        strict: refuse graphs with operators that stay in float, or with sums that may leave their accumulator.
    """

    name: ClassVar[str] = "lower-to-integer"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.PREPARED,)
    result_stage: ClassVar[Stage | None] = Stage.INTEGER
    requires: ClassVar[frozenset[str]] = frozenset({"frozen"})
    ensures: ClassVar[frozenset[str]] = frozenset({"integer"})
    keeps: ClassVar[Numerics] = REDEFINES

    strict: bool = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        islands = [node for node in gm.graph.nodes if info(node).float_reason is not None]
        if self.strict and islands:
            raise QuantizationError(
                f"{len(islands)} operator(s) stay in float",
                where="; ".join(f"{where(node)}: {info(node).float_reason}" for node in islands),
                why="strict=True allows none",
                fix="change these operators, move them out of the model, or convert without strict",
            )
        target = ctx.target or target_of(gm)
        context = LoweringContext(edit, target)
        for node in list(gm.graph.nodes):
            _lower(node, edit, context)
        notes = self._check_accumulators(gm)
        update_graph_info(gm, target=target, notes=(*graph_info(gm).notes, *notes))
        return PassResult(gm, True, notes)

    def _check_accumulators(self, gm: fx.GraphModule) -> tuple[str, ...]:
        """What may leave an accumulator, as notes."""
        found = overflowing(gm)
        if self.strict and found:
            raise QuantizationError(
                f"sums of {len(found)} operator(s) may leave their accumulator",
                where="; ".join(entry.where for entry in found),
                why=f"strict=True allows no codes, likely or not, that leave it. {found[0]}",
                fix=_fix(found),
            )
        return tuple(map(str, found))


def _fix(found: list[Overflowing]) -> str:
    """What would make all sums fit that 8 bits can help, and what else there is."""
    narrowed = dict.fromkeys(site for entry in found for site in entry.narrowed)
    others = [f"for {info(entry.node).site}: {entry.fix}" for entry in found if not entry.narrowed]
    if narrowed:
        names = ", ".join(f'"{site}": QConfig(output="int8")' for site in narrowed)
        others.insert(0, f"prepare with ModuleNameQconfigSetter({{{names}}}) before the other setters")
    return "; ".join((*others, "or convert without strict, and see in a Simulator's run whether any sum overflowed"))


def _lower(node: fx.Node, edit: Editor, context: LoweringContext) -> None:
    record = info(node)
    if record.op is FAKE_QUANT:
        edit.bypass(node, node.all_input_nodes[0])
    elif record.op is ITEM:
        source = info(node.all_input_nodes[0]).qparams
        if source is not None and holds_floats(record.value):
            edit.annotate(node, qparams=source, value=coded(record.value, source))
    elif record.qparams is not None or record.op is DEQUANT_STUB or _reads_codes_only(node):
        lowering = lowering_of(node)
        if lowering is None:
            return
        try:
            context.check_scale(node)
            lowered = lowering.lower(node, context)
        except QuantizationError as error:
            error.where = error.where or where(node)
            raise
        if lowered is node:
            return
        if lowered in node.all_input_nodes:  # a stub between equal scales: nothing to compute
            edit.bypass(node, lowered)
            return
        edit.replace(node, lowered)
        edit.rename(lowered)


def _reads_codes_only(node: fx.Node) -> bool:
    """Whether codes become a mask or indices here."""
    if node.op in ("placeholder", "get_attr", "output") or info(node).op.quant is not QuantRule.PLAIN:
        return False
    operands = coded_operands(node)
    return bool(operands) and all(info(operand).qparams is not None for _, operand in operands)
