"""Which nodes hand on their operand unchanged, and whether it matters that they copy it."""

from __future__ import annotations

from torch import fx

from qgraph.ir.node_info import info
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import IDENTITY, ITEM, OPAQUE


def is_free_identity(node: fx.Node) -> bool:
    """Whether a node is an identity that may go without changing a bit, whatever follows it."""
    return is_unread_copy(node) and not info(node).relaid


def is_unread_copy(node: fx.Node) -> bool:
    """Whether a node is an identity of which nobody sees that it copies, though its memory layout may be its own."""
    record = info(node)
    if record.op is not IDENTITY or record.in_place or record.unstable:
        return False
    # A copy made before its operand is written holds the old value.
    return not any(info(operand).unstable for operand in node.all_input_nodes) and not memory_is_read(node)


def memory_is_read(node: fx.Node) -> bool:
    """Whether an unknown operator sees the value, or a view of it: it may depend on how the memory is laid out."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if info(user).op is OPAQUE:
            return True
        if info(user).op.kind is OpKind.MOVE or info(user).op is ITEM:
            pending += user.users
    return False
