"""Dataclasses as JSON, read back by the type hints of their fields.

A hint both writes and checks: a field of type `str` takes a text and nothing else. New fields of records and targets
travel without a change here, as long as their types are among those below.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn

from qgraph.artifact.known import KnownFunctions, class_name
from qgraph.artifact.values import ValueReader, ValueWriter, listed, mapping, text, understood, whole
from qgraph.capture.sizes.expressions import Computed, Linear, SizeOf
from qgraph.capture.values.layout import TensorLayout
from qgraph.errors import ArtifactError, UserError
from qgraph.ir.node_info import NodeInfo, info, set_info
from qgraph.ir.op import Op
from qgraph.ir.op_table import INPUT, OPS
from qgraph.ir.values import ScalarSpec, TensorSpec
from qgraph.numerics import Arithmetic, FloatFormat, Format, QParams, QType, parse_arithmetic, parse_format, parse_qtype
from qgraph.targets import Target

_EMPTY = dataclasses.MISSING
_SIMPLE = (bool, int, float, str)


class _Spec:
    """Stands for `ValueSpec`, whose definition names itself."""


class RecordWriter(ValueWriter):
    """Turns values and records into JSON."""

    def __init__(self, tensors: Any, functions: KnownFunctions) -> None:
        super().__init__(tensors)
        self.functions = functions

    def record(self, value: Any, *, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The fields of a dataclass that differ from their defaults.

        Raises:
            ArtifactError: a file cannot hold one of them.
        """
        written = {}
        for name, hint, default in fields_of(type(value)):  # type: ignore[arg-type]
            entry = getattr(value, name)
            if name not in leave_out and not _is_default(entry, default):
                written[name] = self.typed(entry, hint)
        return written

    def typed(self, value: Any, hint: Any) -> Any:
        """A value of type `hint` as JSON."""
        if hint is float and type(value) is int:
            value = float(value)
        if hint in _TEXTS:
            return str(value)
        if hint in (Any, object) or (hint in _SIMPLE and type(value) in _SIMPLE):
            return self.value(value)
        if value is None:
            return None
        if hint in _SPECIAL:
            return _SPECIAL[hint][0](self, value)
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            return self._one_of(value, [part for part in parts if part is not type(None)])
        if origin is tuple:
            hints = [parts[0]] * len(value) if parts[-1] is ... else parts
            return [self.typed(entry, part) for entry, part in zip(value, hints, strict=True)]
        if origin in (frozenset, set):
            return [self.typed(entry, parts[0]) for entry in sorted(value)]
        if origin in (dict, collections.abc.Mapping):
            return {name: self.typed(entry, parts[1]) for name, entry in value.items()}
        if origin is collections.abc.Callable:
            return self.functions.name(value)
        if origin is type:
            return class_name(value)
        if isinstance(hint, type) and issubclass(hint, Enum):
            return value.value
        if dataclasses.is_dataclass(hint):
            return self.record(value)
        raise ArtifactError(f"a file cannot hold a {class_name(type(value))} in a field of type {hint}")

    def _one_of(self, value: Any, parts: list[Any]) -> Any:
        chosen = next((part for part in parts if _is_a(value, part)), None)
        if chosen is None:
            raise ArtifactError(f"a file cannot hold a {class_name(type(value))} here")
        written = self.typed(value, chosen)
        return {chosen.__name__: written} if chosen in _tagged(parts) else written


class RecordReader(ValueReader):
    """Turns JSON back into values and records."""

    def __init__(self, tensors: Any, classes: Any, functions: KnownFunctions) -> None:
        super().__init__(tensors, classes)
        self.functions = functions
        self.parameters: dict[str, nn.Parameter] = {}  # tied weights stay one parameter

    def record(self, kind: type[Any], entry: Any) -> Any:
        """The dataclass that some JSON stands for.

        Raises:
            ArtifactError: a field is missing, unknown or of another type.
        """
        fields = fields_of(kind)  # type: ignore[arg-type]
        required = frozenset(name for name, _, default in fields if default is _EMPTY)
        found = mapping(entry, required, frozenset(name for name, _, _ in fields))
        values = {name: self.typed(found[name], hint, name) for name, hint, _ in fields if name in found}
        with understood(f"a record of kind {kind.__name__}"):
            return kind(**values)

    def typed(self, entry: Any, hint: Any, name: str = "") -> Any:
        """The value of type `hint` that some JSON stands for."""
        try:
            with self._deeper():
                return self._typed(entry, hint)
        except ArtifactError as error:
            if name and error.why is None:
                error.why = f"the field {name!r} is wrong"
            raise

    def _typed(self, entry: Any, hint: Any) -> Any:
        if hint in (Any, object):
            return self.value(entry)
        if hint in _TEXTS:
            with understood(f"the text {str(entry)[:80]!r}"):
                return _TEXTS[hint](text(entry))
        if hint in _SIMPLE:
            value = self.value(entry) if hint is float and isinstance(entry, dict) else entry
            if type(value) is not hint:
                raise ArtifactError(f"a {hint.__name__} is expected, found {str(entry)[:80]!r}")
            return value
        if hint in _SPECIAL:
            with understood(f"an entry of kind {getattr(hint, '__name__', hint)}"):
                return _SPECIAL[hint][1](self, entry)
        return self._composed(entry, hint)

    def _composed(self, entry: Any, hint: Any) -> Any:
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            return self._one_of(entry, parts)
        if origin is tuple and parts[-1] is ...:
            return tuple(self.typed(part, parts[0]) for part in listed(entry))
        if origin is tuple:
            return tuple(self.typed(part, kind) for part, kind in zip(listed(entry, len(parts)), parts, strict=True))
        if origin in (frozenset, set):
            return origin(self.typed(part, parts[0]) for part in listed(entry))
        if origin in (dict, collections.abc.Mapping):
            return {name: self.typed(part, parts[1]) for name, part in mapping(entry).items()}
        if origin is collections.abc.Callable:
            return self.functions.function(text(entry))
        if origin is type:
            return self.classes.named(text(entry))
        if isinstance(hint, type) and issubclass(hint, Enum):
            with understood(f"the word {str(entry)[:80]!r}"):
                return hint(text(entry))
        if dataclasses.is_dataclass(hint):
            return self.record(hint, entry)  # type: ignore[arg-type]
        raise ArtifactError(f"a value of type {hint} cannot be read")

    def _one_of(self, entry: Any, parts: tuple[Any, ...]) -> Any:
        if entry is None and type(None) in parts:
            return None
        tagged = {part.__name__: part for part in _tagged(parts)}
        if isinstance(entry, dict) and len(entry) == 1 and next(iter(entry)) in tagged:
            name, inner = next(iter(entry.items()))
            return self.record(tagged[name], inner)
        if QType in parts and FloatFormat in parts and isinstance(entry, str):
            return self.typed(entry, Format)
        for part in parts:
            if part not in tagged.values() and _may_be(entry, part):
                return self.typed(entry, part)
        names = ", ".join(getattr(part, "__name__", str(part)) for part in parts)
        raise ArtifactError(f"{str(entry)[:80]!r} is none of {names}")


# What the modules of the records write as text, because the definitions name themselves or each other.
_NAMES = {"ValueSpec": _Spec, "Named": Target, "Expression": Linear | SizeOf | Computed, "Number": int | float}


@lru_cache
def fields_of(kind: Any) -> tuple[tuple[str, Any, Any], ...]:
    """Name, type and default of each field of a dataclass; `MISSING` where there is no default."""
    hints = typing.get_type_hints(kind, localns=_NAMES)
    return tuple((field.name, hints[field.name], _default(field)) for field in dataclasses.fields(kind))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is _EMPTY else field.default_factory()


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and type(value) in _PLAIN and value == default)


_PLAIN = (bool, int, str, tuple, frozenset, dict)


def _tagged(parts: Any) -> list[Any]:
    """The members of a union that are told apart by name: records, if there are several."""
    records = [part for part in parts if dataclasses.is_dataclass(part) and part not in _SPECIAL and part not in _TEXTS]
    return records if len(records) > 1 else []


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a member of a union is the one for a value."""
    if hint in (Any, object):
        return True
    if hint is _Spec:
        return isinstance(value, (TensorSpec, ScalarSpec, tuple))
    kind = typing.get_origin(hint) or hint
    return type(value) is kind if kind in _SIMPLE else isinstance(value, kind)


def _may_be(entry: Any, hint: Any) -> bool:
    if hint in _SIMPLE:
        return type(entry) is hint
    if hint in _TEXTS or (isinstance(hint, type) and issubclass(hint, Enum)):
        return isinstance(entry, str)
    return hint is not type(None)


# --- types with a form of their own ----------------------------------------------------------------------------------


def _write_qparams(writer: RecordWriter, qparams: QParams) -> Any:
    written: dict[str, Any] = {"format": str(qparams.qtype), "scale": qparams.scale.tolist()}
    if qparams.zero_point is not None:
        written["zero_point"] = qparams.zero_point.tolist()
    return written if qparams.axis is None else {**written, "axis": qparams.axis}


def _read_qparams(reader: RecordReader, entry: Any) -> QParams:
    found = mapping(entry, frozenset(("format", "scale")), frozenset(("zero_point", "axis")))
    zero_point = found.get("zero_point")
    zero = None if zero_point is None else torch.tensor(_numbers(zero_point, int), dtype=torch.int64, device="cpu")
    axis = None if "axis" not in found else whole(found["axis"])
    scale = torch.tensor(_numbers(found["scale"], float), dtype=torch.float32, device="cpu")
    return QParams(scale, parse_qtype(text(found["format"])), zero, axis)


def _numbers(entry: Any, kind: type[Any]) -> Any:
    numbers = entry if isinstance(entry, list) else [entry]
    if not all(type(number) is kind for number in numbers):
        raise ArtifactError(f"numbers of kind {kind.__name__} are expected, found {str(entry)[:80]}")
    return entry


def _write_spec(writer: RecordWriter, spec: Any) -> Any:
    if isinstance(spec, tuple):
        return [None if part is None else _write_spec(writer, part) for part in spec]
    if isinstance(spec, ScalarSpec):
        return {"kind": spec.kind}
    return {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}


def _read_spec(reader: RecordReader, entry: Any) -> Any:
    if isinstance(entry, list):
        return tuple(None if part is None else reader.typed(part, _Spec) for part in entry)
    found = mapping(entry)
    if found.keys() == {"kind"}:
        return ScalarSpec(text(found["kind"]))
    mapping(found, frozenset(("shape", "dtype")), frozenset())
    shape = tuple(whole(size) for size in listed(found["shape"]))
    if any(size < 0 for size in shape):
        raise ArtifactError(f"a shape of {list(shape)} is not possible")
    return TensorSpec(shape, reader.value({"dtype": found["dtype"]}))


def _write_layout(writer: RecordWriter, layout: TensorLayout) -> Any:
    return {"shape": list(layout.example.shape), "strides": list(layout.strides)}


def _read_layout(reader: RecordReader, entry: Any) -> TensorLayout:
    found = mapping(entry, frozenset(("shape", "strides")), frozenset())
    shape, strides = ([whole(number) for number in listed(found[key])] for key in ("shape", "strides"))
    return TensorLayout(torch.empty_strided(shape, strides, device="meta"))


def _read_op(name: str) -> Op:
    try:
        return OPS.named(name)
    except UserError as error:
        raise ArtifactError(
            f"the graph uses the operator {name!r}, which is not known here",
            fix="import the package that defines it before you load the graph",
        ) from error


def _read_measured_node(reader: RecordReader, entry: Any) -> fx.Node:
    """A stand-in for the node of the recording, of which only the site is ever told."""
    node = fx.Graph().placeholder("measured")
    set_info(node, NodeInfo(INPUT, text(entry)))
    return node


_TEXTS: dict[Any, Callable[[str], Any]] = {
    Op: _read_op,
    Arithmetic: parse_arithmetic,
    QType: parse_qtype,
    FloatFormat: parse_format,
    Format: parse_format,
}
_SPECIAL: dict[Any, tuple[Callable[[RecordWriter, Any], Any], Callable[[RecordReader, Any], Any]]] = {
    QParams: (_write_qparams, _read_qparams),
    _Spec: (_write_spec, _read_spec),
    TensorLayout: (_write_layout, _read_layout),
    fx.Node: (lambda writer, node: info(node).site, _read_measured_node),
    torch.dtype: (lambda writer, dtype: writer.value(dtype)["dtype"], lambda r, entry: r.value({"dtype": entry})),
}
