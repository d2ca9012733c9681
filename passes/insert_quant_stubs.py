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

from qgraph.ir.arguments import coded_operands, quant_rule
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.node_info import graph_info, info, update_graph_info
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, DEQUANT_STUB, FIELD, ITEM, MASK, MASK_BIAS, OPAQUE, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.values import TensorSpec, holds_floats
from qgraph.lowering import support
from qgraph.nn import DeQuantStub, QuantStub
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.config.query import query_of
from qgraph.quantization.config.resolve import resolve
from qgraph.quantization.plan import FLOAT_REASON
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


_FLOATS = (_Domain.RAW, _Domain.CODES, _Domain.REAL, _Domain.AFTER)
_STUBS = (QUANT_STUB, DEQUANT_STUB)


@dataclass(frozen=True)
class InsertQuantStubs(Pass):
    """Inserts quant and dequant stubs for the context's target."""

    name: ClassVar[str] = "insert-quant-stubs"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    requires: ClassVar[frozenset[str]] = frozenset({"fused", "decomposed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"stubs"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        removed = _without_stubs_in_float(gm, edit, ctx)
        placed = _Placement(gm, ctx)
        stubs = _Stubs(edit)
        for node in list(gm.graph.nodes):
            if node in placed.reads:
                for operand in node.all_input_nodes:
                    _connect(node, operand, placed, stubs)
        reasons = placed.reasons
        for node, reason in reasons.items():
            edit.annotate(node, float_reason=reason)
        islands = tuple(f"float: {info(node).site} ({info(node).op}): {reason}" for node, reason in reasons.items())
        islands = (*removed, *islands)
        known = graph_info(gm).notes
        update_graph_info(gm, notes=(*known, *(island for island in islands if island not in known)))
        return PassResult(gm, edit.changes > 0, islands)


class _Placement:
    """Every node's domain, and why operators that could have been integer are not.

    Args:
        values: what each node's value is made of.
        reads: what each node reads; another domain than its value's where codes become a mask or indices.
        reasons: why a call stays in float.
    """

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.target = ctx.target or get_target("bpu")
        self.ctx = ctx
        self.before = {**_before_masks(gm), **dict.fromkeys(_before_user_stubs(gm), _BEFORE_STUB)}
        self.values: dict[fx.Node, _Domain] = {}
        self.reads: dict[fx.Node, _Domain] = {}
        self.reasons: dict[fx.Node, str] = {}
        for node in gm.graph.nodes:
            reads = self._domain(node)
            real = holds_floats(info(node).value) or reads is _Domain.CONSTANT or info(node).op in _STUBS
            self.reads[node] = reads
            self.values[node] = reads if real or info(node).value is None else _Domain.OTHER

    def _domain(self, node: fx.Node) -> _Domain:
        record = info(node)
        if record.op.kind is OpKind.INPUT:
            return _Domain.RAW
        if record.op is CONSTANT:
            return _Domain.CONSTANT
        if record.op is QUANT_STUB:
            return _Domain.CODES
        if record.op is DEQUANT_STUB:
            return _Domain.AFTER
        if record.op in (ITEM, FIELD):
            return self.values.get(node.all_input_nodes[0], _Domain.OTHER)
        if record.op.kind in (OpKind.STRUCTURE, OpKind.OUTPUT):
            return _Domain.OTHER
        wanted, stays = self._wanted(node)
        unwanted = _configured_float(node, self.ctx) if wanted is _Domain.CODES else None
        if unwanted is not None:
            wanted, stays = _Domain.REAL, unwanted
        verdict = support(node, self.target) if wanted is _Domain.CODES else None
        if verdict is not None and not verdict:
            wanted, stays = _Domain.REAL, verdict.reason
        if stays is not None and record.op is not MASK:  # truth values made 0 and 1 are no computation
            self.reasons[node] = stays
        return wanted

    def _wanted(self, node: fx.Node) -> tuple[_Domain, str | None]:
        """The domain a call should be in by its operands, and why it is not integers if that needs saying."""
        operands = [self.values[operand] for operand in _read_values(node)]
        if not any(domain in _FLOATS for domain in operands):
            return self._without_floats(node)
        return _wanted(node, operands, self.before)

    def _without_floats(self, node: fx.Node) -> tuple[_Domain, str | None]:
        """A call that reads constants, masks and indices only."""
        plain = any(
            self.values[used] is _Domain.OTHER and isinstance(info(used).value, TensorSpec)
            for used in node.all_input_nodes
        )
        if not holds_floats(info(node).value):
            return (_Domain.OTHER if plain else _Domain.CONSTANT), None
        if node in self.before:
            return _Domain.REAL, self.before[node]
        moves = bool(node.all_input_nodes) and quant_rule(node) is QuantRule.SAME
        # What folding left depends on the batch size only: expanding codes is cheaper than expanding reals.
        return (_Domain.CODES if moves or plain else _Domain.CONSTANT), None


def _configured_float(node: fx.Node, ctx: PassContext) -> str | None:
    """Why the user keeps a call in float; None if not."""
    if not ctx.setters:
        return None
    query = query_of(node, ctx.classes)
    decision = resolve(ctx.setters, query)
    if decision.qconfig is not None:
        return None
    ctx.left_float.append(query)
    return f"{FLOAT_REASON} ({decision.rule})"


def _without_stubs_in_float(gm: fx.GraphModule, edit: Editor, ctx: PassContext) -> tuple[str, ...]:
    """Removes the user's quant stubs that have no configuration; returns what became of them."""
    notes = []
    for node in list(gm.graph.nodes):
        reason = _configured_float(node, ctx) if info(node).op is QUANT_STUB else None
        if reason is not None:
            notes.append(f"float: {info(node).site} ({QUANT_STUB}): {reason}")
            edit.bypass(node, node.all_input_nodes[0])
    return tuple(notes)


def _wanted(node: fx.Node, operands: list[_Domain], before: dict[fx.Node, str]) -> tuple[_Domain, str | None]:
    """The domain a call should be in by its operands, and why it is not integers if that needs saying."""
    if _Domain.CODES in operands:
        return _Domain.CODES, None
    if _Domain.AFTER in operands:
        return _Domain.AFTER, _AFTER_STUB
    if node in before:
        return _Domain.REAL, before[node]
    if _Domain.RAW not in operands and quant_rule(node) in (QuantRule.SAME, QuantRule.PLAIN):
        return _Domain.REAL, None  # moving or comparing what an operator in float made gains nothing from codes
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


def _read_values(node: fx.Node) -> list[fx.Node]:
    """The operands of a call that are codes where it runs in integers."""
    if info(node).op is OPAQUE:
        return list(node.all_input_nodes)
    return [operand for _, operand in coded_operands(node)]


def _connect(node: fx.Node, operand: fx.Node, placed: _Placement, stubs: _Stubs) -> None:
    """Puts a stub on one edge if its ends differ."""
    here, there = placed.reads[node], placed.values[operand]
    kind = info(node).op
    if there is _Domain.CODES and here is not _Domain.CODES:
        reads_shape_only = kind.kind is OpKind.STRUCTURE and kind.name in ("size", "scalar", "guard")
        if kind not in (DEQUANT_STUB, ITEM) and not reads_shape_only:
            stubs.put(node, operand, DEQUANT_STUB)
    elif here is _Domain.CODES and there is not _Domain.CODES and kind is not QUANT_STUB:
        if operand in _read_values(node) and holds_floats(info(operand).value):
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
