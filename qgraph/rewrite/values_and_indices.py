"""Operators that return values and their indices, written as two operators with one result each.

    v, i = x.max(dim)       i = argmax(x, dim, keepdim=True)   v = take_along_dim(x, i, dim)
    v, i = x.topk(k)        i = top_indices(x, k)              v = take_along_dim(x, i, -1)
    v, i = x.sort()         i = argsort(x)                     v = take_along_dim(x, i, -1)
    x.max(), x.max(dim)[0]  amax(x), amax(x, dim)
    torch.max(x, y)         maximum(x, y)
    embedding module        embedding(indices, weight): rows of a constant

So values are codes moved by indices, and indices are integers. Used by the pass `canonicalize`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.editor import Editor
from qgraph.ir.node_info import info
from qgraph.ir.op import Op
from qgraph.ir.shapes import tensor_spec
from qgraph.ir.values import TensorSpec

_FIELDS = {"values": 0, "indices": 1}

# What each is written as, for the page of operators; extremes where their values alone are read.
STEPS: dict[Op, tuple[Op, ...]] = {
    ops.MAX: (ops.AMAX,),
    ops.MIN: (ops.AMIN,),
    ops.TOPK: (ops.TOP_INDICES, ops.TAKE_ALONG_DIM),
    ops.SORT: (ops.ARGSORT, ops.TAKE_ALONG_DIM),
}


def split_extreme(node: fx.Node, edit: Editor) -> bool:
    """`max` and `min` of a tensor, along a dimension, or of two tensors."""
    bound = bind(node)
    x, dim, other = bound.operand("input"), bound.option("dim"), bound.operand("other")
    if not _is_float32(x):
        return False
    largest = info(node).op is ops.MAX
    if other is not None:
        pairwise = ops.MAXIMUM if largest else ops.MINIMUM
        edit.respell(node, "call_function", pairwise.target, (x, other), {}, op=pairwise)
        return True
    extreme = ops.AMAX if largest else ops.AMIN
    if dim is None:
        edit.respell(node, "call_function", extreme.target, (x,), {}, op=extreme)
        return True
    parts = _parts(node)
    if parts is None:
        return False
    keepdim = bool(bound.option("keepdim"))
    if all(position == 0 for _, position in parts):
        for item, _ in parts:
            options = {"dim": dim, "keepdim": True} if keepdim else {"dim": dim}
            edit.respell(item, "call_function", extreme.target, (x,), options, op=extreme)
        edit.erase(node)
        return True
    index = ops.ARGMAX if largest else ops.ARGMIN
    _rewrite(node, index, {"dim": dim, "keepdim": True}, parts, edit, dim, squeezed=not keepdim)
    return True


def split_topk(node: fx.Node, edit: Editor) -> bool:
    """`topk` and `sort`."""
    bound = bind(node)
    parts = _parts(node)
    if parts is None or not _is_float32(bound.operand("input")):
        return False
    index = ops.TOP_INDICES if info(node).op is ops.TOPK else ops.ARGSORT
    _rewrite(node, index, _given(bound, index), parts, edit, bound.option("dim"), squeezed=False)
    return True


def embedding_as_rows(node: fx.Node, edit: Editor) -> bool:
    """An embedding module as a call with the table as operand; a table that renormalizes itself stays a module."""
    if node.op != "call_module":
        return False
    module: Any = bind(node).module
    if module.max_norm is not None:
        return True
    path = f"{node.target}.weight"
    table = next(iter(node.graph.find_nodes(op="get_attr", target=path)), None)
    table = edit.held(path, like=node) if table is None else table
    edit.respell(node, "call_function", ops.EMBEDDING.target, (node.args[0], table), {}, op=ops.EMBEDDING)
    return True


def _rewrite(
    node: fx.Node,
    op: Op,
    options: dict[str, Any],
    parts: list[tuple[fx.Node, int]],
    edit: Editor,
    dim: int,
    *,
    squeezed: bool,
) -> None:
    x, record = bind(node).operand("input"), info(node)
    spec = tensor_spec(parts[0][0])
    shape = () if spec is None else spec.shape
    kept = list(shape)
    if squeezed:
        kept.insert(dim % (len(shape) + 1), 1)
    indices = edit.call(op, x, like=node, site=f"{record.site}.indices", **options)
    edit.annotate(indices, value=TensorSpec(tuple(kept), torch.int64), origins=record.stands_for)
    for item, position in parts:
        value: fx.Node = indices
        if position == 0:
            site = f"{info(item).site}.kept" if squeezed else None
            value = edit.call(ops.TAKE_ALONG_DIM, x, indices, dim=dim, like=item, site=site)
            edit.annotate(value, value=TensorSpec(tuple(kept), torch.float32))
        if squeezed:
            value = edit.call(ops.SQUEEZE, value, dim=dim, like=item)
        if value is indices:
            edit.bypass(item, indices)
        else:
            edit.replace(item, value)
            edit.rename(value)
    edit.erase(node)


def _parts(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """The readers of a pair, each with the part it takes; None if one takes the pair whole."""
    found = []
    for user in node.users:
        op = info(user).op
        if op not in (ops.ITEM, ops.FIELD):
            return None
        part = bind(user).option("index" if op is ops.ITEM else "name")
        position = _FIELDS.get(part, part)
        if position not in (0, 1, -1, -2):
            return None
        found.append((user, position % 2))
    return found or None


def _given(bound: Bound, op: Op) -> dict[str, Any]:
    options = bound.options()
    return {name: value for name, value in options.items() if name in op.signature.parameters}


def _is_float32(value: Any) -> bool:
    spec = tensor_spec(value) if isinstance(value, fx.Node) else None
    return spec is not None and spec.dtype is torch.float32
