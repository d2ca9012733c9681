"""The graph's output: the structure the model returned, built again by the graph.

Tuples, lists and dicts are part of fx's output argument. Other containers are rebuilt by a node that calls their class.
"""

from __future__ import annotations

import keyword
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import fx

from qgraph.capture.sizes.tracked import is_tracked
from qgraph.capture.values.structure import (
    emptied,
    is_dataclass_value,
    parts,
    rebuild_dataclass,
    rebuild_like,
    rebuild_mapping,
    rebuild_sequence,
)
from qgraph.errors import ArtifactError, CaptureError, UserError
from qgraph.ir.editor import node_name
from qgraph.ir.node_info import NodeInfo, set_info
from qgraph.ir.op_table import REBUILD

# By exact type: the text of a subclass's value, such as that of an IntEnum, is no Python code.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})


def output_argument(
    graph: fx.Graph, value: Any, node_of: Callable[[Any], fx.Node], kinds: tuple[type[Any], ...] = (torch.Tensor,)
) -> Any:
    """`value` as an argument of the output node.

    Args:
        node_of: the node that stands for a value of one of `kinds`.

    Raises:
        CaptureError: a value that no graph can return.
    """

    def build(entry: Any) -> Any:
        if isinstance(entry, kinds):
            return node_of(entry)
        if isinstance(entry, torch.Size):
            return _rebuild(graph, _SequenceBuilder(torch.Size), {"values": tuple(entry)})
        found = parts(entry)
        if found is None:
            if type(entry) not in _PLAIN and not is_tracked(entry):
                raise _refusal(entry)
            return entry
        built = [build(part) for _, part in found]
        kind = type(entry)
        if kind in (tuple, list):
            return kind(built)
        keys = [key for (_, key), _ in found]
        if isinstance(entry, Mapping) and not all(map(_plain_key, keys)):
            raise _refusal(entry, "one of its keys is no plain value")
        if kind is dict:
            return dict(zip(keys, built, strict=True))
        return _built_container(graph, entry, keys, built)

    return build(value)


def _built_container(graph: fx.Graph, value: Any, keys: list[Any], built: list[Any]) -> fx.Node:
    try:
        rebuild_like(value, [part for _, part in parts(value) or ()])
    except UserError as error:
        raise _refusal(value, error.why) from error
    if is_dataclass_value(value):
        return _rebuild(graph, _DataclassBuilder(type(value)), dict(zip(keys, built, strict=True)))
    if not isinstance(value, Mapping):
        return _rebuild(graph, _SequenceBuilder(type(value)), {"values": tuple(built)})
    if all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in keys):
        return _rebuild(graph, _MappingBuilder(type(value), emptied(value)), dict(zip(keys, built, strict=True)))
    return _rebuild(graph, _PairsBuilder(type(value), emptied(value)), {"keys": tuple(keys), "values": tuple(built)})


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


class _SequenceBuilder(_Builder):
    def __call__(self, values: tuple[Any, ...]) -> Any:
        return rebuild_sequence(self.kind, values)


class _MappingBuilder(_Builder):
    def __init__(self, kind: type[Any], shell: Mapping[Any, Any]) -> None:
        super().__init__(kind)
        self.shell = shell

    def __call__(self, **items: Any) -> Any:
        return rebuild_mapping(self.shell, items.items())


class _PairsBuilder(_MappingBuilder):
    """For keys that are no names of arguments."""

    def __call__(self, *, keys: tuple[Any, ...], values: tuple[Any, ...]) -> Any:  # type: ignore[override]
        return rebuild_mapping(self.shell, zip(keys, values, strict=True))


@dataclass(frozen=True)
class BuilderParts:
    """What tells one builder from another, for graphs that are written to files.

    Args:
        form: what the builder takes: `sequence`, `dataclass`, `mapping` or `pairs`.
        kind: the class it makes.
    """

    form: str
    kind: type[Any]


_FORMS: dict[str, type[_Builder]] = {
    "sequence": _SequenceBuilder,
    "dataclass": _DataclassBuilder,
    "mapping": _MappingBuilder,
    "pairs": _PairsBuilder,
}
_PLAIN_MAPPINGS = (dict, OrderedDict)


def is_builder(function: object) -> bool:
    """Whether a node that calls `function` rebuilds a container."""
    return isinstance(function, _Builder)


def builder_parts(builder: object) -> BuilderParts:
    """What a builder is made of.

    Raises:
        ArtifactError: it fills a mapping with a state of its own.
    """
    assert isinstance(builder, _Builder)
    shell = builder.shell if isinstance(builder, _MappingBuilder) else {}
    if type(shell) not in _PLAIN_MAPPINGS or getattr(shell, "__dict__", None):
        raise ArtifactError(
            f"a file cannot hold an output of class {builder.kind.__name__}",
            why="a mapping of a class of its own may hold more than its entries",
            fix="return a dict, a named tuple or a dataclass",
        )
    form = next(form for form, kind in _FORMS.items() if type(builder) is kind)
    return BuilderParts(form, builder.kind)


def builder_of(described: BuilderParts) -> Callable[..., Any]:
    """The builder that `builder_parts` described.

    Raises:
        ArtifactError: there is no such form, or it does not make the class.
    """
    form, kind = _FORMS.get(described.form), described.kind
    if form is None or (issubclass(form, _MappingBuilder) and kind not in _PLAIN_MAPPINGS):
        raise ArtifactError(f"there is no way to build a {kind.__name__} called {described.form[:80]!r}")
    if form is _DataclassBuilder and not is_dataclass(kind):
        raise ArtifactError(f"the class {kind.__name__} is no dataclass")
    builder: Any = form(kind, kind()) if issubclass(form, _MappingBuilder) else form(kind)
    function: Callable[..., Any] = builder
    return function


def _rebuild(graph: fx.Graph, builder: Callable[..., Any], items: dict[str, Any]) -> fx.Node:
    name = getattr(builder, "__name__", "rebuild")
    node = graph.create_node("call_function", builder, (), items, name=node_name(name))
    set_info(node, NodeInfo(REBUILD, node.name))
    return node


def _plain_key(key: Any) -> bool:
    return all(map(_plain_key, key)) if type(key) is tuple else type(key) in _PLAIN


def _refusal(value: Any, reason: str | None = None) -> CaptureError:
    allowed = "outputs may be tensors, numbers, None, tuples, lists, dicts, named tuples and dataclasses of these"
    return CaptureError(
        f"the model returns a {type(value).__name__}, which a graph cannot rebuild",
        why=reason or allowed,
        fix="return such a structure, or wrap the model in one that does" if reason is None else allowed,
    )
