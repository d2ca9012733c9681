"""`save`: an integer graph as one file.

    graph.json           records, nodes, modules: what `load` reads
    graph.txt            the same for people (`print_graph`)
    tensors.safetensors  every tensor

`docs/artifacts.md` describes the format.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import fx

from qgraph.artifact.container import format_json, write_container
from qgraph.artifact.known import KnownFunctions, check_attribute, check_method
from qgraph.artifact.modules import write_module, write_tensor
from qgraph.artifact.records import RecordWriter
from qgraph.artifact.tensors import TensorWriter
from qgraph.artifact.values import placed
from qgraph.capture.boundary.outputs import builder_parts, is_builder
from qgraph.errors import UserError
from qgraph.ir.node_info import graph_info, info, submodule_at, tensor_at, where
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.ir.verifier import verify

GRAPH_KIND = "graph"
GRAPH_MEMBER = "graph.json"
TEXT_MEMBER = "graph.txt"
TENSORS_MEMBER = "tensors.safetensors"
CALLS = {
    "placeholder": "input",
    "get_attr": "constant",
    "call_function": "function",
    "call_method": "method",
    "call_module": "module",
    "output": "output",
}
_LEFT_OUT = frozenset({"expected"})


def save(integer: fx.GraphModule, path: str | os.PathLike[str], *, example: bool = True) -> None:
    """Writes an integer graph to a file that `load` reads, on any machine, without running code from it.

    The same graph gives the same bytes. The file appears complete or not at all.

    Args:
        integer: what `convert` returned.
        path: the file, by custom `something.qgraph`.
        example: whether to keep the example inputs; without them the file holds nothing of the user's data.

    Raises:
        ArtifactError: the graph holds something a file cannot; the message names the node.
        UserError: it is no integer graph, or the file cannot be written.
        VerifyError: the graph breaks a rule of its stage.
    """
    write_container(path, GRAPH_KIND, made_by(), graph_members(integer, example=example))


def made_by() -> str:
    """Name and version of this program."""
    from qgraph import __version__

    return f"qgraph {__version__}"


def graph_members(integer: fx.GraphModule, *, example: bool = True) -> dict[str, bytes]:
    """The members that describe a graph.

    Raises:
        ArtifactError, UserError, VerifyError: as `save`.
    """
    if not isinstance(integer, fx.GraphModule) or graph_info(integer).stage is not Stage.INTEGER:
        raise UserError("only integer graphs are saved", fix="call qgraph.convert(prepared) and save its result")
    verify(integer)
    tensors = TensorWriter()
    document = _GraphWriter(integer, RecordWriter(tensors, KnownFunctions())).document(example)
    document["strides"] = tensors.strides
    return {
        GRAPH_MEMBER: format_json(document),
        TEXT_MEMBER: print_graph(integer).encode(),
        TENSORS_MEMBER: tensors.member(),
    }


class _GraphWriter:
    def __init__(self, gm: fx.GraphModule, writer: RecordWriter) -> None:
        self.gm = gm
        self.writer = writer
        self.modules: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self._first_paths: dict[int, str] = {}

    def document(self, example: bool) -> dict[str, Any]:
        called = [str(node.target) for node in self.gm.graph.nodes if node.op == "call_module"]
        self._prefixes = {f"{path}." for path in called}
        nodes = []
        for node in self.gm.graph.nodes:
            with placed(where(node)):
                nodes.append(self._node(node))
        self.writer.place = "example"
        left_out = _LEFT_OUT if example else _LEFT_OUT | {"example"}
        with placed("the record of the graph"):
            record = self.writer.record(graph_info(self.gm), leave_out=left_out)
        return {"info": record, "constants": self.constants, "modules": self.modules, "nodes": nodes}

    def _node(self, node: fx.Node) -> dict[str, Any]:
        written: dict[str, Any] = {"name": node.name, "call": CALLS[node.op], **self._target(node)}
        self.writer.place, self.writer.in_arguments = node.name, True
        if node.args:
            written["args"] = [self.writer.value(value) for value in node.args]
        if node.kwargs:
            written["kwargs"] = {name: self.writer.value(value) for name, value in node.kwargs.items()}
        self.writer.in_arguments = False
        written["info"] = self.writer.record(info(node))
        return written

    def _target(self, node: fx.Node) -> dict[str, Any]:
        if node.op == "output":
            return {}
        if node.op == "call_function" and is_builder(node.target):
            return {"builds": self.writer.record(builder_parts(node.target))}
        if node.op == "call_function":
            check_attribute(node.target, node.args)
            return {"target": self.writer.functions.name(node.target)}
        path = str(node.target)
        if node.op == "call_method":
            check_method(path)
        elif node.op == "call_module":
            self._keep_module(path)
        elif node.op == "get_attr" and not any(path.startswith(prefix) for prefix in self._prefixes):
            self.constants.setdefault(path, write_tensor(self.writer, tensor_at(self.gm, path), path))
        return {"target": path}

    def _keep_module(self, path: str) -> None:
        if path in self.modules:
            return
        module = submodule_at(self.gm, path)
        first = self._first_paths.setdefault(id(module), path)
        with torch.no_grad():
            self.modules[path] = write_module(self.writer, module, path) if first == path else {"same_as": first}
