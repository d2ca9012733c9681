"""The one way to change a graph.

fx's own tools drop custom metadata, so every node is created, replaced and erased here: the editor carries the
record over, keeps track of which captured nodes a new one stands for, counts changes and tells listeners.

Invariants:
- every node it creates has a `NodeInfo`;
- `changes` counts what alters the computation, `annotations` what only alters records.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.errors import InternalError, PassError
from qgraph.ir.arguments import Bound
from qgraph.ir.copying import is_container, own_child
from qgraph.ir.node_info import NodeInfo, info, set_info, tensor_at, where
from qgraph.ir.op import Op
from qgraph.ir.op_table import CONSTANT
from qgraph.ir.values import spec_of


@dataclass
class EditListener:
    """Callbacks an editor makes; each defaults to nothing."""

    created: Callable[[fx.Node], None] = lambda node: None
    erased: Callable[[fx.Node], None] = lambda node: None
    changed: Callable[[fx.Node], None] = lambda node: None
    replaced: Callable[[fx.Node, fx.Node], None] = lambda old, new: None


@dataclass
class Editor:
    """Edits one graph on behalf of one pass.

    Args:
        gm: the module whose graph is edited in place.
        author: name of the pass, kept on every node it creates.
    """

    gm: fx.GraphModule
    author: str
    changes: int = 0
    annotations: int = 0
    listeners: list[EditListener] = field(default_factory=list)
    _names: set[str] | None = field(default=None, repr=False)

    @property
    def graph(self) -> fx.Graph:
        """The graph being edited."""
        return self.gm.graph

    # --- creating ------------------------------------------------------------------------------------------

    def call(
        self,
        op: Op,
        *operands: Any,
        like: fx.Node,
        site: str | None = None,
        before: fx.Node | None = None,
        **options: Any,
    ) -> fx.Node:
        """A call of `op`'s canonical function.

        Args:
            operands: nodes, tuples of nodes or numbers, in the operator's order.
            like: the node whose record (source, module, shapes) the new one inherits.
            site: the new node's site; `like`'s own if not given.
            before: where to insert; before `like` if not given.
            options: those that differ from the default.

        Raises:
            InternalError: the operator has no canonical function.
        """
        if op.target is None:
            raise InternalError(f"operator {op} has no function to call")
        unknown = [name for name in options if name not in op.signature.parameters]
        if unknown:
            raise InternalError(f"operator {op} has no option {unknown}")
        return self._create("call_function", op.target, operands, options, op, like, site, before)

    def call_function(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        op: Op,
        like: fx.Node,
        site: str | None = None,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """A call of any function, recorded as `op`; arguments as for `call`."""
        return self._create("call_function", target, args, kwargs or {}, op, like, site, before)

    def call_module(
        self,
        path: str,
        *args: Any,
        op: Op,
        like: fx.Node,
        site: str | None = None,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """A call of the module at `path`, which must exist; arguments as for `call`."""
        return self._create("call_module", path, args, {}, op, like, site, before)

    def constant(self, tensor: torch.Tensor, *, path: str, like: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """A node that reads `tensor`, kept as a buffer at `path` (made unique)."""
        unique = self.add_tensor(path, tensor)
        node = self._create("get_attr", unique, (), {}, CONSTANT, like, unique, before)
        record = info(like)
        set_info(
            node, NodeInfo(CONSTANT, unique, record.module, record.source, spec_of(tensor), created_by=self.author)
        )
        return node

    def held(self, path: str, *, like: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """A node that reads the tensor a module of the graph holds at `path`."""
        node = self._create("get_attr", path, (), {}, CONSTANT, like, path, before)
        record = info(like)
        value = spec_of(tensor_at(self.gm, path))
        set_info(node, NodeInfo(CONSTANT, path, record.module, record.source, value, created_by=self.author))
        return node

    def _create(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        op: Op,
        like: fx.Node,
        site: str | None,
        before: fx.Node | None,
    ) -> fx.Node:
        record = info(like)
        with self.graph.inserting_before(before or like):
            node = self.graph.create_node(kind, target, tuple(args), dict(kwargs), name=node_name(site or record.site))
        set_info(
            node,
            replace(
                record,
                op=op,
                site=site or record.site,
                origins=record.stands_for if site is None else (),
                created_by=self.author,
                in_place=False,
                random=record.random if site is None else False,
                unstable=False,
                inner=record.inner if site is None else False,
                plan=record.plan if site is None else None,
                weight_plan=record.weight_plan if site is None else None,
                value=record.value if site is None else None,
            ),
        )
        self.changes += 1
        if self._names is not None:
            self._names.add(node.name)
        for listener in self.listeners:
            listener.created(node)
        return node

    # --- modules and tensors -------------------------------------------------------------------------------

    def set_module(self, path: str, module: nn.Module) -> None:
        """Puts `module` at the dotted `path`, making empty parents where they are missing."""
        parent_path, _, name = path.rpartition(".")
        parent: nn.Module = self.gm
        shared = False
        for part in parent_path.split(".") if parent_path else ():
            if getattr(parent, part, None) is None:
                parent.add_module(part, nn.Module().train(self.gm.training))
            if part not in parent._modules:
                raise InternalError(f"{parent_path!r} is not a module")
            parent, shared = own_child(parent, part, shared=shared)
        if name in parent.__dict__:
            del parent.__dict__[name]
        parent.add_module(name, module)
        self.changes += 1

    def add_tensor(self, path: str, tensor: torch.Tensor) -> str:
        """Keeps `tensor` at `path`, made unique, as a parameter if it is one, else as a buffer; returns the path."""
        path = self._held_path(path)
        parent_path, _, name = path.rpartition(".")
        if parent_path and not self._exists(parent_path):
            self.set_module(parent_path, nn.Module().train(self.gm.training))
        parent = self.gm.get_submodule(parent_path)
        unique, counter = name, 0
        while hasattr(parent, unique):
            counter += 1
            unique = f"{name}_{counter}"
        if isinstance(tensor, nn.Parameter):
            parent.register_parameter(unique, tensor)
        else:
            parent.register_buffer(unique, tensor)
        self.changes += 1
        return f"{parent_path}.{unique}" if parent_path else unique

    def free_path(self, path: str) -> str:
        """`path`, or `path_1`, `path_2`, ...: the first that is not taken; never inside a module of the model."""
        path = self._held_path(path)
        unique, counter = path, 0
        while self._exists(unique):
            counter += 1
            unique = f"{path}_{counter}"
        return unique

    def _held_path(self, path: str) -> str:
        """`path`, with `_` for `.` from a module of the model or a tensor on: those are not ours to extend."""
        current: object = self.gm
        parts = path.split(".")
        for depth, part in enumerate(parts[:-1]):
            current = getattr(current, part, None)
            if current is None:
                return path
            if not is_container(current):
                return ".".join([*parts[:depth], "_".join(parts[depth:])])
        return path

    def _exists(self, path: str) -> bool:
        current: object = self.gm
        for part in path.split("."):
            if not hasattr(current, part):
                return False
            current = getattr(current, part)
        return True

    # --- changing ------------------------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node, *, absorbs: Iterable[fx.Node] = ()) -> None:
        """Every user of `old` reads `new` instead, and `old` is erased.

        Args:
            absorbs: further nodes whose work `new` does; their sites join its origins. They are not erased.
        """
        old.replace_all_uses_with(new)
        record = info(new)
        members = [*absorbs, old]
        origins = dict.fromkeys(
            site for node in (new, *members) if node is not new or record.origins for site in info(node).stands_for
        )
        if tuple(origins) != (record.site,):
            set_info(new, replace(record, origins=tuple(origins)))
        self.changes += 1
        for listener in self.listeners:
            listener.replaced(old, new)
        self.erase(old)

    def bypass(self, node: fx.Node, value: fx.Node) -> None:
        """Every user of `node` reads `value`, which computes the same; `node` is erased."""
        node.replace_all_uses_with(value)
        for user in list(value.users):
            self._notify_changed(user)
        self.erase(node)

    def absorb(self, node: fx.Node, into: fx.Node) -> None:
        """`into` now computes what `node` did from it: it takes over `node`'s users, shape and origins; `node` goes."""
        record = info(into)
        origins = tuple(dict.fromkeys((*record.stands_for, *info(node).stands_for)))
        set_info(into, replace(record, origins=origins, value=info(node).value))
        self.bypass(node, into)
        self._notify_changed(into)

    def move_before(self, node: fx.Node, other: fx.Node) -> None:
        """Executes `node` right before `other`; its operands must come earlier still."""
        other.prepend(node)
        self.changes += 1

    def replace_input(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """`user` reads `new` wherever it read `old`."""
        user.replace_input_with(old, new)
        self.changes += 1
        self._notify_changed(user)

    def set_arguments(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Gives `node` other arguments."""
        node.args = args
        node.kwargs = dict(kwargs or {})
        self.changes += 1
        self._notify_changed(node)

    def respell(
        self,
        node: fx.Node,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        op: Op | None = None,
    ) -> None:
        """Makes `node` compute its value another way, under its name and site."""
        node.op, node.target = kind, target
        node.args, node.kwargs = args, dict(kwargs or {})
        if op is not None:
            set_info(node, replace(info(node), op=op))
        self.changes += 1
        self._notify_changed(node)

    def rename(self, node: fx.Node) -> None:
        """Names the node after its site, if no other node has that name."""
        if self._names is None:
            self._names = {other.name for other in self.graph.nodes}
        wanted = node_name(info(node).site)
        if wanted not in self._names:
            self._names.discard(node.name)
            node.name = wanted
            self._names.add(wanted)

    def erase(self, node: fx.Node) -> None:
        """Removes a node without users.

        Raises:
            PassError: it still has users.
        """
        if node.users:
            raise PassError(
                f"{self.author} erased a node that is still used",
                where=where(node),
                why=f"used by {', '.join(user.name for user in node.users)}",
                fix="replace its users first",
            )
        self.graph.erase_node(node)
        if self._names is not None:
            self._names.discard(node.name)
        self.changes += 1
        for listener in self.listeners:
            listener.erased(node)

    def annotate(self, node: fx.Node, **changes: Any) -> None:
        """Replaces fields of the node's record; the computation stays as it is."""
        set_info(node, replace(info(node), **changes))
        self.annotations += 1

    def _notify_changed(self, node: fx.Node) -> None:
        for listener in self.listeners:
            listener.changed(node)


def canonical_arguments(bound: Bound) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leading operands by position (absent ones at the end dropped), everything else that is not a default by name.

    Sequences of operands are lists and sequences of options tuples, whichever the user wrote.
    """
    op = bound.op
    if op.target is operator.getitem:  # takes nothing by name
        return (bound.operand("input"), bound.option("index")), {}
    if op.canonical is not None:
        bound = replace(bound, values={**bound.values, **op.canonical(bound.values)})
    args: list[Any] = []
    for name in op.signature.parameters:
        if name not in op.operands:
            break
        value = bound.operand(name)
        args.append(list(value) if isinstance(value, tuple) else value)
    leading = tuple(op.signature.parameters)[: len(args)]
    while args and args[-1] is None and op.default(leading[len(args) - 1]) is None:
        args.pop()
    leading = leading[: len(args)]
    rest = {name: bound.operand(name) for name in op.operands if name not in leading}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in bound.options().items()}
    return tuple(args), {name: value for name, value in rest.items() if value is not None} | options


def node_name(site: str) -> str:
    """A legal fx node name that resembles `site`."""
    cleaned = "".join(letter if letter.isalnum() else "_" for letter in site).strip("_") or "value"
    return f"n{cleaned}" if cleaned[0].isdigit() else cleaned
