"""Writes every value's scale onto its node, once calibration or training is done.

A rounded site takes the scale of its fake quantization, a high-precision output the step of its accumulator, and what
only moves codes the scale of its operand. Nothing is computed differently. A site without data is an error that names
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from qgraph.errors import InternalError
from qgraph.ir.arguments import bind, coded_operands, quant_rule
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info, module_of, where
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, FUSABLE, ITEM, MATMUL
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.stage import Stage
from qgraph.ir.values import holds_floats
from qgraph.lowering.products import accumulator_step, scale_repeats
from qgraph.nn import Fused
from qgraph.numerics import QParams, qint32
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.fake_quantize import FakeQuantize

_UNQUANTIZED = (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.OPAQUE)


@dataclass(frozen=True)
class FreezeQParams(Pass):
    """Fixes all scales."""

    name: ClassVar[str] = "freeze-qparams"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.PREPARED,)
    requires: ClassVar[frozenset[str]] = frozenset({"fake-quant"})
    ensures: ClassVar[frozenset[str]] = frozenset({"frozen"})
    annotates: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        for node in gm.graph.nodes:
            if info(node).op.kind not in _UNQUANTIZED:
                _freeze(node, edit)
        return PassResult(gm, False)


def _freeze(node: fx.Node, edit: Editor) -> None:
    record = info(node)
    if record.weight_plan is not None:
        fused = module_of(node) if node.op == "call_module" else None
        if not isinstance(fused, Fused) or not isinstance(fused.weight_fake_quant, FakeQuantize):
            raise InternalError("a planned weight has no fake quantization", where=where(node))
        edit.annotate(node, weight_qparams=fused.weight_fake_quant.qparams())
    found = _qparams(node)
    if found is not None:
        edit.annotate(node, qparams=found)


def _qparams(node: fx.Node) -> QParams | None:
    record = info(node)
    if record.op is FAKE_QUANT:
        return _site_module(node, node).qparams()
    if record.plan is not None and record.plan.observer != "none":
        return _site_module(next(iter(node.users), node), node).qparams()
    if record.plan is not None:
        return _accumulator_qparams(node)
    if record.op is DEQUANT_STUB or not node.all_input_nodes:
        return None
    first = node.all_input_nodes[0] if record.op is ITEM else _first_operand(node)
    if first is None or info(first).qparams is None or not holds_floats(record.value):
        return None
    return info(first).qparams if record.op is ITEM or quant_rule(node) is QuantRule.SAME else None


def _first_operand(node: fx.Node) -> fx.Node | None:
    if info(node).op.kind is OpKind.STRUCTURE:
        return None
    return next((operand for _, operand in coded_operands(node)), None)


def _site_module(rounding: fx.Node, site: fx.Node) -> FakeQuantize:
    module = module_of(rounding) if rounding.op == "call_module" else None
    if not isinstance(module, FakeQuantize):
        raise InternalError("a rounded site has no fake quantization", where=where(site))
    return module


def _accumulator_qparams(node: fx.Node) -> QParams:
    """One step of the accumulator, per output channel where the weight has several scales."""
    record, operands = info(node), [operand for _, operand in bind(node).nodes()]
    first = info(operands[0]).qparams
    second: Any = record.weight_qparams if record.op in FUSABLE else info(operands[-1]).qparams
    if record.op not in (*FUSABLE, MATMUL) or first is None or second is None:
        raise InternalError("a high-precision output has no accumulator", where=where(node))
    step = accumulator_step(first, second, scale_repeats(node) if record.op in FUSABLE else 1)
    spec = tensor_spec(node)
    rank = len(spec.shape) if spec is not None else 2
    # The channels come before the spatial dimensions, with or without a batch; a linear has none of these.
    if step.dim() == 0:
        return QParams(step.float(), qint32)
    weight: Any = module_of(node).weight
    return QParams(step.float(), qint32, axis=rank - 1 - (weight.dim() - 2))
