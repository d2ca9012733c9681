"""What an operator costs on a target: work, cycles and bytes, from shapes and formats alone.

    cycles = max(work / work per cycle of the unit, bytes / bytes per cycle of the memory)

Bytes are operands, constants and results read or written once. A model of a device, not a measurement: use it to rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from qgraph.ir.arguments import weight_of
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, tensor_at
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import CONSTANT, TRANSPOSED
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec
from qgraph.numerics import parse_qtype
from qgraph.targets import Target

_FORMATS = {torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.int32: "int32"}
_CPU = "cpu"


@dataclass(frozen=True)
class OpCost:
    """Cost of one operator on the example shapes.

    Args:
        unit: the part of the device that runs it; `cpu` for what stays in float.
        macs: multiply-accumulates, of matrix products only.
        elements: elements of the result.
        bytes: bytes read and written.
        cycles: estimated cycles.
        bound: `compute` or `memory`, whichever decides.
    """

    unit: str
    macs: int
    elements: int
    bytes: int
    cycles: float
    bound: str


def op_cost(node: fx.Node, gm: fx.GraphModule, target: Target) -> OpCost:
    """Cost of one node of an integer graph."""
    operands = [spec for spec in (tensor_spec(used) for used in node.all_input_nodes) if spec is not None]
    results = _tensors(info(node).value)
    data = [tensor_spec(used) for used in node.all_input_nodes if info(used).op is not CONSTANT]
    moved = sum(_bytes(spec) for spec in (*operands, *results))
    macs = macs_of(node, gm)
    elements = sum(spec.numel for spec in results)
    unit = _unit(node, target)
    formats = [_FORMATS[spec.dtype] for spec in data if spec is not None and spec.dtype in _FORMATS]
    rate = _rate(target, unit, node, gm, formats)
    compute = (macs or elements) / rate
    memory = moved / target.bytes_per_cycle
    return OpCost(unit, macs, elements, moved, max(compute, memory), "compute" if compute >= memory else "memory")


def _unit(node: fx.Node, target: Target) -> str:
    rule = target.rule(info(node).op.name)
    quantized = info(node).qparams is not None or integer_name(node.target) is not None
    return rule.unit if rule is not None and quantized else _CPU


def _rate(target: Target, unit: str, node: fx.Node, gm: fx.GraphModule, formats: list[str]) -> float:
    table = target.units.get(unit, {})
    if not table:
        return 1.0
    if not formats:
        return float(table.get("float32", next(iter(table.values()))))
    weight = _weight(node, gm)
    pair = f"{formats[0]}*{_FORMATS.get(weight.dtype, 'int8') if weight is not None else formats[-1]}"
    widest = max(formats, key=lambda name: parse_qtype(name).bits)
    return float(table.get(pair, table.get(widest, min(table.values()))))


def _weight(node: fx.Node, gm: fx.GraphModule) -> torch.Tensor | None:
    if integer_name(node.target) in ("conv", "conv_pairs", "linear"):
        weight = node.args[1]
        return tensor_at(gm, str(weight.target)) if isinstance(weight, fx.Node) else None
    return weight_of(node)


def macs_of(node: fx.Node, gm: fx.GraphModule) -> int:
    """Multiply-accumulates of a matrix-product node in any stage; 0 for others."""
    record, result = info(node), tensor_spec(node)
    if record.op.kind is not OpKind.MATMUL or result is None:
        return 0
    weight = _weight(node, gm)
    source = tensor_spec(node.all_input_nodes[0])
    if source is None:
        return 0
    if weight is None:
        return result.numel * source.shape[-1]
    if record.op in TRANSPOSED:
        return source.numel * math.prod(weight.shape[1:])
    return result.numel * math.prod(weight.shape[1:])


def _tensors(value: object) -> list[TensorSpec]:
    if isinstance(value, TensorSpec):
        return [value]
    return [spec for entry in value for spec in _tensors(entry)] if isinstance(value, tuple) else []


def _bytes(spec: TensorSpec) -> int:
    return spec.numel * torch.empty((), dtype=spec.dtype).element_size()
