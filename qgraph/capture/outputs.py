"""The graph's output: the structure the model returned, built again by the graph.

Tuples, lists and dicts are part of fx's output argument. Dataclasses, named tuples and other mappings are rebuilt by a
node that calls their class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qgraph.capture.structure import (
    dataclass_items,
    is_dataclass_value,
    is_named_tuple,
    rebuild_dataclass,
    rebuild_named_tuple,
)
from qgraph.errors import CaptureError
from qgraph.ir.editor import node_name
from qgraph.ir.node_info import NodeInfo, set_info
from qgraph.ir.op_table import REBUILD

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def output_argument(graph: fx.Graph, value: Any, node_of: Callable[[torch.Tensor], fx.Node]) -> Any:
    """`value` as an argument of the output node.

    Raises:
        CaptureError: a value that no graph can return.
    """

    def build(entry: Any) -> Any:
        if isinstance(entry, torch.Tensor):
            return node_of(entry)
        if is_dataclass_value(entry):
            items = {name: build(part) for name, part in dataclass_items(entry)}
            return _rebuild(graph, _DataclassBuilder(type(entry)), items)
        if isinstance(entry, Mapping):
            items = {key: build(part) for key, part in entry.items()}
            return items if type(entry) is dict else _rebuild(graph, _MappingBuilder(type(entry)), items)
        if is_named_tuple(entry):
            return _rebuild(graph, _TupleBuilder(type(entry)), {"values": tuple(map(build, entry))})
        if isinstance(entry, (tuple, list)):
            parts = [build(part) for part in entry]
            return parts if isinstance(entry, list) else tuple(parts)
        if isinstance(entry, _PLAIN):
            return entry
        raise CaptureError(
            f"the model returns a {type(entry).__name__}, which a graph cannot rebuild",
            why="outputs may be tensors, numbers, None, tuples, lists, dicts, named tuples and dataclasses of these",
            fix="return such a structure, or wrap the model in one that does",
        )

    return build(value)


class _Builder:
    """A named callable that makes one kind of container from keyword arguments."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = f"rebuild_{kind.__name__}"
        self.__module__ = __name__

    def __deepcopy__(self, memo: dict[int, object]) -> _Builder:
        return self


class _DataclassBuilder(_Builder):
    def __call__(self, **items: Any) -> Any:
        return rebuild_dataclass(self.kind, items)


class _MappingBuilder(_Builder):
    def __call__(self, **items: Any) -> Any:
        return self.kind(items)


class _TupleBuilder(_Builder):
    def __call__(self, values: tuple[Any, ...]) -> Any:
        return rebuild_named_tuple(self.kind, values)


def _rebuild(graph: fx.Graph, builder: Callable[..., Any], items: dict[Any, Any]) -> fx.Node:
    if not all(isinstance(key, str) for key in items):
        raise CaptureError(
            "the model returns a mapping whose keys are not strings",
            fix="return a plain dict",
        )
    name = getattr(builder, "__name__", "rebuild")
    node = graph.create_node("call_function", builder, (), items, name=node_name(name))
    set_info(node, NodeInfo(REBUILD, node.name))
    return node
