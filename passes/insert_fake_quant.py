"""Puts a fake quantization behind every planned site and into every module with a weight.

In state FLOAT all of them are the identity, so the graph computes what it did: bit exact. A weight that several modules
share gets one fake quantization, because it is one site, unless they need it in different formats or with scales along
different dimensions, as a convolution and its transposed twin do. A result that keeps its operand's scale passes the
operand's fake quantization once more, which then observes both. The calls of one place in a dynamic block share one
fake quantization over iterations, because another run may have more or fewer of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, cast

from torch import fx, nn

from qgraph.errors import InternalError
from qgraph.ir.arguments import bind
from qgraph.ir.editor import Editor, node_name
from qgraph.ir.node_info import NodeInfo, SitePlan, graph_info, info, module_of, update_graph_info, where
from qgraph.ir.op_table import FAKE_QUANT, TRANSPOSED
from qgraph.ir.stage import Stage
from qgraph.nn import as_fused
from qgraph.numerics import Format, QType
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.fake_quantize import BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from qgraph.quantization.observers import make_observer
from qgraph.quantization.ordering import ORDERINGS
from qgraph.quantization.sites import source_quantizer
from qgraph.targets import get_target

CONTAINER = "quantizers"

# id of the tensor, format, observer, dimension of the scales, fixed scale, whether training leaves it
_WeightKey: TypeAlias = tuple[int, QType, str, int, float | None, bool]


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Makes the graph ready for calibration and training."""

    name: ClassVar[str] = "insert-fake-quant"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    result_stage: ClassVar[Stage | None] = Stage.PREPARED
    requires: ClassVar[frozenset[str]] = frozenset({"dtypes"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fake-quant"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        weights: dict[_WeightKey, WeightFakeQuantize] = {}
        repeated: dict[Any, str] = {}
        target = ctx.target or get_target("bpu")
        for node in list(gm.graph.nodes):
            record = info(node)
            if record.weight_plan is not None:
                _quantize_weight(node, record.weight_plan, target.bias, weights, edit)
            if record.plan is not None and record.plan.observer != "none":
                _quantize_result(node, record, record.plan, repeated, edit)
        _note_uneven_fusion(gm)
        for node in list(gm.graph.nodes):
            if info(node).op in ORDERINGS and node.op == "call_function":
                _order_as_codes(node, edit)
        return PassResult(gm, edit.changes > 0)


def _quantize_result(node: fx.Node, record: NodeInfo, plan: SitePlan, repeated: dict[Any, str], edit: Editor) -> None:
    if plan.same_scale:
        path = _path_of_operand(node)
    elif record.repeated is None:
        path = _own_module(node, record, plan, edit)
    else:
        key = _common_key(record, plan)
        path = repeated.get(key) or _own_module(node, record, plan, edit)
        repeated[key] = path
    users = list(node.users)
    rounded = edit.call_module(path, node, op=FAKE_QUANT, like=node, site=f"{record.site}.fake_quant", before=node.next)
    edit.annotate(rounded, value=record.value)
    for user in users:
        edit.replace_input(user, node, rounded)


def _own_module(node: fx.Node, record: NodeInfo, plan: SitePlan, edit: Editor) -> str:
    """Path of a new fake quantization for a site."""
    module = FakeQuantize(
        record.site,
        _integer(plan, node),
        None if plan.fixed_scale is not None else make_observer(plan.observer, -1),
        fixed_scale=plan.fixed_scale,
        fixed_zero=plan.fixed_zero,
        scheme=plan.scheme,
        frozen=plan.frozen,
    )
    path = edit.free_path(f"{CONTAINER}.{node_name(record.site)}")
    edit.set_module(path, module.eval())
    return path


def _common_key(record: NodeInfo, plan: SitePlan) -> tuple[Any, ...]:
    """Equal for the calls of one place in a dynamic block that are fused and configured alike."""
    assert record.repeated is not None
    common = record.repeated.common(record.site)
    return record.op, common, _members(record), replace(plan, rule="", overrode=())


def _members(record: NodeInfo) -> tuple[str, ...]:
    """What a call stands for, without call numbers."""
    return tuple(site.partition("(")[0] for site in record.stands_for)


def _note_uneven_fusion(gm: fx.GraphModule) -> None:
    """Tells where the iterations of a dynamic block are fused differently: those do not share a scale."""
    found: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)
    for node in gm.graph.nodes:
        record = info(node)
        if record.repeated is not None and record.op is not FAKE_QUANT and record.site == record.repeated.site:
            found[record.repeated.identity].setdefault(_members(record), record.site)
    notes = [
        "iterations of a dynamic block are fused differently and have scales of their own: "
        + ", ".join(f"{site} as {' + '.join(members)}" for members, site in kinds.items())
        for kinds in found.values()
        if len(kinds) > 1
    ]
    known = graph_info(gm).notes
    update_graph_info(gm, notes=(*known, *(note for note in notes if note not in known)))


def _path_of_operand(node: fx.Node) -> str:
    """Path of the fake quantization behind the first operand, looking through what moves its codes."""
    current = node
    while info(current).op is not FAKE_QUANT:
        if not current.all_input_nodes:
            raise InternalError("a value whose scale is kept has no fake quantization", where=where(node))
        current = current.all_input_nodes[0]
    return str(current.target)


def _quantize_weight(
    node: fx.Node, plan: SitePlan, bias: Format, known: dict[_WeightKey, WeightFakeQuantize], edit: Editor
) -> None:
    fused = as_fused(module_of(node))
    site = info(node).site
    weight = cast(nn.Parameter, fused.weight)
    axis = -1 if not plan.per_channel else 1 if info(node).op in TRANSPOSED else 0
    key = (id(weight), _integer(plan, node), plan.observer, axis, plan.fixed_scale, plan.frozen)
    if key not in known:
        observer = None if plan.fixed_scale is not None else make_observer(plan.observer, axis)
        known[key] = WeightFakeQuantize(
            f"{site}.weight",
            key[1],
            observer,
            fixed_scale=plan.fixed_scale,
            scheme=plan.scheme,
            frozen=plan.frozen,
        )
    fused.weight_fake_quant = known[key].eval()
    if fused.bias is not None and isinstance(bias, QType):
        fused.bias_fake_quant = BiasFakeQuantize(f"{site}.bias").eval()
    edit.set_module(str(node.target), fused)


def _order_as_codes(node: fx.Node, edit: Editor) -> None:
    """An order of values as a module that knows whether they are rounded."""
    bound = bind(node)
    source = source_quantizer(bound.operand("input"))
    options = {name: bound.option(name) for name in bound.op.options}
    if source is None or any(isinstance(value, fx.Node) for value in options.values()):
        return
    path = edit.free_path(f"orderings.{node_name(info(node).site)}")
    edit.set_module(path, ORDERINGS[bound.op](source, **options).eval())
    edit.respell(node, "call_module", path, (bound.operand("input"),))


def _integer(plan: SitePlan, node: fx.Node) -> QType:
    if not isinstance(plan.format, QType):
        raise InternalError(f"a site of format {plan.format} has a fake quantization", where=where(node))
    return plan.format
