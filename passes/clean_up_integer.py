"""Removes what lowering leaves behind.

Constants are quantized here and now instead of in every run; equal rescalings of one value are done once; what nobody
reads goes. Bit exact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.eliminate_dead_code import has_effect
from passes.fold_constants import fold
from qgraph.ir.editor import Editor
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import info, tensor_at
from qgraph.ir.stage import Stage
from qgraph.pipeline import Pass, PassContext, PassResult

_PURE = ("requantize", "quantize")
_WORTH_MERGING = 64  # elements; small constants keep names of their own


@dataclass(frozen=True)
class CleanUpInteger(Pass):
    """Folds constants, merges equal rescalings, removes dead code."""

    name: ClassVar[str] = "clean-up-integer"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    requires: ClassVar[frozenset[str]] = frozenset({"integer"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        fold(edit, largest=1 << 30, stubs=True)
        _merge_constants(edit)
        _merge_equal(edit)
        for node in reversed(list(gm.graph.nodes)):
            if not node.users and not has_effect(node):
                edit.erase(node)
        return PassResult(gm, edit.changes > 0)


def _merge_constants(edit: Editor) -> None:
    """Constants that hold the same numbers, such as the weight of a shared convolution, are kept once."""
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in edit.graph.find_nodes(op="get_attr"):
        tensor = tensor_at(edit.gm, str(node.target))
        if tensor.numel() < _WORTH_MERGING or info(node).unstable:
            continue
        digest = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()).digest()
        first = known.setdefault((tuple(tensor.shape), tensor.dtype, digest), node)
        if first is not node and info(first).qparams is info(node).qparams:
            edit.bypass(node, first)


def _merge_equal(edit: Editor) -> None:
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(edit.graph.nodes):
        if integer_name(node.target) not in _PURE:
            continue
        key = (node.target, _key(node.args, edit.gm), _key(tuple(node.kwargs.items()), edit.gm))
        first = known.setdefault(key, node)
        if first is not node:
            both = dict.fromkeys((*info(first).stands_for, *info(node).stands_for))
            edit.annotate(first, origins=tuple(both))
            edit.bypass(node, first)


def _key(value: Any, gm: fx.GraphModule) -> Any:
    """A hashable stand-in for arguments, in which constants are compared by value."""
    if isinstance(value, fx.Node):
        if value.op != "get_attr" or info(value).unstable:
            return value
        tensor: torch.Tensor = tensor_at(gm, str(value.target))
        return (tuple(tensor.shape), str(tensor.dtype), tuple(tensor.flatten().tolist()))
    if isinstance(value, (tuple, list)):
        return tuple(_key(entry, gm) for entry in value)
    return value
