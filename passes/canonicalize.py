"""One spelling per operator, and nothing that computes nothing.

    x.add(y), x + y, torch.add(x, y)          -> add(x, y)
    nn.ReLU()(x), F.relu(x), x.clamp(min=0)   -> relu(x)
    F.conv2d(x, weight, bias)                 -> a Conv2d module, if the weights are the model's own
    nn.Conv2d(padding_mode="reflect")         -> pad, then a plain convolution
    x.max(dim), x.topk(k), x.sort()           -> indices, and a gather of the values
    Identity, eval-mode dropout, clone, contiguous, detach, casts to the same dtype -> gone
Copies into another memory layout stay: what follows would add in another order. `use-channels-last` removes them.

Modules with parameters stay modules; everything else becomes a function call with operands by position and options
by name. Bit exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qgraph.ir import op_table as ops
from qgraph.ir.arguments import Bound, bind
from qgraph.ir.editor import Editor, canonical_arguments
from qgraph.ir.identities import is_free_identity, memory_is_read
from qgraph.ir.node_info import graph_info, info
from qgraph.ir.op import Op, OpKind
from qgraph.ir.shapes import tensor_spec
from qgraph.pipeline import Pass, PassContext, PassResult
from qgraph.rewrite.values_and_indices import embedding_as_rows, split_extreme, split_topk
from qgraph.rewrite.weighted_modules import WEIGHTED, as_plain_module

_LEFT_ALONE = (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.STRUCTURE, OpKind.STUB, OpKind.OPAQUE)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites every known spelling to its canonical form and removes identities."""

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        device = _example_device(gm)
        for node in list(gm.graph.nodes):
            record = info(node)
            if record.op.kind in _LEFT_ALONE or record.in_place or record.unstable:
                continue
            if _is_identity(node, device):
                edit.bypass(node, node.all_input_nodes[0])
                continue
            _canonical_node(node, edit)
        for node in gm.graph.find_nodes(op="get_attr"):
            if not node.users:  # its reader is a module now
                edit.erase(node)
        return PassResult(gm, edit.changes > 0)


def _example_device(gm: fx.GraphModule) -> torch.device | None:
    example = graph_info(gm).example
    tensors = [] if example is None else [v for v in example.kwargs.values() if isinstance(v, torch.Tensor)]
    return tensors[0].device if tensors else None


def _is_identity(node: fx.Node, device: torch.device | None) -> bool:
    op, operands = info(node).op, node.all_input_nodes
    if not operands or info(operands[0]).unstable:  # a copy made before a write holds the old value
        return False
    before, after = tensor_spec(operands[0]), tensor_spec(node)
    if op is ops.IDENTITY:
        return before == after and is_free_identity(node)
    if op is ops.CAST:
        wanted = bind(node).option("device")
        stays = wanted is None or (device is not None and torch.device(wanted) == device)
        same = before is not None and before == after and not info(node).relaid
        return same and stays and not memory_is_read(node)
    if op is ops.TRANSPOSE:
        return before is not None and len(before.shape) < 2
    if op is ops.RESHAPE:
        # A reshape that reads the batch size, or leaves it to -1, keeps its shape only at the example's batch.
        return before is not None and before == after and tuple(bind(node).option("shape")) == before.shape
    return False


def _canonical_node(node: fx.Node, edit: Editor) -> None:
    op = info(node).op
    special = _SPECIAL.get(op)
    if special is not None and special(node, edit):
        return
    if op.target is None or (node.op == "call_module" and op.parameters):
        return
    _plain_call(node, bind(node), edit)


def _plain_call(node: fx.Node, bound: Bound, edit: Editor) -> None:
    args, kwargs = canonical_arguments(bound)
    if isinstance(args[0] if args else None, (int, float)) and bound.op is ops.SUB:
        args = (args[1], args[0])  # torch.sub takes no number first; rsub is its mirror
        _respell(node, torch.rsub, args, kwargs, ops.SUB, edit)
        return
    _respell(node, bound.op.target, args, kwargs, bound.op, edit)


def _respell(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: Op, edit: Editor) -> None:
    same = node.op == "call_function" and node.target is target and info(node).op is op
    if not same or node.args != args or dict(node.kwargs) != kwargs:
        edit.respell(node, "call_function", target, args, kwargs, op=op)


# --- special cases: each returns whether it dealt with the node ----------------------------------------------------


def _clamp(node: fx.Node, edit: Editor) -> bool:
    bound = bind(node)
    low, high = bound.values.get("min"), bound.values.get("max")
    before, after = tensor_spec(bound.operand("input")), tensor_spec(node)
    if before is None or after is None or before.dtype is not after.dtype:
        return False  # integers clamped by floats become floats
    if low == 0 and high is None:
        _respell(node, ops.RELU.target, (bound.operand("input"),), {}, ops.RELU, edit)
    elif low == 0 and high == 6:
        _respell(node, ops.RELU6.target, (bound.operand("input"),), {}, ops.RELU6, edit)
    else:
        return False
    return True


def _divide(node: fx.Node, edit: Editor) -> bool:
    """`c / x` becomes `reciprocal(x) * c`."""
    bound = bind(node)
    numerator, denominator = bound.operand("input"), bound.operand("other")
    if isinstance(numerator, fx.Node) or bound.option("rounding_mode") is not None:
        return False
    if numerator == 1:
        _respell(node, ops.RECIPROCAL.target, (denominator,), {}, ops.RECIPROCAL, edit)
        return True
    record = info(node)
    inverse = edit.call(ops.RECIPROCAL, denominator, like=node, site=f"{record.site}.reciprocal")
    edit.annotate(inverse, value=record.value)
    _respell(node, ops.MUL.target, (inverse, numerator), {}, ops.MUL, edit)
    return True


def _number_first(node: fx.Node, edit: Editor) -> bool:
    """`2 * x` becomes `x * 2`: numbers come second."""
    bound = bind(node)
    first, second = bound.operand("input"), bound.operand("other")
    if isinstance(first, fx.Node) or bound.values.get("alpha", 1) != 1:
        return False
    _respell(node, bound.op.target, (second, first), {}, bound.op, edit)
    return True


_POWERS = {0.5: ops.SQRT, -0.5: ops.RSQRT, -1: ops.RECIPROCAL}


def _power(node: fx.Node, edit: Editor) -> bool:
    """`x ** 2` becomes `x * x`, roots and reciprocals the functions torch itself calls for them."""
    bound = bind(node)
    x, exponent = bound.operand("input"), bound.operand("exponent")
    if not isinstance(x, fx.Node) or isinstance(exponent, fx.Node) or not _computes_in_float(x):
        return False
    if exponent == 2:
        _respell(node, ops.MUL.target, (x, x), {}, ops.MUL, edit)
    elif exponent in _POWERS:
        _respell(node, _POWERS[exponent].target, (x,), {}, _POWERS[exponent], edit)
    else:
        return False
    return True


def _computes_in_float(value: fx.Node) -> bool:
    spec = tensor_spec(value)
    return spec is not None and spec.dtype.is_floating_point


_SPECIAL: dict[Op, Callable[[fx.Node, Editor], bool]] = {
    ops.CLAMP: _clamp,
    ops.DIV: _divide,
    ops.ADD: _number_first,
    ops.MUL: _number_first,
    ops.MAX: split_extreme,
    ops.MIN: split_extreme,
    ops.TOPK: split_topk,
    ops.SORT: split_topk,
    ops.EMBEDDING: embedding_as_rows,
    ops.POW: _power,
    **dict.fromkeys(WEIGHTED, as_plain_module),
}
