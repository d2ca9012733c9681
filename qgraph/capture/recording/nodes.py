"""The nodes of one recording, and the tensors whose values they are.

A tensor carries the node that made it as a tag. What reaches an op without one is a parameter, a buffer, another view
of a tagged tensor, or a constant. A recording that repeats another checks at every node that it takes the same step.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qgraph.capture.model.names import SiteNames, tensor_paths
from qgraph.capture.model.source import user_line
from qgraph.capture.recording.record import TAG, Layout, Recording, Tag, layout_of
from qgraph.capture.recording.spelling import UNKNOWN, importable, plain
from qgraph.capture.sizes.expressions import CannotMerge
from qgraph.capture.sizes.tracked import SizeWatch, is_tracked
from qgraph.capture.values.layout import copy_tensor
from qgraph.capture.values.storage import storage_key
from qgraph.errors import CaptureError
from qgraph.ir.editor import node_name
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op_table import CONSTANT, ITEM
from qgraph.ir.values import TensorSpec, spec_of


@dataclass(frozen=True)
class Again:
    """A second run of a model that has been recorded, at another batch size: only sizes matter.

    Args:
        first: the recording; the second run must take the same steps.
        small: its batch size.
        large: the batch size of the second run.
        on_meta: whether the second run has no values.
        follow: whether to note what the forward does with sizes.
    """

    first: Recording
    small: int
    large: int
    on_meta: bool = False
    follow: bool = True


class RecordedNodes:
    """Makes nodes and finds those of tensors.

    Args:
        root: the module that runs.
        again: the recording that this one repeats.
    """

    def __init__(self, root: nn.Module, again: Again | None) -> None:
        self.root = root
        self.again = again
        self.recording = Recording(fx.Graph())
        self.names = SiteNames()
        self.depth = 0
        self.sizes: SizeWatch | None = None
        if again is not None and again.follow:
            self.sizes = SizeWatch(again.small, again.large, lambda: self.depth > 0)
        self._tensor_paths = tensor_paths(root)
        self._taken = frozenset(self._tensor_paths.values())
        self._attribute_nodes: dict[str, fx.Node] = {}
        self._constant_paths: dict[int, str] = {}
        self._views: dict[tuple[int, Layout], tuple[fx.Node, tuple[Any, ...]]] = {}
        self._twins: dict[fx.Node, fx.Node] = {}
        self._own: dict[fx.Node, fx.Node] = {}
        self._held: list[Any] = []

    def note_constant(self, tensor: torch.Tensor) -> None:
        """Hears of every tensor that becomes a constant."""

    def create(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None) -> fx.Node:
        """Adds a node.

        Raises:
            CannotMerge: the recording that this one repeats took another step here.
        """
        node = self.recording.graph.create_node(kind, target, args, kwargs, name=name)
        self._note_created(node)
        return node

    def _note_created(self, node: fx.Node) -> None:
        created = self.recording.created
        created.append(node)
        if self.again is None:
            return
        others = self.again.first.created
        other = others[len(created) - 1] if len(created) <= len(others) else None
        if other is None or not same_call(other, node):
            step = "more steps than before" if other is None else describe(other)
            raise CannotMerge(f"control flow depends on it: {step}, then {node.target} at {user_line()}")
        self._twins[node] = other
        self._own[other] = node

    # --- tensors -------------------------------------------------------------------------------------------

    def tag(self, tensor: torch.Tensor, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """From now on, `tensor` is the value of `node`, or its part at `path`."""
        self.recording.tag(tensor, node, path)
        self.place(tensor, node, path)

    def place(self, tensor: torch.Tensor, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Notes where the value of `node` lies in memory."""
        storage = storage_key(tensor)
        if not storage:
            return
        layout = layout_of(tensor)
        self._views[storage, layout] = node, path
        # Keeps the identity (not the memory) of the storage from being used again during the run.
        self._held.append(StorageWeakRef(tensor.untyped_storage()))
        if not path:
            self.recording.storages[node] = storage
            self.recording.layouts[node] = layout

    def meet(self, tensors: list[torch.Tensor]) -> None:
        """Notes tensors nobody announced before an op may write to them."""
        for tensor in tensors:
            if TAG not in tensor.__dict__ and id(tensor) not in self._tensor_paths:
                self.node_of(tensor)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node whose value `tensor` is; parameters, buffers and constants get one on first sight."""
        tag = tensor.__dict__.get(TAG)
        if tag is not None and tag.owner is self.recording:
            return self._part(tensor, tag.node, tag.path)
        path = self._tensor_paths.get(id(tensor)) or self._constant_paths.get(id(tensor))
        if path is None and tag is not None and self.again is not None and tag.owner is self.again.first:
            return self._part(tensor, self._adopt(tag), tag.path)
        if path is None:
            found = self._view_of(tensor)
            if found is not None:
                return self._part(tensor, *found)
            path = self._add_constant(tensor)
        known = self._attribute_nodes.get(path)
        return self._add_attribute(tensor, path) if known is None else known

    def _part(self, tensor: torch.Tensor, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        for key in path:
            node = self._item(node, key)
        if path or tensor.__dict__.get(TAG) is None:
            self.tag(tensor, node)
        return node

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        for user in node.users:
            if user.target is operator.getitem and info(user).op is ITEM and user.args[1] == key:
                return user
        record = info(node)
        with self.recording.graph.inserting_after(node):
            child = self.create("call_function", operator.getitem, (node, key), {}, f"{node.name}_{key}")
        value = record.value[key] if isinstance(record.value, tuple) and isinstance(key, int) else None
        set_info(child, NodeInfo(ITEM, f"{record.site}[{key}]", record.module, record.source, value))
        return child

    def _view_of(self, tensor: torch.Tensor) -> tuple[fx.Node, tuple[Any, ...]] | None:
        """The value that shows exactly the same memory: wrapping a tensor makes an object without a tag."""
        storage = storage_key(tensor)
        if not storage:
            return None
        layout = layout_of(tensor)
        return self._views.get((storage, layout))

    def _adopt(self, tag: Tag) -> fx.Node:
        """The steps to a tensor that the first run left in a cache of the user's, as if they were made again."""

        def twin(node: fx.Node) -> fx.Node:
            if node not in self._own:
                args, kwargs = fx.node.map_arg(node.args, twin), fx.node.map_arg(node.kwargs, twin)
                set_info(self.create(node.op, node.target, args, kwargs), info(node))
            return self._own[node]

        assert tag.node is not None
        return twin(tag.node)

    def _add_attribute(self, tensor: torch.Tensor, path: str) -> fx.Node:
        target = importable(self.root, path)
        node = self.create("get_attr", target, (), {}, node_name(path))
        set_info(node, NodeInfo(CONSTANT, path, path.rpartition(".")[0], value=spec_of(tensor)))
        self._attribute_nodes[path] = node
        self.place(tensor, node)
        return node

    def _add_constant(self, tensor: torch.Tensor) -> str:
        self.note_constant(tensor)
        owner = f"{self.names.owner}." if self.names.owner else ""
        path, counter = "", 0
        while not path or path in self.recording.constants or path in self._taken:
            path, counter = f"{owner}_constant_{counter}", counter + 1
        self.recording.constants[path] = copy_tensor(tensor)  # the forward may write to it later
        self._constant_paths[id(tensor)] = path
        self._held.append(tensor)  # or another tensor could get its id
        return path

    def argument(self, value: Any) -> Any:
        """`value` as a graph argument: tensors become nodes, containers keep their kind.

        Raises:
            CaptureError: a value that no graph can hold.
        """
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if is_tracked(value):
            return value
        if isinstance(value, (tuple, list)):
            entries = [self.argument(entry) for entry in value]
            return entries if isinstance(value, list) else tuple(entries)
        if isinstance(value, dict):
            return {key: self.argument(entry) for key, entry in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, range):
            return list(value)
        kept = plain(value)
        if kept is UNKNOWN:
            raise CaptureError(
                f"an argument of type {type(value).__name__} cannot be kept in a graph",
                where=str(user_line()),
                why="graphs hold tensors, numbers, strings, dtypes, devices and containers of these",
                fix="pass its parts as tensors or numbers, or make the module that uses it a leaf (leaf_modules=)",
            )
        return kept

    # --- sizes ---------------------------------------------------------------------------------------------

    def sizes_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The tensor's shape; sizes that depend on the batch are tracked.

        Raises:
            CannotMerge: the number of dimensions depends on the batch.
        """
        shape = tuple(tensor.shape)
        tag = tensor.__dict__.get(TAG)
        if self.sizes is None or tag is None or tag.owner is not self.recording:
            return shape
        twin = self._twins[tag.node]
        spec: Any = info(twin).value
        for key in tag.path:
            spec = spec[key] if isinstance(spec, tuple) and isinstance(key, int) and key < len(spec) else None
        if not isinstance(spec, TensorSpec):
            return shape
        if len(spec.shape) != len(shape):
            raise CannotMerge(f"the number of dimensions depends on it at {user_line()}")
        measured = None if tag.path else twin
        pairs = enumerate(zip(spec.shape, shape, strict=True))
        return tuple(self.sizes.size(one, two, measured, axis) for axis, (one, two) in pairs)


def same_call(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes of two recordings call the same thing."""
    if node.op != other.op:
        return False
    if node.target == other.target:
        return True
    # Builders of output structures are made anew in each recording.
    return getattr(node.target, "kind", node) is getattr(other.target, "kind", other)


def describe(node: fx.Node) -> str:
    """Site and line of a node, for a message."""
    record = info(node)
    return f"{record.site} ({record.source})" if record.source else record.site
