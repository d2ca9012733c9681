"""How far integers and fake quantization agree, site by site.

Every site is judged alone: it is given exactly what the integer graph gave it, so that no difference upstream counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qgraph.errors import InternalError, StateError, UserError
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.numerics import QParams, dequantize
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.sites import quantizers, require_prepared
from qgraph.quantization.states import FakeQuantState
from qgraph.simulator import Simulator


@dataclass(frozen=True)
class SiteConsistency:
    """One site.

    Args:
        site: its name.
        op: its operator.
        format: format of its codes.
        elements: how many elements were compared.
        differing: how many codes differ.
        near_tie: how many of these differ by one because the float lay next to a rounding boundary: closer than
            2**(bits - 20) steps, which is what arithmetic with 24 significant bits can move it.
        largest: largest difference in codes (steps of the site).
    """

    site: str
    op: str
    format: str
    elements: int
    differing: int
    near_tie: int
    largest: int

    @property
    def unexplained(self) -> int:
        """Differing elements that float32 arithmetic does not explain."""
        return self.differing - self.near_tie

    @property
    def agreement(self) -> float:
        """Share of elements that are equal."""
        return 1.0 - self.differing / self.elements if self.elements else 1.0


def compare_sites(
    prepared: fx.GraphModule,
    integer: fx.GraphModule,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[SiteConsistency]:
    """Compares fake quantization with the integer graph on one batch.

    Args:
        prepared: the prepared graph in state VALIDATION.
        integer: what `convert` made of it.
        args, kwargs: the model's inputs.

    Returns:
        One entry per rounded site, in execution order.

    Raises:
        StateError: a site of `prepared` is not in state VALIDATION.
        UserError: the graphs are not what they should be, or `integer` was not made from `prepared` as it is now.
    """
    _check_graphs(prepared, args)
    named = dict(kwargs or {})
    recorded = Simulator(integer).run(*args, record=True, **named).values
    scales = {info(node).site: info(node).qparams for node in integer.graph.nodes}
    found: list[SiteConsistency] = []

    def call(node: fx.Node, values: tuple[Any, ...], options: dict[str, Any]) -> Any:
        value = call_node(prepared, node, values, options)
        source = node.all_input_nodes[0] if info(node).op is FAKE_QUANT else node
        planned = info(source).plan
        rounded_here = info(node).op is FAKE_QUANT or (planned is not None and planned.observer == "none")
        site = info(source).site
        if not rounded_here or site not in recorded:
            return value
        qparams = scales[site]
        if qparams is None:
            raise InternalError(f"site {site} has codes and no scale")
        if info(node).op is FAKE_QUANT:
            _check_scale(site, module_of(node), qparams)
        codes = recorded[site]
        exact = values[0] if info(node).op is FAKE_QUANT else value
        found.append(_compare(source, exact, value, codes, qparams))
        return dequantize(codes, qparams)  # downstream sites get what the integer graph gave them

    with torch.no_grad():
        evaluate(prepared, args, named, call=call)
    if not found:
        raise UserError(
            "the two graphs have no rounded site in common",
            where=f"{graph_info(prepared).model} and {graph_info(integer).model}",
            fix="compare with what qgraph.convert(prepared) returned",
        )
    return found


def _check_graphs(prepared: fx.GraphModule, args: object) -> None:
    gm = require_prepared(prepared, "compare_sites")
    if not isinstance(args, (tuple, list)):
        raise UserError(f"args is a {type(args).__name__}", fix="give the model's inputs as a tuple: (x,)")
    for quantizer in quantizers(gm):
        if quantizer.state is not FakeQuantState.VALIDATION:
            raise StateError(
                f"site {quantizer.site} is in state {quantizer.state}",
                why="integers agree with what the sites compute in state VALIDATION",
                fix="call set_fake_quantize(prepared, FakeQuantState.VALIDATION) first",
            )


def _check_scale(site: str, quantizer: nn.Module, qparams: QParams) -> None:
    if not isinstance(quantizer, FakeQuantize) or not quantizer.qparams().same_as(qparams):
        raise UserError(
            f"site {site} has another scale or format in the integer graph",
            why="the prepared graph was calibrated or trained after convert, or belongs to another model",
            fix="compare with what qgraph.convert(prepared) returns now",
        )


def _compare(
    node: fx.Node, exact: torch.Tensor, simulated: torch.Tensor, codes: torch.Tensor, qparams: QParams
) -> SiteConsistency:
    scale = qparams.shaped(qparams.scale, simulated.dim()).double()
    zero = qparams.shaped(qparams.zero_points(), simulated.dim()).double()
    gap = (torch.round(simulated.double() / scale) + zero - codes.double()).abs()
    steps = exact.double() / scale
    to_boundary = (steps - torch.floor(steps) - 0.5).abs()
    near_tie = (gap == 1) & (to_boundary <= 2.0 ** (qparams.qtype.bits - 20))
    record = info(node)
    return SiteConsistency(
        site=record.site,
        op=record.op.name,
        format=str(qparams.qtype),
        elements=gap.numel(),
        differing=int((gap > 0).sum()),
        near_tie=int(near_tie.sum()),
        largest=int(gap.max().item()) if gap.numel() else 0,
    )
