"""Marks where values enter and leave integer arithmetic.

A quant stub goes where a real value meets an operator the target can run: at inputs, at float constants inside the
graph, and behind operators that stay in float. A dequant stub goes where codes meet anything else: outputs and
operators the target cannot run, each with the reason recorded. Stubs the user placed are honoured: what comes before a
QuantStub and after a DeQuantStub stays float. Bit exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import fx

from qgraph.ir.arguments import operand_values, quant_rule
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.node_info import graph_info, info, update_graph_info
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, DEQUANT_STUB, FIELD, ITEM, MASK, MASK_BIAS, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.values import TensorSpec, ValueSpec
from qgraph.lowering import support
from qgraph.nn import DeQuantStub, QuantStub
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.targets import get_target

_CONTAINER = "stubs"
_BEFORE_STUB = "it comes before the model's own QuantStub"
_MASK = "it makes a mask, whose 0 and 1 are exact codes"
_AFTER_STUB = "it comes after the model's own DeQuantStub"


class _Domain(Enum):
    """What a node's value is made of."""

    RAW = "a real input"
    CODES = "integer codes"
    REAL = "real numbers"
    AFTER = "real numbers behind the user's DeQuantStub"
    CONSTANT = "a constant"
    OTHER = "no float tensor"


@dataclass(frozen=True)
class InsertQuantStubs(Pass):
    """Inserts quant and dequant stubs for the context's target."""

    name: ClassVar[str] = "insert-quant-stubs"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    requires: ClassVar[frozenset[str]] = frozenset({"fused", "decomposed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"stubs"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        domains, reasons = _assign_domains(gm, ctx)
        stubs = _Stubs(edit)
        for node in list(gm.graph.nodes):
            if node not in domains:
                continue
            for operand in node.all_input_nodes:
                _connect(node, operand, domains, stubs)
        for node, reason in reasons.items():
            edit.annotate(node, float_reason=reason)
        islands = tuple(f"float: {info(node).site} ({info(node).op}): {reason}" for node, reason in reasons.items())
        known = graph_info(gm).notes
        update_graph_info(gm, notes=(*known, *(island for island in islands if island not in known)))
        return PassResult(gm, edit.changes > 0, islands)


def _assign_domains(gm: fx.GraphModule, ctx: PassContext) -> tuple[dict[fx.Node, _Domain], dict[fx.Node, str]]:
    """Every node's domain, and why operators that could have been integer are not."""
    target = ctx.target or get_target("bpu")
    before = {**_before_masks(gm), **dict.fromkeys(_before_user_stubs(gm), _BEFORE_STUB)}
    domains: dict[fx.Node, _Domain] = {}
    reasons: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        record = info(node)
        if record.op.kind is OpKind.INPUT:
            domains[node] = _Domain.RAW
        elif record.op is CONSTANT:
            domains[node] = _Domain.CONSTANT
        elif record.op is QUANT_STUB:
            domains[node] = _Domain.CODES
        elif record.op is DEQUANT_STUB:
            domains[node] = _Domain.AFTER
        elif record.op in (ITEM, FIELD):
            domains[node] = domains.get(node.all_input_nodes[0], _Domain.OTHER)
        elif record.op.kind in (OpKind.STRUCTURE, OpKind.OUTPUT):
            domains[node] = _Domain.OTHER
        else:
            operands_of = operand_values(node)
            operands = [domains[operand] for operand in operands_of]
            wanted, stays = _wanted(node, operands, before)
            verdict = support(node, target) if wanted is _Domain.CODES else None
            if verdict is not None and not verdict:
                wanted, stays = _Domain.REAL, verdict.reason
            domains[node] = wanted if _is_float(record.value) else _Domain.OTHER
            if stays is not None and _computes_in_float(node, operands_of):
                reasons[node] = stays
    return domains, reasons


def _computes_in_float(node: fx.Node, operands: list[fx.Node]) -> bool:
    """Whether a call that is no integers deals with real numbers: not with indices, nor with booleans made 0 and 1."""
    reads = any(_is_float(info(operand).value) for operand in operands)
    return reads or (_is_float(info(node).value) and info(node).op is not MASK)


def _wanted(node: fx.Node, operands: list[_Domain], before: dict[fx.Node, str]) -> tuple[_Domain, str | None]:
    """The domain a call should be in by its operands, and why it is not integers if that needs saying."""
    if _Domain.CODES in operands:
        return _Domain.CODES, None
    if _Domain.AFTER in operands:
        return _Domain.AFTER, _AFTER_STUB
    if node in before:
        return _Domain.REAL, before[node]
    if _Domain.RAW not in operands and _Domain.REAL not in operands:
        # What folding left depends on the batch size only: expanding codes is cheaper than expanding reals.
        moves = bool(operands) and quant_rule(node) is QuantRule.SAME
        return (_Domain.CODES if moves else _Domain.CONSTANT), None
    if _Domain.RAW not in operands and quant_rule(node) is QuantRule.SAME:
        return _Domain.REAL, None  # moving what an operator in float made gains nothing from codes
    return _Domain.CODES, None


def _before_user_stubs(gm: fx.GraphModule) -> set[fx.Node]:
    """Ancestors of the user's quant stubs."""
    found: set[fx.Node] = set()
    pending = [node for node in gm.graph.nodes if info(node).op is QUANT_STUB and not _reads_mask(node)]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in found and info(operand).op is not DEQUANT_STUB:
                found.add(operand)
                pending.append(operand)
    return found


def _before_masks(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """What only serves to make the masks of attention, each with the reason why it stays float."""
    found: dict[fx.Node, str] = {}
    pending = [node for node in gm.graph.nodes if info(node).op in (MASK, MASK_BIAS)]
    while pending:
        node = pending.pop()
        if node in found or not (info(node).op in (MASK, MASK_BIAS) or all(user in found for user in node.users)):
            continue
        found[node] = _MASK
        pending += node.all_input_nodes
    return found


def _reads_mask(stub: fx.Node) -> bool:
    return info(stub.all_input_nodes[0]).op is MASK


def _is_float(value: ValueSpec | None) -> bool:
    if isinstance(value, tuple):
        return any(_is_float(entry) for entry in value)
    return isinstance(value, TensorSpec) and value.dtype.is_floating_point


def _connect(node: fx.Node, operand: fx.Node, domains: dict[fx.Node, _Domain], stubs: _Stubs) -> None:
    """Puts a stub on one edge if its ends differ."""
    here, there = domains[node], domains.get(operand)
    kind = info(node).op
    if there is _Domain.CODES and here is not _Domain.CODES:
        reads_shape_only = kind.kind is OpKind.STRUCTURE and kind.name in ("size", "scalar", "guard")
        if kind not in (DEQUANT_STUB, ITEM) and not reads_shape_only:
            stubs.put(node, operand, DEQUANT_STUB)
    elif here is _Domain.CODES and there is not _Domain.CODES and kind is not QUANT_STUB:
        if operand in operand_values(node) and _is_float(info(operand).value):
            stubs.put(node, operand, QUANT_STUB)


class _Stubs:
    """Creates each stub once per value and kind."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.known: dict[tuple[fx.Node, str], fx.Node] = {}

    def put(self, node: fx.Node, operand: fx.Node, kind: object) -> None:
        """`node` reads `operand` through a stub."""
        key = (operand, "quant" if kind is QUANT_STUB else "dequant")
        if key not in self.known:
            self.known[key] = self._create(node, operand, key[1])
        self.edit.replace_input(node, operand, self.known[key])

    def _create(self, node: fx.Node, operand: fx.Node, label: str) -> fx.Node:
        site = f"{info(operand).site}.{label}"
        path = self.edit.free_path(f"{_CONTAINER}.{node_name(site)}")
        quant = label == "quant"
        self.edit.set_module(path, (QuantStub() if quant else DeQuantStub()).eval())
        stub = self.edit.call_module(
            path, operand, op=QUANT_STUB if quant else DEQUANT_STUB, like=operand, site=site, before=node
        )
        self.edit.annotate(stub, value=info(operand).value)
        return stub
