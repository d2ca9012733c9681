"""Capture by `torch.export`: the forward runs on symbolic sizes, and every operator arrives in its aten spelling.

Export takes modules apart. Leaf modules are put together again: while it traces, their inputs and outputs pass through
a marking operator, and what lies between the marks becomes one call of the module. The graph is then run on the example
inputs, as one of symbolic tracing is. Other sites get the path of their module from `nn_module_stack`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from qgraph.capture.boundary.outputs import output_argument
from qgraph.capture.model.blocks import refusing_blocks
from qgraph.capture.model.names import Scope, SiteNames, walk_modules
from qgraph.capture.model.source import line_of_error
from qgraph.capture.options.request import Request
from qgraph.capture.recording.aten import users_spelling
from qgraph.capture.recording.record import Recording
from qgraph.capture.recording.spelling import importable
from qgraph.capture.recording.symbolic import ObservingRecorder, observe_graph, source_of
from qgraph.capture.values.layout import copy_tensor
from qgraph.capture.values.structure import Inputs, leaves, map_leaves
from qgraph.capture.values.variants import BatchChoice, batch_choices, tensor_places, with_batch
from qgraph.errors import CaptureError
from qgraph.ir.arguments import classify, writes_in_place
from qgraph.ir.editor import node_name
from qgraph.ir.functional import field as get_field
from qgraph.ir.functional import item as get_item
from qgraph.ir.node_info import NodeInfo, has_info, set_info
from qgraph.ir.op_table import FIELD, INPUT, ITEM, OPAQUE, OUTPUT

_PREFIX = "model"
_CALL_NUMBER = re.compile(r"@\d+")
_ENTER, _LEAVE = 0, 1
_FACTOR = 3  # export takes a size of 1 for a constant
# "2 <= size" and the like: what export knows of every size, not what the forward asks.
_PLAIN_BOUND = re.compile(
    r"L\['[^']+'\](\[\d+\])?\.size\(\)\[0\] (>=|<=) \d+|\d+ (<=|>=|<) L\['[^']+'\](\[\d+\])?\.size\(\)\[0\]"
)

_LIBRARY = torch.library.Library("qgraph_capture", "DEF")  # lives as long as its operators are used
_LIBRARY.define("mark(Tensor x, int call, int side, int place) -> Tensor")
_LIBRARY.impl("mark", lambda x, call, side, place: x.clone(), "CompositeExplicitAutograd")


def _fake_mark(x: torch.Tensor, call: int, side: int, place: int) -> torch.Tensor:
    return torch.empty_like(x)


torch.library.register_fake("qgraph_capture::mark", _fake_mark, lib=_LIBRARY)


@dataclass
class _LeafCall:
    """One call of a leaf module: its path, and arguments and result in which marked tensors stand for themselves."""

    path: str
    args: Any
    kwargs: Any
    result: Any = None


@dataclass
class _Run:
    """What one run of the forward left for the time after the export."""

    calls: list[_LeafCall] = field(default_factory=list)
    output: Any = None
    inside: bool = False


class _Marked:
    """Stands for a marked tensor in the arguments or the result of a leaf's call; no dataclass, which has parts."""

    def __init__(self, place: int) -> None:
        self.place = place


class _Flat(nn.Module):
    """The model as a function of tensors alone: other inputs and the output's structure are kept aside."""

    def __init__(self, model: nn.Module, request: Request, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.request = request
        self.inputs = inputs
        self.run = _Run()

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        self.run.calls.clear()
        given = iter(tensors)
        inputs = {
            name: map_leaves(lambda leaf: next(given) if isinstance(leaf, torch.Tensor) else leaf, value)
            for name, value in self.inputs.items()
        }
        args, kwargs = self.request.arguments(inputs)
        self.run.output = self.model(*args, **kwargs)
        return [leaf for _, leaf in leaves(self.run.output) if isinstance(leaf, torch.Tensor)]


def record_export(request: Request, root: nn.Module, inputs: Inputs) -> Recording:
    """Exports `root`, a copy of the model, and annotates the graph from one run on `inputs`.

    Raises:
        CaptureError: torch.export cannot export the model; the message carries its reason and the user's line.
    """
    run, program = _exported(request, root, inputs)
    graph = _Translation(root, inputs, run, program).graph
    gm = fx.GraphModule(root, graph)
    names = _name_sites(gm)
    recorder = ObservingRecorder(root, request.leaf, protected=not request.writable)
    recording = observe_graph(gm, recorder, inputs, names.notes())
    guards = [guard for guard in getattr(program, "_guards_code", ()) if not _PLAIN_BOUND.fullmatch(guard)]
    recording.size_guards = tuple(guard for guard in guards if ".size()[0]" in guard)
    return recording


def _exported(request: Request, root: nn.Module, inputs: Inputs) -> tuple[_Run, ExportedProgram]:
    choice = next(iter(batch_choices(inputs)), None)
    given = inputs if choice is None else with_batch(inputs, choice, _FACTOR, seed=4)
    flat = _Flat(root, request, given)
    tensors = tuple(tensor for _, tensor in tensor_places(given))
    try:
        with torch.no_grad(), _marked_leaves(root, request, flat.run), refusing_blocks("export"):
            program = export(flat, tensors, dynamic_shapes=(_free_sizes(given, choice),), strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot export {request.name}",
            where=line_of_error(error),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error}",
            fix='use method="jit", or change what torch.export refuses',
        ) from error
    return flat.run, program


def _free_sizes(inputs: Inputs, choice: BatchChoice | None) -> tuple[Any, ...]:
    batched = set(choice.places) if choice else set()
    return tuple({0: Dim.AUTO} if place in batched else None for place, _ in tensor_places(inputs))


@contextmanager
def _marked_leaves(root: nn.Module, request: Request, run: _Run) -> Iterator[None]:
    """Leaf modules mark what goes in and comes out."""
    changed: list[nn.Module] = []
    try:
        for path, module in walk_modules(root):
            if not path or not request.leaf(module, path):
                continue
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                raise CaptureError(
                    "torch.export cannot keep a module with hooks as one node",
                    where=path,
                    why="the hooks run in the export and would run again in the node",
                    fix='use method="jit", or do not name the module in leaf_modules',
                )
            module.__dict__["forward"] = _marking(path, module.forward, run)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _marking(path: str, forward: Callable[..., Any], run: _Run) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        if run.inside:
            return forward(*args, **kwargs)
        number = len(run.calls)
        (args, kwargs), kept = _mark((args, kwargs), number, _ENTER)
        call = _LeafCall(path, *kept)
        run.calls.append(call)
        run.inside = True
        try:
            result = forward(*args, **kwargs)
        finally:
            run.inside = False
        result, call.result = _mark(result, number, _LEAVE)
        return result

    return marked


def _mark(value: Any, call: int, side: int) -> tuple[Any, Any]:
    """`value` with every tensor marked, and with a placeholder for every tensor."""
    count = 0

    def mark(leaf: Any) -> Any:
        nonlocal count
        if not isinstance(leaf, torch.Tensor):
            return leaf
        count += 1
        return torch.ops.qgraph_capture.mark(leaf, call, side, count - 1)

    marked = map_leaves(mark, value)
    places = iter(range(count))
    return marked, map_leaves(lambda leaf: _Marked(next(places)) if isinstance(leaf, torch.Tensor) else leaf, value)


class _Translation:
    """The exported graph over the root's own names: inputs in their structure, leaves as calls of modules."""

    def __init__(self, root: nn.Module, inputs: Inputs, run: _Run, program: ExportedProgram) -> None:
        self.root = root
        self.run = run
        self.graph = fx.Graph()
        self.twins: dict[fx.Node, Any] = {}
        self.entered: dict[int, dict[int, fx.Node]] = {}
        self.results: dict[int, fx.Node] = {}
        tensors = iter(self._inputs(inputs))
        signature = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = signature[node.name]
                self.twins[node] = next(tensors) if spec.kind is InputKind.USER_INPUT else self._held(spec, program)
            elif node.op == "output":
                self._output(node)
            else:
                self._call(node)
        self._drop_unused()

    def _inputs(self, inputs: Inputs) -> list[fx.Node]:
        found = []
        for name in inputs:
            root = self.graph.placeholder(name)
            set_info(root, NodeInfo(INPUT, name))
        by_name = {str(node.target): node for node in self.graph.nodes}
        for (name, path), _ in tensor_places(inputs):
            node = by_name[name]
            for step, key in path:
                function, op = (get_item, ITEM) if step == "item" else (get_field, FIELD)
                node = self.graph.call_function(function, (node, key))
                set_info(node, NodeInfo(op, node.name))
            found.append(node)
        return found

    def _held(self, spec: Any, program: ExportedProgram) -> fx.Node | None:
        path = str(spec.target).removeprefix(f"{_PREFIX}.")
        if spec.kind is InputKind.CONSTANT_TENSOR and not isinstance(_attribute(self.root, path), torch.Tensor):
            path = path.replace(".", "_")
            while hasattr(self.root, path):
                path += "_"
            setattr(self.root, path, copy_tensor(program.constants[str(spec.target)]))  # made in the forward
        return self.graph.get_attr(importable(self.root, path))

    def _call(self, node: fx.Node) -> None:
        if node.target is torch.ops.qgraph_capture.mark.default:
            self._marked(node)
        elif node.target is torch.ops.aten.detach_.default:
            self.twins[node] = self.twins[node.args[0]]  # type: ignore[index]
        elif node.target is not torch.ops.aten._assert_tensor_metadata.default:  # dtypes follow from the inputs'
            self._copy(node)

    def _copy(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda used: self.twins[used])
        call = (
            users_spelling(node.target, args, kwargs)
            if node.op == "call_function"
            else (node.op, node.target, args, kwargs)
        )
        self.twins[node] = self.graph.create_node(*call)
        self.twins[node].meta.update(node.meta)

    def _marked(self, node: fx.Node) -> None:
        source, number, side, place = node.args
        assert isinstance(number, int)
        assert isinstance(place, int)
        if side == _ENTER:
            self.twins[node] = self.twins[source]  # type: ignore[index]
            self.entered.setdefault(number, {})[place] = self.twins[node]
            return
        call = self.run.calls[number]
        if number not in self.results:
            given = self.entered.get(number, {})
            args = map_leaves(lambda leaf: given[leaf.place] if isinstance(leaf, _Marked) else leaf, call.args)
            kwargs = map_leaves(lambda leaf: given[leaf.place] if isinstance(leaf, _Marked) else leaf, call.kwargs)
            self.results[number] = self.graph.call_module(importable(self.root, call.path), tuple(args), dict(kwargs))
            self.results[number].meta.update(node.meta)
        current = self.results[number]
        path = next(path for path, leaf in leaves(call.result) if isinstance(leaf, _Marked) and leaf.place == place)
        for step, key in path:
            function = get_item if step == "item" else get_field
            current = self.graph.call_function(function, (current, key))
            set_info(current, NodeInfo(ITEM if step == "item" else FIELD, current.name))
        self.twins[node] = current

    def _output(self, node: fx.Node) -> None:
        returned = iter(node.args[0])  # type: ignore[arg-type]
        tensors = [leaf for _, leaf in leaves(self.run.output) if isinstance(leaf, torch.Tensor)]
        found = {id(tensor): self.twins[twin] for tensor, twin in zip(tensors, returned, strict=True)}
        argument = output_argument(self.graph, self.run.output, lambda tensor: found[id(tensor)])
        set_info(self.graph.output(argument), NodeInfo(OUTPUT, "output"))

    def _drop_unused(self) -> None:
        """Drops the insides of leaf modules, and what export kept although nobody reads it."""
        inside = self._inside_leaves()

        def needed(node: fx.Node) -> bool:
            schema = getattr(node.target, "_schema", None)
            writes = writes_in_place(node.op, node.target) or (schema is not None and schema.is_mutable)
            return node.op in ("placeholder", "output") or (writes and node not in inside) or "_assert" in node.name

        self.graph.eliminate_dead_code(needed)

    def _inside_leaves(self) -> set[fx.Node]:
        """Nodes that stand between a call's first input and its result."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        nodes = list(self.graph.nodes)
        found: set[fx.Node] = set()
        for number, result in self.results.items():
            given = self.entered.get(number, {}).values()
            stack = str(result.meta.get("nn_module_stack"))
            start = max((order[node] for node in given), default=order[result])
            found.update(
                node for node in nodes[start : order[result]] if str(node.meta.get("nn_module_stack")) == stack
            )
        return found


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _name_sites(gm: fx.GraphModule) -> SiteNames:
    names = SiteNames()
    scopes: dict[str, Scope] = {}
    for node in gm.graph.nodes:
        if has_info(node):
            continue
        key, owner = _scope(node)
        names.scopes = [scopes.setdefault(key, Scope(owner))]
        op = classify(node.op, node.target, gm, node.args, node.kwargs)
        if node.op == "get_attr":
            site = str(node.target)
        elif node.op == "call_module":
            site = names.module_call(str(node.target))
        else:
            target = str(getattr(node.target, "__name__", node.target)).split(".")[0].strip("_")
            site = names.function_call(op.name if op is not OPAQUE else target)
        set_info(node, NodeInfo(op, site, owner, source_of(node)))
        node.name = node_name(site)
    return names


def _scope(node: fx.Node) -> tuple[str, str]:
    """Which run of which module's forward a node is in."""
    entries = [(key, str(path)) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]
    paths = [(key, path) for key, path in entries if path == _PREFIX or path.startswith(f"{_PREFIX}.")]
    if node.op == "call_module":
        paths = paths[:-1]  # the last is the module itself
    if not paths:
        return "", ""
    key, path = paths[-1]
    return key, _CALL_NUMBER.sub("", path).removeprefix(_PREFIX).lstrip(".")
