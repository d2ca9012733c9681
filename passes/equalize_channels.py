"""Scales channels of very different ranges before one scale is found for all of them.

    relu(w x + b)  ->  v        becomes        relu(s w x + s b)  ->  v / s        bit exact: s are powers of two

Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019. All channel axes that must
share factors (residual sums, pooling, depthwise convolutions in between, flattening) form a group; a group is scaled
only where the noise of quantization is expected to fall by `least_gain`. The ranges are those of the example inputs,
and not less than what the weights make of such inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qgraph.ir.node_info import Refusal, graph_info, info, update_graph_info
from qgraph.ir.op import OpKind
from qgraph.ir.stage import Stage
from qgraph.numerics import QType, qint8
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.quantization.channel_axes import ChannelAxes
from qgraph.quantization.channel_noise import channel_ranges, layer_input
from qgraph.quantization.config.qconfig import QConfig
from qgraph.quantization.config.query import query_of
from qgraph.quantization.config.resolve import resolve
from qgraph.quantization.equalization import (
    apply_factors,
    choose_factors,
    describe,
    layers_of,
    loses_digits,
    uneven_groups,
)


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Scales channels where that is expected to help.

    Args:
        least_gain: by how many dB the expected noise must fall.
    """

    name: ClassVar[str] = "equalize-channels"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.FUSED,)
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})

    least_gain: float = 3.0

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        axes = ChannelAxes(gm, lambda node: _has_fixed_scale(node, ctx))
        groups = uneven_groups(axes)
        if not groups or ctx.example is None:
            return PassResult(gm, False)

        def levels(call: fx.Node) -> tuple[QType | None, QType]:
            return _output_format(layer_input(call), ctx), _weight_format(call, ctx)

        ranges = channel_ranges(gm, [ctx.example], layers_of(axes, groups.values()))
        chosen = choose_factors(axes, groups, ranges, levels, sampled=False)
        wanted = {root: choice for root, choice in chosen.items() if choice.gain >= self.least_gain}
        notes, refusals = [], []
        for root, choice in list(wanted.items()):
            reason, node = choice.group.pinned or ("", axes.layers[choice.group.producers[0]].calls[0])
            if not reason and loses_digits(axes, wanted, (*choice.group.producers, *choice.group.consumers)):
                reason = "a weight would leave the range of float32"
            if reason:
                del wanted[root]
                spread = f"its channels differ ({choice.spread:.3g} times the median) and cannot be scaled: {reason}"
                refusals.append(Refusal(self.name, spread, info(node).site, info(node).source))
            else:
                notes.append(describe(axes, choice))
        if wanted:
            apply_factors(axes, wanted, edit)
            update_graph_info(gm, notes=(*graph_info(gm).notes, *notes))
        return PassResult(gm, edit.changes > 0, tuple(notes), tuple(refusals))


def _decided(node: fx.Node, ctx: PassContext) -> QConfig | None:
    """None for what stays in float."""
    return resolve(ctx.setters, query_of(node, ctx.classes)).qconfig


def _has_fixed_scale(node: fx.Node, ctx: PassContext) -> bool:
    if not ctx.setters or info(node).op.kind in (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.STRUCTURE):
        return False
    decided = _decided(node, ctx)
    return decided is not None and decided.fixed_scale is not None


def _output_format(node: fx.Node, ctx: PassContext) -> QType | None:
    if not ctx.setters:
        return qint8
    decided = _decided(node, ctx)
    return decided.output if decided is not None and isinstance(decided.output, QType) else None


def _weight_format(node: fx.Node, ctx: PassContext) -> QType:
    if not ctx.setters:
        return qint8
    decided = _decided(node, ctx)
    return decided.weight if decided is not None and isinstance(decided.weight, QType) else qint8
