"""Making in-place operations safe: a graph of values, not of memory.

A storage that the forward writes to is seen as regions: the tensor that came first, slices of it, slices of these.
Every write becomes a pure operation that gives its region a new value; the value goes into the regions around it by
`set_item`, and regions that overlap are cut anew when they are read next. Where that is not possible the storage stays
as it is, with all its writes: its nodes are marked, and no rule touches them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.recording.record import Recording, Write
from qgraph.capture.recording.spelling import name_of
from qgraph.capture.writes.pure import Change, pure_form
from qgraph.ir import functional as QF
from qgraph.ir.editor import node_name
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op_table import OPAQUE, SET_ITEM, SIZE, SLICE
from qgraph.ir.values import TensorSpec


@dataclass(eq=False)
class _Region:
    """A part of a storage that tensors show.

    Args:
        storage: the storage.
        parent: the region it was cut from; None for the whole.
        view: the node that cut it.
        source: the node it was cut from.
        value: the node whose value it holds now.
        stale: whether it was written to through another region since.
        version: how often its value has changed.
    """

    storage: _Storage
    parent: _Region | None
    view: fx.Node
    source: fx.Node | None
    value: fx.Node
    stale: bool = False
    version: int = 0

    def outwards(self) -> Iterator[_Region]:
        """The regions around it, innermost first."""
        region = self.parent
        while region is not None:
            yield region
            region = region.parent


@dataclass
class _Storage:
    """A storage that is written to: its regions, and the nodes that show them.

    Args:
        key: its identity; negative for what follows a write after which nobody reads older values: made pure, that
            write gives memory of its own, whatever becomes of later writes.
        before: the storage that such a write is the last one to.
    """

    key: int
    before: _Storage | None = None
    regions: list[_Region] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    blocked: bool = False


class InPlaceRemover:
    """Works through one recording in execution order."""

    def __init__(self, root: nn.Module, recording: Recording) -> None:
        self.root = root
        self.recording = recording
        self.storages: dict[int, _Storage] = {}
        self.writes: dict[fx.Node, list[Write]] = defaultdict(list)
        self.region: dict[fx.Node, _Region] = {}
        self.version: dict[fx.Node, int] = {}
        self.forms: dict[fx.Node, Change] = {}
        self.added: list[fx.Node] = []
        self.keys = dict(recording.storages)
        self.order = {node: position for position, node in enumerate(recording.graph.nodes)}
        for write in recording.writes:
            self.writes[write.node].append(write)
            self.storages.setdefault(write.storage, _Storage(write.storage)).writes.append(write)

    def run(self) -> None:
        """Rewrites the recording's graph."""
        if not self.storages:
            return
        self._find_nodes()
        for storage in list(self.storages.values()):
            if storage.key and storage.key not in self.recording.state:
                self._cut(storage)
        for node in self.recording.graph.nodes:
            found = self.storages.get(self.keys.get(node, 0))
            if found is not None:
                self._find_region(found, node)
        self._block()
        self.recording.reads_layout |= self._sharing_depends_on_layout()
        for node in list(self.recording.graph.nodes):
            self._rewrite(node)
        for node in reversed(self.added):
            if not node.users:
                self.recording.graph.erase_node(node)
        for storage in self.storages.values():
            if storage.blocked:
                self._leave(storage)

    # --- what there is -------------------------------------------------------------------------------------

    def _find_nodes(self) -> None:
        for node in self.recording.graph.nodes:
            storage = self.storages.get(self.keys.get(node, 0))
            if storage is not None:
                storage.nodes.append(node)

    def _cut(self, storage: _Storage) -> None:
        """Divides a storage at writes after which nobody reads what came before."""
        last_read = 0
        for position, node in enumerate(storage.nodes):
            here = self.order[node]
            writes = self.writes.get(node, ())
            whole = bool(position) and self.recording.layouts[node] == self.recording.layouts[storage.nodes[0]]
            if whole and len(writes) == 1 and last_read <= here:
                self._divide(storage, position, writes[0])
                return
            last_read = max(last_read, *(self.order[user] for user in node.users), 0)

    def _divide(self, storage: _Storage, position: int, write: Write) -> None:
        rest = _Storage(-1 - len(self.storages), storage)
        self.storages[rest.key] = rest
        rest.nodes, storage.nodes = storage.nodes[position:], storage.nodes[:position]
        self.keys.update(dict.fromkeys(rest.nodes, rest.key))
        last = storage.writes.index(write) + 1
        later, storage.writes = storage.writes[last:], storage.writes[:last]
        rest.writes = [replace(one, storage=rest.key) for one in later]
        for old, new in zip(later, rest.writes, strict=True):
            self.writes[old.node] = [new if one is old else one for one in self.writes[old.node]]
        self._cut(rest)

    def _find_region(self, storage: _Storage, node: fx.Node) -> None:
        own = [write.target for write in self.writes.get(node, ()) if write.storage == storage.key]
        if own:
            found = self.region.get(own[0])
            if found is not None:
                self.region[node] = found
            return
        aliases = [other for other in node.all_input_nodes if other in self.region and self._stored(other, storage)]
        layouts = self.recording.layouts
        if aliases and layouts.get(aliases[0]) == layouts[node]:
            self.region[node] = self.region[aliases[0]]
        elif aliases or not storage.regions:
            parent, source = (self.region[aliases[0]], aliases[0]) if aliases else (None, None)
            self.region[node] = region = _Region(storage, parent, node, source, node)
            storage.regions.append(region)
        else:
            storage.blocked = True  # shows the memory in a way that cannot be followed

    def _sharing_depends_on_layout(self) -> bool:
        """Whether other values see a write, or do not, because a call like `contiguous` did not copy, or did."""
        order, storages = self.order, self.recording.storages
        writes: dict[int, list[int]] = defaultdict(list)
        last_read: dict[int, int] = {}
        for write in self.recording.writes:
            writes[write.storage].append(order[write.node])
        for node, storage in storages.items():
            last_read[storage] = max([last_read.get(storage, -1), *(order[user] for user in node.users)])
        for node in self.recording.graph.nodes:
            own = storages.get(node)
            if own is None or not _may_copy(self.root, node):
                continue
            other = storages.get(node.all_input_nodes[0], own)
            for written, seen in ((own, other), (other, own)):
                later = [place for place in writes.get(written, ()) if place > order[node]]
                if later and (own == other or last_read[seen] > later[0]):
                    return True
        return False

    def _stored(self, node: fx.Node, storage: _Storage) -> bool:
        return self.keys.get(node) == storage.key

    def _block(self) -> None:
        """Finds the storages that must stay; a write or a module that serves several ties them together."""
        for storage in self.storages.values():
            storage.blocked |= (
                storage.key == 0
                or storage.key in self.recording.state
                or not all(self._can_be_pure(write) for write in storage.writes)
            )
        ties = self._ties()
        pieces = [storage for storage in self.storages.values() if storage.before is not None]
        changed = True
        while changed:
            changed = False
            for piece in pieces:
                if piece.before is not None and piece.before.blocked and not piece.blocked:
                    changed = piece.blocked = True
            for tied in ties:
                if any(storage.blocked for storage in tied) and not all(storage.blocked for storage in tied):
                    changed = True
                    for storage in tied:
                        storage.blocked = True

    def _ties(self) -> list[list[_Storage]]:
        by_module: dict[int, list[_Storage]] = defaultdict(list)
        for node, writes in self.writes.items():
            if node.op == "call_module":
                module = self.root.get_submodule(str(node.target))
                by_module[id(module)] += [self.storages[write.storage] for write in writes]
        return [*by_module.values()]

    def _can_be_pure(self, write: Write) -> bool:
        node, target = write.node, _written_operand(write)
        if target is None or len(self.writes[node]) > 1 or self.region.get(target) is not self.region.get(write.target):
            return False
        region = self.region.get(target)
        if region is None or not all(_is_slice(inner) for inner in (region, *region.outwards()) if inner.parent):
            return False
        form = pure_form(self.root, node, target)
        if form is None or not self._same_layout(node, target, region):
            return False
        self.forms[node] = form
        return True

    def _same_layout(self, node: fx.Node, target: fx.Node, region: _Region) -> bool:
        """Whether the write leaves the tensor's shape as it was; a whole tensor may be given a new one by `out=`."""
        layouts = self.recording.layouts
        if node not in layouts or layouts[node] == layouts[target]:
            return True
        alone = region.parent is None and len(region.storage.regions) == 1
        return "out" in node.kwargs and alone

    # --- what becomes of it --------------------------------------------------------------------------------

    def _rewrite(self, node: fx.Node) -> None:
        if info(node).op is SIZE:  # sizes do not change
            return
        for used in node.all_input_nodes:
            region = self._live_region(used)
            if region is not None and (region.stale or region.version != self.version[used]):
                node.replace_input_with(used, self._fresh(region, node))
        writes = self.writes.get(node, ())
        region = self._live_region(writes[0].target if writes else node)
        if region is None:
            return
        if writes:
            own = self.region.get(node)
            self._write(node, region)
            if own is not None and own.view is node:  # the first value of what follows this write
                self.region[node], self.version[node] = own, own.version
        elif region.view is node:
            region.source = node.args[0] if region.parent is not None and isinstance(node.args[0], fx.Node) else None
            self.version[node] = region.version
        else:  # the same tensor under another name
            region.value = node
            self.version[node] = region.version

    def _live_region(self, node: fx.Node) -> _Region | None:
        region = self.region.get(node)
        return None if region is None or region.storage.blocked else region

    def _fresh(self, region: _Region, user: fx.Node) -> fx.Node:
        """The node that holds the region's value now, cut anew from the region around it if need be."""
        if not region.stale:
            return region.value
        assert region.parent is not None
        source, whole = region.source, self._fresh(region.parent, user)
        with self.recording.graph.inserting_before(user):
            node = self.recording.graph.node_copy(region.view, lambda old: whole if old is source else old)
        set_info(node, replace(info(region.view), site=node.name))
        self._hold(region, node)
        self.added.append(node)
        return node

    def _hold(self, region: _Region, node: fx.Node) -> None:
        region.value, region.stale = node, False
        region.version += 1
        self.region[node] = region
        self.version[node] = region.version

    def _write(self, node: fx.Node, region: _Region) -> None:
        around = [(outer, self._fresh(outer, node)) for outer in region.outwards()]
        self.forms[node]()
        value = info(node).value
        value = value if isinstance(value, TensorSpec) else info(region.value).value  # `x[0] = y` gives None
        set_info(node, replace(info(node), in_place=False, value=value))
        held = {region}
        self._hold(region, node)
        inner, last = region, node
        for outer, whole in around:
            last = self._set(whole, inner.view.args[1], last, node)
            self._hold(outer, last)
            held.add(outer)
            inner = outer
        for other in region.storage.regions:
            other.stale |= other not in held

    def _set(self, whole: fx.Node, index: Any, part: fx.Node, write: fx.Node) -> fx.Node:
        graph, record = self.recording.graph, info(whole)
        with graph.inserting_after(part):
            name = node_name(f"{whole.name}_updated")
            node = graph.create_node("call_function", QF.set_item, (whole, index, part), {}, name=name)
        set_info(node, NodeInfo(SET_ITEM, node.name, record.module, info(write).source, record.value))
        self.added.append(node)
        return node

    def _leave(self, storage: _Storage) -> None:
        """Marks what stays in memory; a constant is copied, or the next run would find it changed."""
        for node in storage.nodes:
            set_info(node, replace(info(node), unstable=True))
            if node.op == "get_attr" and str(node.target) in self.recording.constants:
                with self.recording.graph.inserting_after(node):
                    copy = self.recording.graph.create_node("call_function", torch.clone, (node,), {})
                set_info(copy, replace(info(node), op=OPAQUE, site=copy.name))
                for user in list(node.users):
                    if user is not copy:
                        user.replace_input_with(node, copy)


def _may_copy(root: nn.Module, node: fx.Node) -> bool:
    """Whether the call shows its operand's memory or copies it, as that happens to lie."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), nn.Flatten)
    return (node.target if isinstance(node.target, str) else name_of(node.target)) in _MAY_COPY


_MAY_COPY = frozenset({"contiguous", "reshape", "reshape_as", "flatten", "ravel"})


def _is_slice(region: _Region) -> bool:
    return info(region.view).op is SLICE


def _written_operand(write: Write) -> fx.Node | None:
    out = write.node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    first = write.node.args[0] if write.node.args else None
    return first if isinstance(first, fx.Node) else None
