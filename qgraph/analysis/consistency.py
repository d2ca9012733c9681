"""How far integers and fake quantization agree, site by site.

Every site is judged alone: it is given exactly what the integer graph gave it, so that no difference upstream counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qgraph.errors import InternalError
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.node_info import info
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.numerics import QParams, dequantize
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
        largest: largest difference in codes (steps of the site).
    """

    site: str
    op: str
    format: str
    elements: int
    differing: int
    largest: int

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
    """
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
        codes = recorded[site]
        found.append(_compare(source, value, codes, qparams))
        return dequantize(codes, qparams)  # downstream sites get what the integer graph gave them

    with torch.no_grad():
        evaluate(prepared, args, named, call=call)
    return found


def _compare(node: fx.Node, simulated: torch.Tensor, codes: torch.Tensor, qparams: QParams) -> SiteConsistency:
    scale = qparams.shaped(qparams.scale, simulated.dim()).double()
    gap = (torch.round(simulated.double() / scale) - codes.double()).abs()
    record = info(node)
    return SiteConsistency(
        record.site, record.op.name, str(qparams.qtype), gap.numel(), int((gap > 0).sum()), int(gap.max().item())
    )
