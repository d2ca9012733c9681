"""Capture by `torch.fx` symbolic tracing: shapes stay free, Python control flow on values is refused by fx.

`torch.fx.wrap` functions and the user's leaf modules stay single nodes. The graph is then run once on the example
inputs to find shapes, in-place writes and source lines, so that it satisfies the same rules as a recorded one.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qgraph.capture.inputs import Inputs
from qgraph.capture.leaves import LeafRule
from qgraph.capture.names import Scope, SiteNames
from qgraph.capture.recorder import Recorder, Recording, Write
from qgraph.capture.source import is_user_file
from qgraph.capture.structure import tensors_in
from qgraph.capture.taint import storage_key
from qgraph.errors import CaptureError
from qgraph.ir.arguments import classify
from qgraph.ir.evaluate import call_node, evaluate
from qgraph.ir.node_info import NodeInfo, SourceLine, info, set_info
from qgraph.ir.op_table import OPAQUE
from qgraph.ir.values import spec_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


class _Tracer(fx.Tracer):
    def __init__(self, leaf: LeafRule) -> None:
        super().__init__()
        self.leaf = leaf
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m, module_qualified_name)


def record_symbolically(root: nn.Module, leaf: LeafRule, inputs: Inputs, *, protected: bool) -> Recording:
    """Traces `root` with fx and annotates the graph from one run on `inputs`.

    Raises:
        CaptureError: fx cannot trace the model; the message carries fx's reason and the user's line.
    """
    graph = _trace(root, leaf, inputs)
    gm = fx.GraphModule(root, graph)
    _name_sites(gm)
    return _observe(gm, Recorder(root, leaf, protected=protected), inputs)


def _trace(root: nn.Module, leaf: LeafRule, inputs: Inputs) -> fx.Graph:
    fixed = {name: value for name, value in inputs.items() if not tensors_in(value)}
    omitted = _omitted_defaults(root, inputs)
    try:
        graph = _Tracer(leaf).trace(root, concrete_args={**omitted, **fixed} or None)
    except Exception as error:
        raise CaptureError(
            f"torch.fx cannot trace {type(root).__name__}",
            where=_line_of(error),
            why=f"{type(error).__name__}: {error}",
            fix='use method="jit", wrap the function with torch.fx.wrap, or name its module in leaf_modules',
        ) from error
    for node in reversed(list(graph.nodes)):
        checks_none = getattr(node.target, "__name__", "") == "_assert_is_none"
        left_out = node.op == "placeholder" and str(node.target) in omitted
        if not node.users and (checks_none or left_out):
            graph.erase_node(node)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    unknown = [name for name in names if name not in inputs]
    if unknown:
        raise CaptureError(
            f"torch.fx cannot trace {type(root).__name__}",
            where=f"parameters {unknown}",
            why="they are variadic or take no value from example_inputs",
            fix='use method="jit"',
        )
    return graph


def _omitted_defaults(root: nn.Module, inputs: Inputs) -> dict[str, Any]:
    parameters = inspect.signature(root.forward).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in inputs and parameter.default is not inspect.Parameter.empty
    }


def _name_sites(gm: fx.GraphModule) -> None:
    names = SiteNames()
    scopes: dict[str, Scope] = {}
    for node in gm.graph.nodes:
        key, owner = _scope(node)
        names.scopes = [scopes.setdefault(key, Scope(owner))]
        op = classify(node.op, node.target, gm, node.args, node.kwargs)
        source = _source(node)
        if node.op in ("placeholder", "output", "get_attr"):
            site = str(node.target)
        elif node.op == "call_module":
            site = names.module_call(str(node.target))
        else:
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")
            site = names.function_call(op.name if op is not OPAQUE else str(target).strip("_"))
        set_info(node, NodeInfo(op, site, owner, source))


def _observe(gm: fx.GraphModule, recorder: Recorder, inputs: Inputs) -> Recording:
    recording = recorder.recording = Recording(gm.graph, state=recorder.recording.state)

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record = info(node)
        op = classify(node.op, node.target, gm, args, kwargs)
        value, written = recorder.observed(lambda: call_node(gm, node, args, kwargs), (args, kwargs))
        set_info(
            node,
            NodeInfo(
                op, record.site, record.module, record.source, in_place=bool(written), random=recorder.drew_random()
            ),
        )
        for tensor in written:
            target = next((used for used in node.all_input_nodes), node)
            recording.writes.append(Write(node, target, storage_key(tensor)))
            recorder.check_state(node, tensor)
        return value

    def observe(node: fx.Node, value: Any) -> None:
        record = info(node)
        set_info(
            node,
            replace(record, value=spec_of(value)),
        )
        if isinstance(value, torch.Tensor):
            recording.storages[node] = storage_key(value)
            recorder.hold(value)

    recording.output = recorder.watch(inputs, lambda: evaluate(gm, (), inputs, call=call, observe=observe))
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


def _source(node: fx.Node) -> SourceLine | None:
    found = None
    for match in _FRAME.finditer(node.stack_trace or ""):
        if is_user_file(match["file"]):
            found = SourceLine(match["file"], int(match["line"]), match["function"])
    return found


def _line_of(error: BaseException) -> str | None:
    line, traceback = None, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_user_file(code.co_filename):
            line = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return line
