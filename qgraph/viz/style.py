"""Colours and shapes of pictures, and what they mean."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import fx

from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import OpKind
from qgraph.ir.stage import Stage
from qgraph.nn import Activation, Fused

_FONT = {"fontname": "Helvetica"}
# newrank: graphviz's older ranking cannot place boxes whose nodes alternate with nodes outside them.
GRAPH: dict[str, Any] = {
    **_FONT,
    "fontsize": "14",
    "rankdir": "TB",
    "nodesep": "0.25",
    "ranksep": "0.15",
    "newrank": "true",
    "charset": "UTF-8",
}
CLUSTER: dict[str, Any] = {
    **_FONT,
    "labeljust": "l",
    "style": "rounded",
    "color": "#a0a8b8",
    "fontcolor": "#505868",
    "fontsize": "11",
}
NODE: dict[str, Any] = {**_FONT, "shape": "box", "style": "rounded,filled", "fontsize": "10", "margin": "0.12,0.06"}
VALUE: dict[str, Any] = {
    **_FONT,
    "shape": "plaintext",
    "fontsize": "8",
    "fontcolor": "#555555",
    "margin": "0.02,0.01",
    "width": "0.1",
    "height": "0.1",
}
EDGE: dict[str, Any] = {"color": "#666666", "arrowsize": "0.6"}


class Role(Enum):
    """What a node is in a picture: fill colour, line colour and the text of the legend."""

    BORDER = ("#ffffff", "#444444", "input or output")
    MATMUL = ("#cfe2f3", "#3d6fa5", "convolution, linear, matrix product")
    FUSED = ("#9fc5e8", "#1f5f99", "fused with batch norm, add or activation")
    ARITHMETIC = ("#d9ead3", "#5a8f4a", "arithmetic, pooling, reduction")
    TABLE = ("#fff2cc", "#b08d2e", "table-driven function")
    MOVE = ("#eeeeee", "#888888", "data movement")
    STUB = ("#ead1dc", "#a64d79", "quantize or dequantize")
    ISLAND = ("#f4cccc", "#cc0000", "stays in float")
    CONSTANT = ("#f8f4e6", "#a89968", "constant")
    OTHER = ("#fafafa", "#aaaaaa", "other operator")
    ADDED = ("#b7e1b0", "#38761d", "new")
    REMOVED = ("#f4b6b6", "#990000", "removed")
    CHANGED = ("#ffe599", "#bf9000", "changed")
    UNCHANGED = ("#f3f3f3", "#999999", "unchanged")

    @property
    def fill(self) -> str:
        """Fill colour."""
        return self.value[0]

    @property
    def line(self) -> str:
        """Line colour."""
        return self.value[1]

    @property
    def meaning(self) -> str:
        """Text of the legend."""
        return self.value[2]

    @classmethod
    def diff_roles(cls) -> list[Role]:
        """The roles of a before/after picture."""
        return [cls.ADDED, cls.REMOVED, cls.CHANGED, cls.UNCHANGED]


_BY_KIND = {
    OpKind.INPUT: Role.BORDER,
    OpKind.OUTPUT: Role.BORDER,
    OpKind.MATMUL: Role.MATMUL,
    OpKind.ARITHMETIC: Role.ARITHMETIC,
    OpKind.REDUCE: Role.ARITHMETIC,
    OpKind.SAMPLE: Role.ARITHMETIC,
    OpKind.SELECT: Role.ARITHMETIC,
    OpKind.COMPOSITE: Role.ARITHMETIC,
    OpKind.TABLE: Role.TABLE,
    OpKind.MOVE: Role.MOVE,
    OpKind.STUB: Role.STUB,
    OpKind.CONSTANT: Role.CONSTANT,
    OpKind.STRUCTURE: Role.MOVE,
}


def role_of(node: fx.Node) -> Role:
    """What a node is in the picture of its graph."""
    record = info(node)
    owner = node.graph.owning_module
    if record.float_reason is not None:
        return Role.ISLAND
    if record.op.kind is OpKind.OPAQUE and isinstance(owner, fx.GraphModule):
        return Role.OTHER if graph_info(owner).stage is Stage.CAPTURED else Role.ISLAND
    if integer_name(node.target) == "requantize":
        return Role.ARITHMETIC
    role = _BY_KIND.get(record.op.kind, Role.OTHER)
    if role is Role.MATMUL and (_is_fused(node) or len(record.origins) > 1):
        return Role.FUSED
    return role


def _is_fused(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    module = owner.get_submodule(str(node.target))
    return isinstance(module, Fused) and (module.adds or module.activation is not Activation.NONE)
