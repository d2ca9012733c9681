"""Capture by `torch.fx` symbolic tracing: shapes stay free, Python control flow on values is refused by fx.

`torch.fx.wrap` functions and the user's leaf modules stay single nodes. fx runs at once what touches no proxy, and sees
nothing of it; so tracing is watched like a recorded run. The graph is then run on the example inputs to find shapes and
in-place writes, so that it satisfies the same rules as a recorded one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.boundary.outputs import output_argument
from qgraph.capture.model.blocks import listening_blocks
from qgraph.capture.model.names import Place, Scope, SiteNames, module_paths, plain_tensors, walk_modules
from qgraph.capture.model.source import functional_module, is_user_file, line_of_error, user_line
from qgraph.capture.options.flags import Flag
from qgraph.capture.options.request import Request, fails_on_example
from qgraph.capture.recording.record import Recording, StateWrite, Write
from qgraph.capture.recording.recorder import Recorder
from qgraph.capture.values.layout import copy_tensor, relaid
from qgraph.capture.values.storage import flat_tensors, storage_key
from qgraph.capture.values.structure import Inputs, Path, leaves, map_leaves, tensors_in
from qgraph.errors import CaptureError, QGraphError
from qgraph.ir.arguments import classify
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.functional import field as get_field
from qgraph.ir.functional import item as get_item
from qgraph.ir.node_info import NodeInfo, SourceLine, has_info, info, set_info
from qgraph.ir.op_table import CAST, FIELD, IDENTITY, INPUT, ITEM, OPAQUE, REBUILD, SCALAR
from qgraph.ir.values import spec_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
# Values read inside a call that the graph makes as a whole are the call's own affair.
_WHOLE = frozenset({"scalar", "numpy", "data-shaped", "lost"})
_TABLES = ("_parameters", "_buffers", "_modules")


class _Tracer(fx.Tracer):
    """fx's tracer, with the recorder's inputs and outputs, and with buffers as parts of the graph.

    Args:
        request: how the root is called, and which modules are leaves.
        inputs: the example inputs.
        flags: where autocast regions are noted.
    """

    proxy_buffer_attributes = True

    def __init__(self, request: Request, inputs: Inputs, flags: list[Flag]) -> None:
        super().__init__(param_shapes_constant=True)
        self.request = request
        self.inputs = inputs
        self.flags = flags
        self.record_stack_traces = True
        self.methods: dict[fx.Node, tuple[str, str]] = {}
        self.names = SiteNames()
        self.places: dict[fx.Node, Place] = {}
        self.devices = {tensor.device.type for tensor in tensors_in(list(inputs.values()))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.request.leaf(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Proxies for the tensors among the inputs; all else is passed as it is."""
        arguments = {name: self._proxies(name, value) for name, value in self.inputs.items()}

        def forward(root: nn.Module) -> Any:
            args, kwargs = self.request.arguments(arguments)
            result = root_fn(root, *args, **kwargs)
            return output_argument(self.graph, result, self.create_arg, (torch.Tensor, fx.Proxy))

        return forward, [self.root]

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, fx.Node) else super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if any(map(torch.is_autocast_enabled, self.devices)):
            self.flags.append(Flag("autocast", "an autocast region", "", user_line()))
        functional = functional_module() if kind.startswith("call") else None
        if functional is not None:
            self.methods[node] = (self.path_of_module(functional[0]), functional[1])
        place = self.names.place()
        if place is not None:
            self.places[node] = place
        return node

    def running(self) -> str:
        """Path of the module whose forward runs."""
        return self.scope.module_path

    def _proxies(self, name: str, value: Any) -> Any:
        """`value` with every tensor replaced by a proxy, and the nodes that take it apart."""
        root = self.create_proxy("placeholder", name, (), {})
        set_info(root.node, NodeInfo(INPUT, name))
        places = iter([path for path, _ in leaves(value)])

        def proxy(leaf: Any) -> Any:
            path = next(places)
            return self._part(root, path) if isinstance(leaf, torch.Tensor) else leaf

        return map_leaves(proxy, value)

    def _part(self, proxy: fx.Proxy, path: Path) -> fx.Proxy:
        for step, key in path:
            function, op = (get_item, ITEM) if step == "item" else (get_field, FIELD)
            proxy = self.create_proxy("call_function", function, (proxy, key), {})
            set_info(proxy.node, NodeInfo(op, proxy.node.name))
        return proxy


class ObservingRecorder(Recorder):
    """Blames what it notes on the node that runs, if one does, rather than on the code that runs the graph."""

    running: NodeInfo | None = None

    def flag(self, kind: str, what: str) -> None:
        self.recording.flags.append(self._placed(kind, what))

    def note_random(self, what: str) -> None:
        self._random.append(self._placed("random", what))

    def _placed(self, kind: str, what: str) -> Flag:
        if self.running is None:
            return Flag(kind, what, "", user_line())
        return Flag(kind, what, self.running.module, self.running.source)


def record_symbolically(request: Request, root: nn.Module, inputs: Inputs) -> Recording:
    """Traces `root`, a copy of the model, with fx and annotates the graph from one run on `inputs`.

    Raises:
        CaptureError: fx cannot trace the model; the message carries fx's reason and the user's line.
        StateWrite: the forward writes to the model's tensors while fx traces it.
    """
    recorder = ObservingRecorder(root, request.leaf, protected=not request.writable)
    tracer = _Tracer(request, inputs, recorder.recording.flags)
    _trace(tracer, recorder, inputs)
    gm = fx.GraphModule(root, tracer.graph)
    _name_sites(gm, tracer)
    return observe_graph(gm, recorder, inputs, tracer.names.notes())


def _trace(tracer: _Tracer, recorder: ObservingRecorder, inputs: Inputs) -> None:
    root = recorder.root
    own = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    own |= {id(tensor) for _, _, tensor in plain_tensors(walk_modules(root))}

    def run() -> fx.Graph:
        blocks = listening_blocks(tracer.names, module_paths(root), tracer.running)
        with _watched_state(root, recorder), blocks:
            return tracer.trace(root)

    try:
        recorder.watch(inputs, lambda: recorder.observed(run, ()))
    except (QGraphError, StateWrite):
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.fx cannot trace {type(root).__name__}",
            where=line_of_error(error),
            why=f"{type(error).__name__}: {error}",
            fix='use method="jit", wrap the function with torch.fx.wrap, or name its module in leaf_modules',
        ) from error
    for tensor, path in tracer.tensor_attrs.items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in own:
            setattr(root, path, copy_tensor(tensor))  # a tensor of a closure or a global


@contextmanager
def _watched_state(root: nn.Module, recorder: ObservingRecorder) -> Iterator[None]:
    """Flags attributes of modules that tracing leaves with another value, and puts the old ones back.

    fx runs assignments once, while it traces; the graph has no trace of them.
    """
    before = [
        (f"{path}.{name}".lstrip("."), space, name, value, _contents(value))
        for path, module in root.named_modules()
        for space in (module.__dict__, *(module.__dict__[table] for table in _TABLES))
        for name, value in space.items()
        if name not in _TABLES
    ]
    yield
    for place, space, name, value, contents in before:
        if not _same(space.get(name), value):
            recorder.flag("state", f"{place} is assigned")
            space[name] = value
        elif not _same(_contents(value), contents):
            recorder.flag("state", f"the contents of {place} change")
            _refill(value, contents)


def _contents(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, (list, set)) else None


def _refill(value: Any, contents: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(contents)
    else:
        value.update(contents)


def _same(one: Any, two: Any) -> bool:
    """Whether two attribute values are one object, or equal plain values."""
    if one is two:
        return True
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two) and isinstance(one, (int, float, complex, str, bytes)) and one == two


def _name_sites(gm: fx.GraphModule, tracer: _Tracer) -> None:
    names = tracer.names
    scopes: dict[str, Scope] = {}
    for node in gm.graph.nodes:
        if has_info(node):
            continue
        key, owner = _scope(node)
        names.scopes = [scopes.setdefault(key, Scope(owner))]
        op, place = classify(node.op, node.target, gm, node.args, node.kwargs), tracer.places.get(node)
        if node.op in ("output", "get_attr"):
            site = str(node.target)
        elif node in tracer.methods:
            site = names.method_call(*tracer.methods[node], place)
        elif node.op == "call_module":
            site = names.module_call(str(node.target), place)
        else:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")
            site = names.function_call(op.name if op is not OPAQUE else str(target).strip("_"), place)
        set_info(node, NodeInfo(op, site, owner, source_of(node), repeated=names.repeats.get(site)))


def observe_graph(gm: fx.GraphModule, recorder: ObservingRecorder, inputs: Inputs, notes: tuple[str, ...]) -> Recording:
    """Runs a graph whose sites are named on `inputs`, and notes values, writes and flags."""
    recording = recorder.recording
    recording.graph = gm.graph
    owners: dict[int, fx.Node] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record = recorder.running = info(node)
        op = record.op if record.op is REBUILD else classify(node.op, node.target, gm, args, kwargs)
        try:
            value, written = recorder.observed(lambda: call_node(gm, node, args, kwargs), (args, kwargs))
        except (QGraphError, StateWrite):
            raise
        except Exception as error:
            place = f"{record.site} at {record.source or 'an unknown line'}"
            raise fails_on_example(type(recorder.root).__name__, place, error) from error
        if not flat_tensors((args, kwargs, value)):
            op = SCALAR  # arithmetic on sizes
        moved = op in (IDENTITY, CAST) and relaid(args, value)
        record = replace(record, op=op, in_place=bool(written), random=recorder.drew_random(), relaid=moved)
        set_info(node, record)
        for tensor in written:
            recording.writes.append(Write(node, owners.get(id(tensor), node), storage_key(tensor)))
            recorder.check_state(node, tensor)
        return value

    def observe(node: fx.Node, value: Any) -> None:
        set_info(node, replace(info(node), value=spec_of(value)))
        recorder.running = None
        if isinstance(value, torch.Tensor):
            owners[id(value)] = node
            recorder.place(value, node)

    def run() -> Any:
        # What happens between the nodes is none of the graph's.
        return recorder.observed(lambda: evaluate(gm, (), inputs, call=call, observe=observe), ())[0]

    recording.output = recorder.watch(inputs, run)
    recording.notes = notes
    recording.flags[:] = [flag for flag in recording.flags if flag.kind not in _WHOLE]
    return recording


def _scope(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.items())
    if node.op == "call_module" and entries:
        entries = entries[:-1] if str(entries[-1][1][0]) == str(node.target) else entries
    if not entries:
        return "", ""
    key, (path, _) = entries[-1]
    return str(key), str(path)


def source_of(node: fx.Node) -> SourceLine | None:
    """The innermost user line of the stack trace that torch kept on a node."""
    found = None
    for match in _FRAME.finditer(node.stack_trace or ""):
        if is_user_file(match["file"]):
            found = SourceLine(match["file"], int(match["line"]), match["function"])
    return found
