"""Making in-place operations safe: a graph of values, not of memory.

A write becomes a pure operation when nobody reads the written memory under another name afterwards. A write to a slice
is written back into the tensor it was cut from. What remains in place is marked, and no rule touches it.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.recorder import Recording, Write
from qgraph.ir import functional as QF
from qgraph.ir.editor import node_name
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op_table import COPY_TO, SET_ITEM, SLICE
from qgraph.ir.values import TensorSpec


class InPlaceRemover:
    """Works through one recording's writes in execution order."""

    def __init__(self, root: nn.Module, recording: Recording) -> None:
        self.root = root
        self.recording = recording
        self.position = {node: index for index, node in enumerate(recording.graph.nodes)}
        self.pure_modules: set[int] = set()
        self.aliases: dict[int, list[fx.Node]] = defaultdict(list)
        for node, storage in recording.storages.items():
            self.aliases[storage].append(node)

    def run(self) -> None:
        """Rewrites the recording's graph."""
        for write in self.recording.writes:
            if not self._remove(write):
                for node in self.aliases[write.storage]:
                    set_info(node, replace(info(node), unstable=True))

    def _remove(self, write: Write) -> bool:
        node, target = write.node, _written_operand(write)
        if write.storage in self.recording.state or write.storage == 0 or target is None:
            return False
        chain = self._views_up_to_base(target)
        outside = [
            other
            for other in self.aliases[write.storage]
            if self.position[other] < self.position[node] and other not in chain and self._read_after(other, node)
        ]
        if outside or not self._same_dtype(node, target) or not self._make_pure(node):
            return False
        set_info(node, replace(info(node), in_place=False))
        self._redirect(target, node, after=node)
        self._write_back(chain, node)
        return True

    def _views_up_to_base(self, node: fx.Node) -> list[fx.Node]:
        """The node, the tensor it is a slice of, and so on, while slices are plain indexing."""
        chain = [node]
        while info(chain[-1]).op is SLICE and isinstance(chain[-1].args[0], fx.Node):
            parent = chain[-1].args[0]
            if self.recording.storages.get(parent) != self.recording.storages.get(node):
                break
            chain.append(parent)
        return chain

    def _write_back(self, chain: list[fx.Node], value: fx.Node) -> None:
        graph, last = self.recording.graph, value
        for view, base in pairwise(chain):
            if not self._read_after(base, value):
                continue
            record = info(base)
            with graph.inserting_after(last):
                updated = graph.create_node(
                    "call_function", QF.set_item, (base, view.args[1], last), {}, name=node_name(f"{base.name}_updated")
                )
            set_info(updated, NodeInfo(SET_ITEM, updated.name, record.module, info(value).source, record.value))
            self.position[updated] = self.position[value]
            self._register(updated, base)
            self._redirect(base, updated, after=value)
            last = updated

    def _redirect(self, old: fx.Node, new: fx.Node, *, after: fx.Node) -> None:
        limit = self.position[after]
        for user in list(old.users):
            if user is not new and self.position[user] > limit:
                user.replace_input_with(old, new)

    def _register(self, new: fx.Node, like: fx.Node) -> None:
        storage = self.recording.storages.get(like, 0)
        self.recording.storages[new] = storage
        self.aliases[storage].append(new)

    def _read_after(self, node: fx.Node, moment: fx.Node) -> bool:
        return any(self.position[user] > self.position[moment] for user in node.users)

    def _same_dtype(self, node: fx.Node, target: fx.Node) -> bool:
        """A pure operation promotes dtypes where an in-place one keeps its own."""
        own = info(target).value
        specs = [info(operand).value for operand in node.all_input_nodes]
        tensors = [spec for spec in specs if isinstance(spec, TensorSpec) and spec.shape]
        if not isinstance(own, TensorSpec) or info(node).op in (SET_ITEM, COPY_TO):
            return isinstance(own, TensorSpec)
        return all(spec.dtype in (own.dtype, torch.bool) for spec in tensors)

    def _make_pure(self, node: fx.Node) -> bool:
        """Gives the node the out-of-place spelling; False where there is none."""
        if node.op == "call_module":
            return self._make_module_pure(self.root.get_submodule(str(node.target)))
        if "out" in node.kwargs:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
            return True
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
            return True
        if node.op == "call_method":
            return _pure_method(node, str(node.target))
        if node.target is operator.setitem:
            node.target = QF.set_item
            base = node.args[0]
            value = info(base).value if isinstance(base, fx.Node) else None
            set_info(node, replace(info(node), op=SET_ITEM, value=value))
            return True
        return _pure_function(node)

    def _make_module_pure(self, module: nn.Module) -> bool:
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
            self.pure_modules.add(id(module))
        return id(module) in self.pure_modules


def _written_operand(write: Write) -> fx.Node | None:
    out = write.node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    first = write.node.args[0] if write.node.args else None
    return first if isinstance(first, fx.Node) else None


def _pure_method(node: fx.Node, name: str) -> bool:
    if name == "copy_":
        node.op, node.target = "call_function", QF.copy_to
        node.args, node.kwargs = node.args[:2], {}
        return True
    if name in ("zero_", "fill_"):
        value = node.args[1] if name == "fill_" else 0
        if isinstance(value, fx.Node):
            return False
        node.op, node.target = "call_function", torch.full_like
        node.args = (node.args[0], value)
        return True
    plain = name.rstrip("_") if not name.startswith("__") else name.replace("__i", "__", 1)
    if not name.endswith("_") or not hasattr(torch.Tensor, plain):
        return False
    node.target = plain
    return True


def _pure_function(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        packet = getattr(getattr(torch.ops, target.namespace), name.rstrip("_"), None)
        overload = getattr(packet, target._overloadname, None)
        if not name.endswith("_") or overload is None:
            return False
        node.target = overload
        return True
    name = getattr(target, "__name__", "")
    for namespace in (torch, torch.nn.functional):
        if name.endswith("_") and getattr(namespace, name, None) is target and hasattr(namespace, name[:-1]):
            node.target = getattr(namespace, name[:-1])
            return True
    return False
