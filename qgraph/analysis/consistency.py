"""How far integers and fake quantization agree, site by site.

Every site is judged alone: it is given exactly what the integer graph gave it, so that no difference upstream counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class SiteRun:
    """One rounded site in one run of both graphs, given the same integer operands.

    Args:
        node: the operator's node in the prepared graph.
        integer: the node that computes its codes.
        operands, options: what the operator was called with: reals of the integer graph's codes.
        exact: its float32 result before rounding.
        simulated: the result as fake quantization rounds it.
        codes: what the integer graph computes.
        qparams: parameters of the codes.
    """

    node: fx.Node
    integer: fx.Node
    operands: tuple[Any, ...]
    options: Mapping[str, Any]
    exact: torch.Tensor
    simulated: torch.Tensor
    codes: torch.Tensor
    qparams: QParams

    @property
    def gap(self) -> torch.Tensor:
        """Difference in codes, float64 of the result's shape."""
        return (as_codes(self.simulated.double(), self.qparams) - self.codes.double()).abs()


def as_codes(values: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Reals on or off the grid (float64) as unsaturated codes, rounded half to even, float64."""
    rank = values.dim()
    scale, zero = (qparams.shaped(value, rank).double() for value in (qparams.scale, qparams.zero_points()))
    return torch.round(values / scale) + zero


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
    found: list[SiteConsistency] = []
    visit_sites(prepared, integer, args, kwargs, lambda run: found.append(_compare(run)))
    return found


def visit_sites(
    prepared: fx.GraphModule,
    integer: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    visit: Callable[[SiteRun], None],
) -> None:
    """Runs both graphs on one batch and shows `visit` every rounded site, in execution order.

    Args, raises: as for `compare_sites`.
    """
    _check_graphs(prepared, args)
    named = dict(kwargs or {})
    recorded = Simulator(integer).run(*args, record=True, **named).values
    nodes = {info(node).site: node for node in integer.graph.nodes if node.op != "output"}
    called: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    seen = False

    def call(node: fx.Node, values: tuple[Any, ...], options: dict[str, Any]) -> Any:
        nonlocal seen
        value = call_node(prepared, node, values, options)
        if info(node).plan is not None:
            called[node] = (values, options)
        rounds = info(node).op is FAKE_QUANT
        source = node.all_input_nodes[0] if rounds else node
        planned = info(source).plan
        site = info(source).site
        if not (rounds or (planned is not None and planned.observer == "none")) or site not in recorded:
            return value
        qparams = info(nodes[site]).qparams
        if qparams is None:
            raise InternalError(f"site {site} has codes and no scale")
        if rounds:
            _check_scale(site, module_of(node), qparams)
        codes, exact = recorded[site], values[0] if rounds else value
        operands, named_options = called.pop(source)
        visit(SiteRun(source, nodes[site], operands, named_options, exact, value, codes, qparams))
        seen = True
        return dequantize(codes, qparams)  # downstream sites get what the integer graph gave them

    with torch.no_grad():
        evaluate(prepared, args, named, call=call)
    if not seen:
        raise UserError(
            "the two graphs have no rounded site in common",
            where=f"{graph_info(prepared).model} and {graph_info(integer).model}",
            fix="compare with what qgraph.convert(prepared) returned",
        )


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


def _compare(run: SiteRun) -> SiteConsistency:
    gap = run.gap
    steps = run.exact.double() / run.qparams.shaped(run.qparams.scale, run.exact.dim()).double()
    to_boundary = (steps - torch.floor(steps) - 0.5).abs()
    near_tie = (gap == 1) & (to_boundary <= 2.0 ** (run.qparams.qtype.bits - 20))
    record = info(run.node)
    return SiteConsistency(
        site=record.site,
        op=record.op.name,
        format=str(run.qparams.qtype),
        elements=gap.numel(),
        differing=int((gap > 0).sum()),
        near_tie=int(near_tie.sum()),
        largest=int(gap.max().item()) if gap.numel() else 0,
    )
