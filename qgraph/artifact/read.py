"""`load`: a graph from a file. Nothing in the file is code; every name is looked up in a closed list."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from qgraph.artifact.container import MAX_BYTES, parse_json, read_container
from qgraph.artifact.known import KnownClasses, KnownFunctions, check_attribute, check_method
from qgraph.artifact.modules import read_module, read_tensor
from qgraph.artifact.records import RecordReader
from qgraph.artifact.schema import check_call
from qgraph.artifact.tensors import TensorReader
from qgraph.artifact.values import listed, mapping, placed, text, understood
from qgraph.artifact.write import CALLS, GRAPH_KIND, GRAPH_MEMBER, TENSORS_MEMBER, TEXT_MEMBER
from qgraph.capture.boundary.outputs import BuilderParts, builder_of
from qgraph.errors import ArtifactError, QGraphError
from qgraph.ir.graph_module import CheckedGraphModule
from qgraph.ir.integer import integer_name
from qgraph.ir.node_info import KEY, GraphInfo, NodeInfo, info, set_info
from qgraph.ir.stage import Stage
from qgraph.ir.text import print_graph
from qgraph.ir.values import TensorSpec, spec_of
from qgraph.ir.verifier import verify
from qgraph.memory import paused_collection

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_OWN_NAMES = frozenset(dir(fx.GraphModule)) | frozenset(vars(nn.Module())) | {"meta"}
_BASE = frozenset({"format.json", "checksums.txt", GRAPH_MEMBER, TEXT_MEMBER, TENSORS_MEMBER})
_SECTIONS = frozenset({"info", "constants", "modules", "nodes", "strides"})


def load(
    path: str | os.PathLike[str], *, classes: Iterable[type[Any]] = (), max_bytes: int = MAX_BYTES
) -> fx.GraphModule:
    """The integer graph of a file that `save` wrote, on the CPU.

    No code of the file is run and nothing is imported by name. Operators, modules and kernels of other packages must be
    registered before.

    Args:
        path: the file; a conformance pack holds a graph, too.
        classes: named tuples and dataclasses among the graph's inputs and outputs.
        max_bytes: the largest file to read.

    Returns:
        A `GraphModule` in stage INTEGER with the text, records, tensors and input guard of the graph that was saved.

    Raises:
        ArtifactError: the file is damaged, no artefact, of a newer version, or names what is not known here.
        UserError: it cannot be read.
    """
    kind, members = read_container(path, max_bytes)
    with placed(str(path)):
        if kind == GRAPH_KIND and members.keys() != _BASE:
            raise ArtifactError(f"the file has other members than a graph: {', '.join(sorted(members.keys() ^ _BASE))}")
        return graph_of(members, KnownClasses(classes))


def graph_of(members: dict[str, bytes], classes: KnownClasses) -> fx.GraphModule:
    """The graph that some members describe.

    Raises:
        ArtifactError: they describe none.
    """
    missing = _BASE - members.keys()
    if missing:
        raise ArtifactError(f"the file has no {min(missing)}")
    document = mapping(parse_json(members[GRAPH_MEMBER], GRAPH_MEMBER), _SECTIONS, frozenset())
    with torch.inference_mode(False):
        tensors = TensorReader(members[TENSORS_MEMBER], mapping(document["strides"]))
    reader = _GraphReader(RecordReader(tensors, classes, KnownFunctions()))
    with torch.inference_mode(False), paused_collection(), understood("the graph"):
        try:
            gm = reader.graph_module(document)
            tensors.require_all_used()
            verify(gm)
            print_graph(gm)  # binds the arguments of every known operator
        except QGraphError as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError("the graph of the file breaks a rule", where=error.where, why=error.what) from error
    return gm


class _GraphReader:
    def __init__(self, reader: RecordReader) -> None:
        self.reader = reader
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._modules: dict[str, nn.Module] = {}

    def graph_module(self, document: dict[str, Any]) -> fx.GraphModule:
        with placed("the record of the graph"):
            record: GraphInfo = self.reader.record(GraphInfo, document["info"])
        if record.stage is not Stage.INTEGER:
            raise ArtifactError(f"the file holds a graph in stage {record.stage}; files hold integer graphs")
        if not record.model.isprintable() or not record.model:
            raise ArtifactError("the model's name is not printable")
        for path, entry in mapping(document["modules"]).items():
            with placed(f"module {path[:80]}"):
                self._attach(path, self._module(entry, path))
        for path, entry in mapping(document["constants"]).items():
            with placed(f"constant {path[:80]}"):
                self._attach(path, read_tensor(self.reader, entry))
        nodes = listed(document["nodes"])
        for position, entry in enumerate(nodes):
            with placed(f"node {position + 1} of {len(nodes)}"):
                self._node(mapping(entry, frozenset(("name", "call", "info")), _NODE_KEYS))
        gm = CheckedGraphModule(self.root, self.graph, class_name=record.model)
        for module in gm.modules():
            module.training = module.training and module in self._modules.values()
        gm.meta[KEY] = record
        return gm

    def _module(self, entry: Any, path: str) -> nn.Module:
        if "same_as" in mapping(entry):
            first = text(mapping(entry, frozenset(("same_as",)), frozenset())["same_as"])
            if first not in self._modules:
                raise ArtifactError(f"it is the same as {first[:80]!r}, which does not come earlier")
            return self._modules[first]
        self._modules[path] = read_module(self.reader, entry, path)
        return self._modules[path]

    def _attach(self, path: str, value: nn.Module | torch.Tensor) -> None:
        """Puts a module or tensor at a dotted path; paths become code, so their parts are checked."""
        *owners, name = path.split(".")
        parent = self.root
        for part in (*owners, name):
            _check_part(part)
        for part in owners:
            child = parent._modules.get(part)
            if child is None:
                child = nn.Module()
                parent.add_module(part, child)
            parent = child
        if name in parent._modules or name in parent._buffers or name in parent._parameters:
            raise ArtifactError("there is something at this path already")
        if isinstance(value, nn.Module):
            parent.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            parent.register_parameter(name, value)
        else:
            parent.register_buffer(name, value)

    def _node(self, entry: dict[str, Any]) -> None:
        name, call = text(entry["name"]), text(entry["call"])
        if not _NAME.fullmatch(name) or name in self.reader.nodes:
            raise ArtifactError(f"the node's name {name[:80]!r} is taken or no name")
        if call not in _KINDS:
            raise ArtifactError(f"the node {name} calls a {call[:80]!r}, which there is not")
        with placed(f"node {name}"):
            self._add(name, _KINDS[call], entry)

    def _add(self, name: str, kind: str, entry: dict[str, Any]) -> None:
        self.reader.in_arguments = True
        args = tuple(self.reader.value(value) for value in listed(entry.get("args", [])))
        kwargs = {key: self.reader.value(value) for key, value in mapping(entry.get("kwargs", {})).items()}
        self.reader.in_arguments = False
        for key in kwargs:
            if not _NAME.fullmatch(key) or keyword.iskeyword(key):
                raise ArtifactError(f"an argument is called {key[:80]!r}")
        target = self._target(kind, entry, args)
        if kind in ("call_method", "placeholder", "output", "get_attr"):
            _check_count(kind, args, kwargs)
        if integer_name(target) is not None:
            check_call(target, args, kwargs)
        node = self.graph.create_node(kind, target, args, kwargs, name=name)
        if node.name != name:
            raise ArtifactError(f"a node cannot be called {name!r}")
        set_info(node, self.reader.record(NodeInfo, entry["info"]))
        if kind == "get_attr":
            self._check_constant(node)
        self.reader.nodes[name] = node

    def _target(self, kind: str, entry: dict[str, Any], args: tuple[Any, ...]) -> Any:
        if kind == "output":
            mapping(entry, frozenset(), _NODE_KEYS - {"target", "builds"})
            return "output"
        if "builds" in entry and kind == "call_function":
            mapping(entry, frozenset(), _NODE_KEYS - {"target"})
            return builder_of(self.reader.record(BuilderParts, entry["builds"]))
        mapping(entry, frozenset(("target",)), _NODE_KEYS - {"builds"})
        target = text(entry["target"])
        if kind == "call_function":
            function = self.reader.functions.function(target)
            check_attribute(function, args)
            return function
        if kind == "call_method":
            return check_method(target)
        if kind == "placeholder" and (not _NAME.fullmatch(target) or keyword.iskeyword(target)):
            raise ArtifactError(f"an input is called {target[:80]!r}")
        if kind == "call_module" and not isinstance(_at(self.root, target), nn.Module):
            raise ArtifactError(f"the file has no module {target[:80]!r}")
        if kind == "get_attr" and not isinstance(_at(self.root, target), torch.Tensor):
            raise ArtifactError(f"the file has no constant {target[:80]!r}")
        return target

    def _check_constant(self, node: fx.Node) -> None:
        tensor, spec = _at(self.root, str(node.target)), info(node).value
        if isinstance(spec, TensorSpec) and spec_of(tensor) != spec:
            raise ArtifactError(f"its tensor is {spec_of(tensor)}, its record says {spec}")


_NODE_KEYS = frozenset({"name", "call", "target", "builds", "args", "kwargs", "info"})
_KINDS = {call: kind for kind, call in CALLS.items()}


def _check_part(part: str) -> None:
    plain = part.isprintable() and '"' not in part and "\\" not in part and "." not in part
    if not part or not plain or keyword.iskeyword(part) or part in _OWN_NAMES or part.startswith("__"):
        raise ArtifactError(f"a part of the model cannot be called {part[:80]!r}")


def _check_count(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    fits = {
        "call_method": len(args) > 0 and isinstance(args[0], fx.Node),
        "placeholder": len(args) < 2 and not kwargs,
        "output": len(args) == 1 and not kwargs,
        "get_attr": not args and not kwargs,
    }
    if not fits[kind]:
        raise ArtifactError(f"a node of kind {CALLS[kind]!r} does not take these arguments")


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        tables = (found._modules, found._parameters, found._buffers) if isinstance(found, nn.Module) else ()
        found = next((table[part] for table in tables if part in table), None)
    return found
