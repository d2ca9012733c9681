"""Bounds of the codes of every value, from what computes it; weights and sums are checked against them.

A value outside the bounds cannot arise in a run; one that is injected sends the run to the reference kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, tensor_at
from qgraph.ir.op_table import PAD
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.numerics import parse_qtype
from qgraph.simulator.kernel import NoFastForm, Operand

Range = tuple[int, int]


def code_ranges(gm: fx.GraphModule) -> dict[fx.Node, Range]:
    """Bounds of every node that holds codes (for tuples: of all their tensors)."""
    ranges: dict[fx.Node, Range] = {}
    for node in gm.graph.nodes:
        found = _range_of(node, gm, ranges)
        if found is not None:
            ranges[node] = found
    return ranges


def _range_of(node: fx.Node, gm: fx.GraphModule, ranges: Mapping[fx.Node, Range]) -> Range | None:
    dtype = _dtype(info(node).value)
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return None
    name = integer_name(node.target)
    if name is not None and "low" in node.kwargs and "high" in node.kwargs:
        return _int(node.kwargs["low"]), _int(node.kwargs["high"])
    if name == "quantize":
        qtype = parse_qtype(str(node.kwargs["format"]))
        return qtype.qmin, qtype.qmax
    if name == "lookup":
        table = node.args[1]
        if isinstance(table, fx.Node) and table.op == "get_attr":
            entries = tensor_at(gm, str(table.target))
            return int(entries.min()), int(entries.max())
    # Indices beside the codes have another dtype.
    coded = [used for used in node.all_input_nodes if _dtype(info(used).value) == dtype]
    sources = [ranges[used] for used in coded if used in ranges]
    moves = info(node).op.lowering in ("move", "join") and info(node).op is not PAD
    if node.op != "placeholder" and sources and (name == "max_pool" or (name is None and moves)):
        return min(low for low, _ in sources), max(high for _, high in sources)
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def operand_of(node: fx.Node, ranges: Mapping[fx.Node, Range]) -> Operand:
    """What is known of a computed operand.

    Raises:
        NoFastForm: not even its dtype is.
    """
    spec = tensor_spec(node)
    if spec is None:
        raise NoFastForm(f"the value of {node.name} is not one tensor of known shape")
    low, high = ranges.get(node, (0, 0))
    return Operand(spec.dtype, tuple(spec.shape), low, high)


def _dtype(value: object) -> torch.dtype | None:
    while isinstance(value, tuple) and value:
        value = value[0]
    return value.dtype if isinstance(value, TensorSpec) else None


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value
