"""Removes what lowering leaves behind.

Constants are quantized here and now instead of in every run; equal rescalings of one value are done once; what nobody
reads goes. Bit exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qgraph.ir.editor import Editor
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import tensor_at
from qgraph.ir.stage import Stage
from qgraph.pipeline import Pass, PassContext, PassResult
from passes.eliminate_dead_code import has_effect
from passes.fold_constants import fold

_PURE = ("requantize", "quantize")


@dataclass(frozen=True)
class CleanUpInteger(Pass):
    """Folds constants, merges equal rescalings, removes dead code."""

    name: ClassVar[str] = "clean-up-integer"
    stages: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    requires: ClassVar[frozenset[str]] = frozenset({"integer"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        fold(edit, largest=1 << 30, stubs=True)
        _merge_equal(edit)
        for node in reversed(list(gm.graph.nodes)):
            if not node.users and not has_effect(node):
                edit.erase(node)
        return PassResult(gm, edit.changes > 0)


def _merge_equal(edit: Editor) -> None:
    known: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(edit.graph.nodes):
        if integer_name(node.target) not in _PURE:
            continue
        key = (node.target, _key(node.args, edit.gm), _key(tuple(node.kwargs.items()), edit.gm))
        first = known.setdefault(key, node)
        if first is not node:
            edit.bypass(node, first)


def _key(value: Any, gm: fx.GraphModule) -> Any:
    """A hashable stand-in for arguments, in which constants are compared by value."""
    if isinstance(value, fx.Node):
        if value.op != "get_attr":
            return value
        tensor: torch.Tensor = tensor_at(gm, str(value.target))
        return (tuple(tensor.shape), str(tensor.dtype), tuple(tensor.flatten().tolist()))
    if isinstance(value, (tuple, list)):
        return tuple(_key(entry, gm) for entry in value)
    return value
