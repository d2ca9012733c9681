"""Values as JSON: arguments of nodes, example inputs, and records whose type hints say how to read them back.

A value whose kind JSON has (None, bool, int, float, text, list) stands for itself; any other is an object with one key
that names its kind: {"node": "conv1"}, {"tuple": [...]}, {"dtype": "int8"}. Records (dataclasses) are objects of their
fields, without those at their default; what a field holds is known from its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from qgraph.artifact.known import KnownClasses, class_name
from qgraph.artifact.tensors import TensorReader, TensorWriter
from qgraph.capture.values.structure import dataclass_items, is_dataclass_value, rebuild_dataclass, rebuild_sequence
from qgraph.errors import ArtifactError

_DEEPEST = 40
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_ENUMERATED: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dtype": (torch.dtype, {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}),
    "memory_format": (
        torch.memory_format,
        {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.memory_format)},
    ),
    "layout": (torch.layout, {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.layout)}),
}


class ValueWriter:
    """Turns values into JSON.

    `place` names tensors found on the way; `in_arguments` says that the values are arguments of a node.
    """

    def __init__(self, tensors: TensorWriter) -> None:
        self.tensors = tensors
        self.place = "value"
        self.in_arguments = False

    def value(self, value: Any) -> Any:
        """A value as JSON.

        Raises:
            ArtifactError: a file cannot hold it.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is complex:
            return {"complex": [self.value(value.real), self.value(value.imag)]}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, torch.Tensor):
            return {"tensor": self.tensors.add(value, self.place)}
        return self._other(value)

    def _other(self, value: Any) -> Any:
        for tag, (kind, table) in _ENUMERATED.items():
            if isinstance(value, kind):
                return {tag: next(name for name, entry in table.items() if entry is value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if value is Ellipsis:
            return {"ellipsis": True}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, slice):
            return {"slice": [self.value(value.start), self.value(value.stop), self.value(value.step)]}
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
        return self._container(value)

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind is torch.Size:
            return {"size": list(value)}
        if kind is tuple:
            return {"tuple": [self.value(entry) for entry in value]}
        if kind in (list, fx.immutable_collections.immutable_list):
            return [self.value(entry) for entry in value]
        if kind in (dict, fx.immutable_collections.immutable_dict):
            return {"dict": [[self.value(key), self.value(entry)] for key, entry in value.items()]}
        if is_dataclass_value(value) and not self.in_arguments:
            fields = {name: self.value(entry) for name, entry in dataclass_items(value)}
            return {"fields": fields, "class": class_name(kind)}
        if isinstance(value, tuple) and not self.in_arguments:
            return {"entries": [self.value(entry) for entry in value], "class": class_name(kind)}
        raise ArtifactError(
            f"a file cannot hold a {class_name(kind)}",
            why="files hold numbers, texts, dtypes, tensors, tuples, lists, dicts and records of these",
            fix="give it as one of these before the model is captured",
        )


class ValueReader:
    """Turns JSON back into values.

    Args:
        tensors: the file's tensors.
        classes: classes that inputs and outputs may have.
    """

    def __init__(self, tensors: TensorReader, classes: KnownClasses) -> None:
        self.tensors = tensors
        self.classes = classes
        self.nodes: dict[str, fx.Node] = {}
        self.in_arguments = False
        self._depth = 0
        self._tags: dict[str, Callable[[Any], Any]] = {
            "float": lambda entry: _FLOATS[entry],
            "complex": lambda entry: complex(*(float(self.value(part)) for part in entry)),
            "node": self._node,
            "tensor": tensors.get,
            "device": lambda entry: torch.device(text(entry)),
            "ellipsis": lambda entry: Ellipsis,
            "bytes": bytes.fromhex,
            "slice": lambda entry: slice(*(self.value(part) for part in listed(entry, 3))),
            "range": lambda entry: range(*(whole(part) for part in listed(entry, 3))),
            "size": lambda entry: torch.Size([whole(part) for part in listed(entry)]),
            "tuple": lambda entry: tuple(self.value(part) for part in listed(entry)),
            "dict": lambda entry: {self.value(key): self.value(part) for key, part in map(_pair, listed(entry))},
            **{tag: table.__getitem__ for tag, (_, table) in _ENUMERATED.items()},
        }

    def value(self, entry: Any) -> Any:
        """The value that some JSON stands for.

        Raises:
            ArtifactError: it stands for none, or names a node that does not come earlier.
        """
        if entry is None or isinstance(entry, (bool, int, float, str)):
            return entry
        with self._deeper():
            if isinstance(entry, list):
                return [self.value(part) for part in entry]
            return self._tagged(entry)

    def _tagged(self, entry: dict[str, Any]) -> Any:
        if entry.keys() == {"fields", "class"}:
            parts = {name: self.value(part) for name, part in mapping(entry["fields"]).items()}
            return self._built(entry, lambda kind: rebuild_dataclass(kind, parts))
        if entry.keys() == {"entries", "class"}:
            values = [self.value(part) for part in listed(entry["entries"])]
            return self._built(entry, lambda kind: rebuild_sequence(kind, values))
        tag = next(iter(entry), "")
        if len(entry) != 1 or tag not in self._tags:
            raise ArtifactError(f"a value of the unknown kind {', '.join(map(repr, entry))[:80] or 'nothing'}")
        with understood(f"a value of kind {tag!r}"):
            return self._tags[tag](entry[tag])

    def _built(self, entry: dict[str, Any], build: Callable[[type[Any]], Any]) -> Any:
        if self.in_arguments:  # arguments become code, written with the class's own repr
            raise ArtifactError("an argument of a node is an instance of a class")
        kind = self.classes.named(text(entry["class"]))
        with understood(f"a value of class {class_name(kind)}"):
            return build(kind)

    def _node(self, name: Any) -> fx.Node:
        if name not in self.nodes:
            raise ArtifactError(f"it reads the node {str(name)[:80]!r}, which does not exist or comes later")
        return self.nodes[name]

    @contextmanager
    def _deeper(self) -> Any:
        if self._depth >= _DEEPEST:
            raise ArtifactError(f"values are nested more than {_DEEPEST} deep")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


# --- JSON of the right kind ------------------------------------------------------------------------------------------


@contextmanager
def understood(what: str) -> Any:
    """Reports what constructors say of wrong values as a fault of the file."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # whatever a class or torch says of values that it does not take
        raise ArtifactError(f"{what} makes no sense", why=f"{type(error).__name__}: {error}"[:400]) from error


@contextmanager
def placed(where: str) -> Any:
    """Says of errors where they arose, before what they know themselves."""
    try:
        yield
    except ArtifactError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise


def text(entry: Any) -> str:
    """A text of the file."""
    found: str = _of_kind(entry, str, "a text")
    return found


def whole(entry: Any) -> int:
    """A whole number of the file."""
    found: int = _of_kind(entry, int, "a whole number")
    return found


def flag(entry: Any) -> bool:
    """A truth value of the file."""
    found: bool = _of_kind(entry, bool, "true or false")
    return found


def listed(entry: Any, length: int | None = None) -> list[Any]:
    """A list of the file, of `length` entries if given."""
    found: list[Any] = _of_kind(entry, list, "a list")
    if length is not None and len(found) != length:
        raise ArtifactError(f"a list has {len(found)} entries in place of {length}")
    return found


def mapping(
    entry: Any, required: frozenset[str] = frozenset(), optional: frozenset[str] | None = None
) -> dict[str, Any]:
    """An object of the file; with `optional`, one that has no other keys than these and the required ones."""
    found: dict[str, Any] = _of_kind(entry, dict, "an object")
    missing = required - found.keys()
    unknown = set() if optional is None else found.keys() - required - optional
    if missing or unknown:
        what = f"lacks {min(missing)!r}" if missing else f"has the unknown key {min(unknown)[:80]!r}"
        raise ArtifactError(f"an object {what}", why="it is damaged, or a newer version of qgraph wrote it")
    return found


def _pair(entry: Any) -> tuple[Any, Any]:
    key, value = listed(entry, 2)
    return key, value


def _of_kind(entry: Any, kind: type[Any], expected: str) -> Any:
    if type(entry) is not kind:
        raise ArtifactError(f"{expected} is expected, found {_shown(entry)}")
    return entry


def _shown(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return "an object"
    return "a list" if isinstance(entry, list) else repr(entry)[:80]
